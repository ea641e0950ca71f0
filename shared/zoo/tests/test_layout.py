"""What stands where in a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pared_zoo.recipes.layout import layouts
from pared_zoo.recipes.sight import LOOKS, NOTHING, PLACE, look_loss
from pared_zoo.world import COLORS, SHAPES, Object, Scene, render, sample_scenes

RING = Object("ring", "red", "large", "striped", 0.25, 0.75, 0.2)
CIRCLE = Object("circle", "blue", "small", "plain", 0.8, 0.2, 0.1)
SCENE = Scene((RING, CIRCLE), "navy", "pair", relation="left of")


def test_a_place_within_the_circle_of_an_object_shows_it_and_any_other_the_background():
    looks, places = layouts([SCENE], 10)
    assert looks.shape == (1, 100, len(LOOKS))
    assert places.shape == (1, 100, PLACE)
    shown = looks.view(10, 10, len(LOOKS))
    assert shown[7, 2].tolist() == [1, 2, SHAPES.index("ring"), list(COLORS).index("red"), 1, 1]
    assert shown[2, 8].tolist() == [1, 2, SHAPES.index("circle"), list(COLORS).index("blue"), 0, 0]
    assert shown[0, 0].tolist() == [0, 2, *[NOTHING] * 4]
    assert places.view(10, 10, PLACE)[7, 2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert places.view(10, 10, PLACE)[7, 3].tolist() == pytest.approx([0.5, 0], abs=1e-6)
    assert places.view(10, 10, PLACE)[6, 2].tolist() == pytest.approx([0, -0.5], abs=1e-6)
    assert places[looks[..., 0] == 0].abs().max() == 0


def test_every_object_shows_somewhere_and_where_it_was_drawn():
    scenes = sample_scenes(50, 811)
    looks, _ = layouts(scenes, 12)
    pictures = render(scenes, 96).reshape(50, 12, 8, 12, 8, 3).astype(int)
    for scene, shown, picture in zip(scenes, looks.view(50, 12, 12, -1), pictures, strict=True):
        words = {(SHAPES[a], list(COLORS)[b]) for a, b in shown[..., 2:4][shown[..., 0] == 1].tolist()}
        assert words == {(o.shape, o.color) for o in scene.objects}
        changes = np.ptp(picture, axis=(1, 3)).max(-1) > 0
        flat = torch.from_numpy(~changes) & (shown[..., 0] == 0)
        background = picture.transpose(0, 2, 1, 3, 4)[flat.numpy()].reshape(-1, 3)
        assert len(np.unique(background, axis=0)) == 1


def test_right_guesses_cost_nothing():
    looks, places = layouts([SCENE], 12)
    words = [torch.nn.functional.one_hot(looks[..., k].clamp(min=0), n) for k, n in enumerate(LOOKS.values())]
    loss, right = look_loss(torch.cat([40.0 * torch.cat(words, -1), places], -1), looks, places)
    assert loss < 1e-6
    assert right == 1
