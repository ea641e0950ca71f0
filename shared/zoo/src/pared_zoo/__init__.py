"""A procedural world, small trained models of real classes, and loaders of real data for the pared packages."""

__version__ = "0.1.0"
