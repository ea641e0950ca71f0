"""Adapters: the only modules of dato that know a model family's classes and attribute names."""
