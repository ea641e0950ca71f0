"""``python -m pared_zoo.train NAME``: the trainer as a module, which is what ``accelerate launch`` starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate import PartialState

from pared_zoo.shipped import models, ship
from pared_zoo.train.loop import run


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m pared_zoo.train", description="Train a model of the zoo.")
    parser.add_argument("name", choices=models())
    parser.add_argument("--size", default="small", choices=("small", "base"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--ship", action="store_true", help="copy the measured model into the package")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    options = parser.parse_args()
    exported = run(
        options.name,
        resume=options.resume,
        size=options.size,
        out=options.out,
        seed=options.seed,
        steps=options.steps,
        compile=options.compile,
    )
    if options.ship and PartialState().is_main_process:
        ship(exported, options.name)


if __name__ == "__main__":
    main()
