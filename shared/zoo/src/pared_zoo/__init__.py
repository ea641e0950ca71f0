"""The zoo of pared: a procedural world, small trained models of real classes, and real data that lies in wheels."""

from pared_zoo.shipped import card, load, models, path

__all__ = ["card", "load", "models", "path"]
__version__ = "0.1.0"
