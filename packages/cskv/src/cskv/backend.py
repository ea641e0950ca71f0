"""Which implementation decodes: torch, or the fused operators of pared_kernels."""

from __future__ import annotations

import importlib.util

from pared_hooks import DecoderView
from torch import nn

from cskv.config import CSKVConfig
from cskv.plan import LayerPlan

HEADS = (64, 128, 256)
"""Channels of a head that the kernels are tuned for."""


def resolve_backend(config: CSKVConfig, view: DecoderView, plans: list[LayerPlan]) -> str:
    """The implementation of decoding to use: "torch", or fused operators as "triton" or "cpu".

    "auto" takes the kernels where they run, on a CPU the same operators without kernels, and torch elsewhere. Raises
    RuntimeError, with the reason, when `config.backend` is "triton" and that cannot run.
    """
    if config.backend == "torch":
        return "torch"
    unknown = _unknown_attention(plans)
    reason = missing_device(view.root) or _unknown_heads(view) or unknown
    if reason is None:
        return "triton"
    if config.backend == "triton":
        raise RuntimeError(f'backend = "triton" {reason}')
    return "cpu" if unknown is None and _devices(view.root) == {"cpu"} else "torch"


def missing_device(model: nn.Module) -> str | None:
    """Why this model is not where kernels run, or None."""
    devices = _devices(model)
    if devices != {"cuda"}:
        return f"needs CUDA; the model is on {', '.join(sorted(devices)) or 'nothing'}"
    return None if importlib.util.find_spec("triton") is not None else "needs triton, which is not installed"


def _devices(model: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


def _unknown_heads(view: DecoderView) -> str | None:
    """Why the kernels do not take heads of this size, or None."""
    return None if view.head_dim in HEADS else f"needs heads of 64, 128 or 256 channels; this model has {view.head_dim}"


def _unknown_attention(plans: list[LayerPlan]) -> str | None:
    """Why the operators cannot do what this model's attention does, or None."""
    if not any(plan.has_factors for plan in plans):
        return "needs a layer whose keys and values both have a factor; here all keep one of them exactly"
    adapter = plans[0].adapter
    name = type(adapter.module).__name__
    if adapter.key_norm is not None:
        return f"rebuilds keys without a norm; {name} normalises them"
    if adapter.has_sinks:
        return f"attends without sinks; {name} has them"
    if adapter.caps_scores:
        return f"attends without a cap of the scores; {name} has one"
    turning = next((plan.adapter for plan in plans if plan.adapter.uses_rope), None)
    if turning is not None and not turning.rotates_halves():
        return f"rotates keys in halves; {name} pairs channels in another way"
    return None
