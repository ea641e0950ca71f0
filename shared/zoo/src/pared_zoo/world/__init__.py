"""A seeded procedural world of scenes whose pictures, captions and boxes come from one description."""

from pared_zoo.world.attributes import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES
from pared_zoo.world.caption import caption
from pared_zoo.world.render import render
from pared_zoo.world.scene import Object, Scene, SceneDistribution, iter_scenes, sample_scenes

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "PLACES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "Object",
    "Scene",
    "SceneDistribution",
    "caption",
    "iter_scenes",
    "render",
    "sample_scenes",
]
