"""Dynamics-aware token pruning and feature caching for diffusion UNets and DiTs (DaTo)."""

__version__ = "0.1.0"
