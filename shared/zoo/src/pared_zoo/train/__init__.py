"""Training of the zoo's models: seeded, resumable, averaged weights, a loss log, any number of processes."""

from pared_zoo.train.loop import run

__all__ = ["run"]
