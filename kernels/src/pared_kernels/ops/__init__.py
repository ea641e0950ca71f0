"""The operators: one folder each, found by its presence."""
