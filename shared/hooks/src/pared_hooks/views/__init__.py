"""Views: the parts of a model that methods work on, under one set of names. One file per group of families."""

from pared_hooks.views import decoder_families, image_transformers, unet, video_transformers  # noqa: F401 (register)
from pared_hooks.views.decoder import DecoderFamily, DecoderLayer, DecoderView, register_decoder_family
from pared_hooks.views.denoiser import (
    AttentionSite,
    DenoiserBlock,
    DenoiserView,
    Grid,
    TokenSpans,
    register_denoiser_family,
)

__all__ = [
    "AttentionSite",
    "DecoderFamily",
    "DecoderLayer",
    "DecoderView",
    "DenoiserBlock",
    "DenoiserView",
    "Grid",
    "TokenSpans",
    "register_decoder_family",
    "register_denoiser_family",
]
