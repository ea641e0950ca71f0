"""Recipes of the zoo's trained models, by name."""

from __future__ import annotations

import importlib

from pared_zoo.recipes.base import Batch, Recipe, Schedule, Track

#: Name of a model -> module and class of its recipe; imported only when asked for.
RECIPES: dict[str, tuple[str, str]] = {
    "vae-world": ("pared_zoo.recipes.vae_world", "VaeWorld"),
    "sd-world": ("pared_zoo.recipes.sd_world", "SdWorld"),
    "mmdit-world": ("pared_zoo.recipes.mmdit_world", "MmditWorld"),
    "vlm-world": ("pared_zoo.recipes.vlm_world", "VlmWorld"),
    "ar-world": ("pared_zoo.recipes.ar_world", "ArWorld"),
    "emu3-world": ("pared_zoo.recipes.emu3_world", "Emu3World"),
    "vq-world": ("pared_zoo.recipes.vq_world", "VqWorld"),
}

__all__ = ["RECIPES", "Batch", "Recipe", "Schedule", "Track", "recipe"]


def recipe(name: str) -> type[Recipe]:
    """The recipe class of a model.

    Raises:
        ValueError: if there is no recipe of that name; the message lists those there are.
    """
    if name not in RECIPES:
        raise ValueError(f"name={name!r} must be one of {sorted(RECIPES)}")
    module, attribute = RECIPES[name]
    return getattr(importlib.import_module(module), attribute)
