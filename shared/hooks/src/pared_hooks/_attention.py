"""Registering a transformers attention implementation for one model and taking it back."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from pared_hooks.errors import ParedError, UnsupportedModelError

_names = threading.Lock()


class PatchedName(str):
    """The name of a patched attention implementation, which turns back into the original one in a copied config."""

    original: Any
    functions: tuple[Callable[..., Any], ...]

    def __new__(cls, name: str, original: Any, functions: tuple[Callable[..., Any], ...]) -> PatchedName:
        self = super().__new__(cls, name)
        self.original = original
        # The global registries hold these weakly; the config of the model is what keeps them alive.
        self.functions = functions
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.original

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.original,)


def _itself(value: Any) -> Any:
    return value


@dataclass(eq=False)
class Registered:
    name: str
    release: Callable[[], object]
    functions: tuple[Callable[..., Any], Callable[..., Any]]


def register(model: nn.Module, name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> Registered:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if not isinstance(name, str) or not name:
        raise ParedError(f"name = {name!r} is not valid: the name of an attention implementation")
    if not callable(attention) or not callable(mask):
        raise ParedError("attention and mask must both be callable")
    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    with _names:
        free, number = name, 1
        while any(free in registry for registry in registries) or free == "eager":
            number += 1
            free = f"{name}-{number}"
        AttentionInterface.register(free, _weak(attention))
        AttentionMaskInterface.register(free, _weak(mask))

    def forget() -> None:
        for registry in registries:
            registry.pop(free, None)

    # The registries of transformers are global: without this a model dropped with its patch on would leave its entries.
    finalizer = weakref.finalize(model, forget)
    finalizer.atexit = False
    return Registered(free, finalizer, (attention, mask))


def unregister(registered: Registered) -> None:
    registered.release()


def switch(model: nn.Module, registered: Registered) -> Iterator[tuple[Any, Any]]:
    """Yield each config whose attention implementation changes, with its new value; the configs are left unchanged."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError.unknown(
            model, ["transformers.PreTrainedModel"], "Attention functions can only be set on models of transformers."
        )
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    refusing = sorted({type(part).__name__ for part in parts if not part._can_set_attn_implementation()})
    if refusing:
        raise UnsupportedModelError(
            f"{', '.join(refusing)} does not take its attention from transformers' AttentionInterface. "
            "Pass the part that does (DecoderView.of(model).model), or write a forward wrapper for its attention."
        )
    configs = _configs(part.config for part in parts)
    before = [config._attn_implementation_internal for config in configs]
    try:
        model.set_attn_implementation(registered.name)
        after = [config._attn_implementation_internal for config in configs]
    finally:
        for config, value in zip(configs, before, strict=True):
            config._attn_implementation_internal = value
    if model.config is configs[0] and after[0] != registered.name:
        raise UnsupportedModelError(f"{type(model).__name__} refused the attention implementation {registered.name!r}")
    for config, old, new in zip(configs, before, after, strict=True):
        if new != old:
            original = old.original if isinstance(old, PatchedName) else old
            yield config, PatchedName(new, original, registered.functions) if new == registered.name else new


def _configs(roots: Any) -> list[Any]:
    found: dict[int, Any] = {}
    pending = list(roots)
    while pending:
        config = pending.pop(0)
        if config is None or id(config) in found:
            continue
        found[id(config)] = config
        pending.extend(getattr(config, key) for key in config.sub_configs if hasattr(config, key))
    return list(found.values())


def _weak(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, or a stand-in that does not keep alive what `function` is bound to or closes over."""
    if isinstance(function, types.FunctionType) and function.__closure__ is None:
        return function
    reference: Any = weakref.WeakMethod(function) if isinstance(function, types.MethodType) else weakref.ref(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        return reference()(*args, **kwargs)

    return call
