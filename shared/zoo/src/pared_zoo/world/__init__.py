"""A seeded procedural world: pictures, clips, captions, boxes, motion and questions come from one description."""

from pared_zoo.world.attributes import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES
from pared_zoo.world.caption import caption
from pared_zoo.world.clip import CLIP_KINDS, Clip, ClipDistribution, iter_clips, render_clip, render_clips, sample_clips
from pared_zoo.world.clip_caption import clip_caption
from pared_zoo.world.detector import DetectedObject, Detection, detect
from pared_zoo.world.motion import DIRECTIONS, SPEEDS, Move, Program
from pared_zoo.world.noise import camera_noise
from pared_zoo.world.question import Question, questions
from pared_zoo.world.render import render
from pared_zoo.world.scene import Object, Scene, SceneDistribution, iter_scenes, sample_scenes
from pared_zoo.world.score import attribute_accuracy, judge

__all__ = [
    "BACKGROUNDS",
    "CLIP_KINDS",
    "COLORS",
    "DIRECTIONS",
    "PLACES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPEEDS",
    "TEXTURES",
    "Clip",
    "ClipDistribution",
    "DetectedObject",
    "Detection",
    "Move",
    "Object",
    "Program",
    "Question",
    "Scene",
    "SceneDistribution",
    "attribute_accuracy",
    "camera_noise",
    "caption",
    "clip_caption",
    "detect",
    "iter_clips",
    "iter_scenes",
    "judge",
    "questions",
    "render",
    "render_clip",
    "render_clips",
    "sample_clips",
    "sample_scenes",
]
