"""Real models and data that lie in wheels: photographs, films, a language model, image features and text."""

from pared_zoo.real.clips import clip, clips
from pared_zoo.real.features import efficientnet_features
from pared_zoo.real.language import smollm2
from pared_zoo.real.photos import photo_crops, photos
from pared_zoo.real.text import Text, text_corpus

__all__ = ["Text", "clip", "clips", "efficientnet_features", "photo_crops", "photos", "smollm2", "text_corpus"]
