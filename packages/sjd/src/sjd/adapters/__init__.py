"""One file per model family: the only place that knows its class and attribute names."""

from __future__ import annotations

from typing import Any

from pared_hooks import UnsupportedModelError

from sjd.adapters.base import BUILT_IN, Adapter, is_instance, register_adapter, registered

__all__ = ["Adapter", "adapter_of", "register_adapter"]


def adapter_of(model: Any, *, check: bool = True) -> Adapter:
    """The adapter of a model.

    Raises `UnsupportedModelError` for one that is not known, or with `check` one that cannot roll back.
    """
    adapter = registered(model) or _built_in(model)
    if adapter is None:
        raise UnsupportedModelError.unknown(
            model, BUILT_IN, "Write one: subclass sjd.Adapter and call sjd.register_adapter (docs/models.md)."
        )
    if check:
        adapter.check()
    return adapter


def _built_in(model: Any) -> Adapter | None:
    from sjd.adapters.causal_lm import CausalLM
    from sjd.adapters.chameleon import Chameleon
    from sjd.adapters.emu3 import Emu3
    from sjd.adapters.glm_image import GlmImage
    from sjd.adapters.janus import Janus
    from sjd.adapters.llamagen import LlamaGen

    if is_instance(model, "ChameleonForConditionalGeneration"):
        return Chameleon(model)
    if is_instance(model, "Emu3ForConditionalGeneration", "Emu3ForCausalLM"):
        return Emu3(model)
    if is_instance(model, "JanusForConditionalGeneration"):
        return Janus(model)
    if is_instance(model, "GlmImageForConditionalGeneration"):
        return GlmImage(model)
    if is_instance(model, "LlamaGenTransformer"):
        return LlamaGen(model)
    return CausalLM(model) if CausalLM.fits(model) else None
