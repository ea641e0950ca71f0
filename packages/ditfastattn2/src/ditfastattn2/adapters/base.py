"""The families that are known, and the check of a model against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pared_hooks import AttentionSite, ConflictError, DenoiserView, UnsupportedModelError
from torch import Tensor, nn

from ditfastattn2.adapters import cogvideox, flux, hunyuan_video, qwen_image, sd3, wan
from ditfastattn2.layout import CountText

Finish = Callable[[Any, Tensor, Tensor, Tensor | None], Any]
"""From attention, its output (B, S, H D) and the processor's first two inputs to what the processor returns."""

CACHING_HOOKS = ("pyramid_attention_broadcast", "faster_cache_block", "taylorseer_cache")
"""Hooks of diffusers that replace the output of an attention module themselves."""


@dataclass(frozen=True)
class Family:
    """Processors of a family whose one joint attention can be replaced, and the end of what they do.

    `finish` of a module returns that end, or None where queries, keys and values cannot be left out. `count_text` is
    for models that sort their text tokens themselves; in others one mask tells which are padding.
    """

    processors: tuple[str, ...]
    finish: Callable[[Any], Finish | None]
    count_text: CountText | None = None


FAMILIES = {
    "sd3": Family(("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"), lambda attention: sd3.finish),
    "flux": Family(("FluxAttnProcessor",), lambda attention: flux.finish),
    "flux2": Family(("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"), flux.finish_of_flux2),
    "qwen-image": Family(("QwenDoubleStreamAttnProcessor2_0",), lambda attention: qwen_image.finish),
    "cogvideox": Family(
        ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"), lambda attention: cogvideox.finish
    ),
    "hunyuan-video": Family(("HunyuanVideoAttnProcessor2_0",), lambda attention: hunyuan_video.finish),
    "hunyuan-video-15": Family(
        ("HunyuanVideo15AttnProcessor2_0",), lambda attention: hunyuan_video.finish, hunyuan_video.count_text
    ),
    "wan": Family(("WanAttnProcessor",), lambda attention: wan.finish),
}


def view_of(model_or_pipeline: Any) -> DenoiserView:
    """View a denoiser or that of a pipeline; raises `UnsupportedModelError` for a pipeline that has two."""
    if isinstance(getattr(model_or_pipeline, "transformer_2", None), nn.Module):
        raise UnsupportedModelError(
            f"this {type(model_or_pipeline).__name__} denoises with two models in turn, and a plan is of one. Apply a "
            "plan to pipe.transformer and another to pipe.transformer_2; to make them, pass calibrate a function that "
            "runs the pipeline, and denoiser=pipe.transformer or denoiser=pipe.transformer_2"
        )
    return DenoiserView.of(model_or_pipeline)


def family_of(view: DenoiserView) -> Family:
    """Return the family of a model; raises `UnsupportedModelError` naming those that are known."""
    family = FAMILIES.get(view.architecture)
    if family is None:
        raise UnsupportedModelError.unknown(
            view.model,
            FAMILIES,
            "To support it, write ditfastattn2/adapters/<family>.py: the processors whose attention can be replaced, "
            "and what they do with its output.",
        )
    return family


def sites_of(view: DenoiserView) -> tuple[AttentionSite, ...]:
    """Return the attention modules in which the picture looks at itself, alone or together with text."""
    return tuple(site for site in view.attentions if site.kind in ("joint", "self"))


def heads_of(site: AttentionSite) -> int:
    """Return the number of heads of an attention module."""
    module: Any = site.module
    return int(module.heads)


def check_site(site: AttentionSite, family: Family) -> None:
    """Raise `UnsupportedModelError` for a processor that is not known, `ConflictError` for a caching hook."""
    module: Any = site.module
    processor = type(module.processor).__name__
    if processor not in family.processors:
        raise UnsupportedModelError(
            f"the attention processor {processor} of {site.name} is not supported: its attention cannot be told apart. "
            f"Supported: {', '.join(family.processors)}"
        )
    check_hooks(site)


def check_hooks(site: AttentionSite) -> None:
    """Raise `ConflictError` when a hook of diffusers replaces the output of this attention."""
    registry = site.module.__dict__.get("_diffusers_hook")
    for name in registry.hooks if registry is not None else ():
        if name.startswith(CACHING_HOOKS):
            raise ConflictError(
                f"ditfastattn2 and the diffusers hook {name!r} both replace the output of {site.name}; "
                "disable one of the two (model.disable_cache())"
            )


def check_parallelism(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for a model whose tokens or heads are spread over devices by diffusers."""
    if getattr(model, "_parallel_config", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has diffusers parallelism enabled: a plan counts the tokens and heads of the "
            "whole model, and each device holds only a part. Use data parallelism, or load without parallel_config"
        )
