"""What stands where in a picture, told at every place of a grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pared_zoo.recipes.sight import LOOKS, NOTHING, PLACE
from pared_zoo.world import Scene
from pared_zoo.world.attributes import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES


def layouts(scenes: Sequence[Scene], side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right answers for ``look_loss`` at every place of a ``side`` times ``side`` grid.

    A place shows an object when its centre lies in the circle within the object's box; such circles do not meet.

    Args:
        scenes: what the pictures show.
        side: places along one side of a picture.

    Returns:
        Answers to ``LOOKS``, int64 (scenes, side * side, len(LOOKS)), ``NOTHING`` where there is no object; and the
        place as seen from the object's centre, float32 (scenes, side * side, PLACE) as (x, y) in its radii.
    """
    looks = np.full((len(scenes), side * side, len(LOOKS)), NOTHING)
    looks[..., 0] = 0
    places = np.zeros((len(scenes), side * side, PLACE), dtype=np.float32)
    at = (np.arange(side) + 0.5) / side
    grid = np.stack([np.tile(at, side), np.repeat(at, side)], axis=1)
    for i, scene in enumerate(scenes):
        looks[i, :, 1] = list(BACKGROUNDS).index(scene.background)
        for o in scene.objects:
            from_centre = (grid - (o.x, o.y)) / o.radius
            inside = np.square(from_centre).sum(axis=1) <= 1
            words = (SHAPES.index(o.shape), list(COLORS).index(o.color), list(SIZES).index(o.size))
            looks[i, inside, 0] = 1
            looks[i, inside, 2:] = (*words, TEXTURES.index(o.texture))
            places[i, inside] = from_centre[inside]
    return torch.from_numpy(looks), torch.from_numpy(places)
