"""What each of several processes runs for the test of the trainer: ``two_processes.py FOLDER`` under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from line_recipe import Line
from pared_zoo.recipes import RECIPES
from pared_zoo.train import run
from safetensors.torch import save_file

FOLDER, RANK = Path(sys.argv[1]), os.environ["RANK"]


class Watched(Line):
    """A line that tells which process drew and saved what."""

    def batch(self, step, rank, size):
        batch = super().batch(step, rank, size)
        if step == 0:
            save_file(batch, FOLDER / f"first-batch-{RANK}.safetensors")
        return batch

    def loss(self, module, batch, generator):
        Watched.trained = module
        return super().loss(module, batch, generator)

    def save(self, module, folder):
        super().save(module, folder)
        (FOLDER / f"saved-by-{RANK}").touch()


RECIPES["line"] = ("__main__", "Watched")
run("line", out=FOLDER / "run")
save_file({k: v.detach() for k, v in Watched.trained.state_dict().items()}, FOLDER / f"end-{RANK}.safetensors")
