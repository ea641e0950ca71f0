"""A seeded procedural world of scenes whose pictures, captions and boxes come from one description."""

from pared_zoo.world.attributes import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES
from pared_zoo.world.caption import caption
from pared_zoo.world.detector import DetectedObject, Detection, detect
from pared_zoo.world.render import render
from pared_zoo.world.scene import Object, Scene, SceneDistribution, iter_scenes, sample_scenes
from pared_zoo.world.score import attribute_accuracy, judge

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "PLACES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "DetectedObject",
    "Detection",
    "Object",
    "Scene",
    "SceneDistribution",
    "attribute_accuracy",
    "caption",
    "detect",
    "iter_scenes",
    "judge",
    "render",
    "sample_scenes",
]
