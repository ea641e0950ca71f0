"""The optimizers of a run: AdamW, and Muon for what a recipe gives it."""

from __future__ import annotations

from torch.nn import Module
from torch.optim import AdamW, Muon, Optimizer

from pared_zoo.recipes import Recipe

WEIGHT_DECAY = 0.01


def optimizers(recipe: Recipe, module: Module) -> list[Optimizer]:
    """AdamW for the trainable parameters of ``module``, followed by Muon if some of them are the recipe's for Muon.

    Raises:
        ValueError: if the recipe has parameters for Muon and its schedule no rate for them.
    """
    schedule = recipe.schedule
    matrices = recipe.muon_parameters(module)
    apart = {id(p) for p in matrices}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in apart]
    found: list[Optimizer] = [
        AdamW(rest, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True)
    ]
    if matrices:
        rate = schedule.muon_learning_rate
        if rate is None:
            wanted = f"a rate for {len(matrices)} matrices of {recipe.name!r}"
            raise ValueError(f"muon_learning_rate=None must be {wanted}")
        # Updates as long as those of AdamW, so that rates mean the same.
        found.append(Muon(matrices, lr=rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"))
    return found
