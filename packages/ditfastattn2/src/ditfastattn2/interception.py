"""How attention is reached: the model's own processor runs, and the one attention inside it is ours.

The processor is called under a `TorchFunctionMode` that answers `scaled_dot_product_attention`; nothing else changes.
So whatever else a processor does (projections, norms, rotary tables, output projections, LoRA) stays the library's own
code. The attention itself is a custom op that `torch.compile` does not look into: what changes from step to step (the
step, windows, caches) is behind it, and no step is compiled anew.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from pared_hooks import AttentionSite, Patch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ditfastattn2.adapters.base import Finish


class Run(Protocol):
    """What decides about the attention of a denoiser call."""

    dense: bool
    """Whether the current call takes the model's own attention everywhere."""

    def attend(self, hook: Hook, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attention of one site, all (B, H, S, D)."""

    def recall(self, hook: Hook) -> Tensor:
        """Output (B, S, H, D) of a site all of whose heads are cached."""


class Hook:
    """One attention module under our control; `recalls` is set for each call before the module runs."""

    def __init__(self, index: int, site: AttentionSite, finish: Finish | None, run: Run) -> None:
        self.index = index
        self.site = site
        self.finish = finish
        self.run = run
        self.recalls = False
        number = next(_numbers)
        _hooks[number] = self
        # A tensor: an int would make torch.compile compile each layer anew.
        self.number = torch.tensor(number)
        inner: Any = site.module.processor
        kind: Any = type(inner)
        self.processor: HeadwiseProcessor = _class_for(kind)(inner, self)

    def install(self, patch: Patch) -> None:
        """Put the processor in place; its inner one calls torch's attention, whatever backend the user has chosen."""
        inner, outer = self.processor.inner, self.processor
        if hasattr(inner, "_attention_backend"):
            from diffusers.models.attention_dispatch import AttentionBackendName

            chosen = inner._attention_backend

            def hand_back() -> None:
                if outer._attention_backend is not chosen:
                    inner._attention_backend = outer._attention_backend

            patch.on_remove(hand_back)
            patch.set_attribute(inner, "_attention_backend", AttentionBackendName.NATIVE)
            outer._attention_backend = chosen
        patch.set_processor(self.site.module, outer)


class HeadwiseProcessor:
    """A processor of diffusers with its attention replaced; subclasses have the signature of the one they run."""

    def __init__(self, inner: Any, hook: Hook) -> None:
        self.inner = inner
        self.hook = hook
        self._attention_backend: Any = None
        """What the user chose with `set_attention_backend`; heads that stay full go there."""

    def call(self, attention: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hook = self.hook
        if hook.run.dense:
            return self.inner(attention, hidden_states, *args, **kwargs)
        if hook.recalls:
            assert hook.finish is not None
            text = args[0] if args else kwargs.get("encoder_hidden_states")
            attended = torch.ops.pared_ditfastattn2.recall(hidden_states, text, attention.inner_dim, hook.number)
            return hook.finish(attention, attended, hidden_states, text)
        with _Replace(hook.number):
            return self.inner(attention, hidden_states, *args, **kwargs)


class _Replace(TorchFunctionMode):
    def __init__(self, number: Tensor) -> None:
        super().__init__()
        self.number = number

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is scaled_dot_product_attention:
            return _attend(self.number, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _attend(
    number: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    result: Tensor = torch.ops.pared_ditfastattn2.attend(query, key, value, attn_mask, scale, number)
    return result


@functools.cache
def _class_for(kind: type) -> type[HeadwiseProcessor]:
    """Return the processor class for an inner class: attention modules read the signature to know what to pass."""

    @functools.wraps(kind.__call__)
    def call(self: HeadwiseProcessor, attention: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.call(attention, hidden_states, *args, **kwargs)

    return type(f"Headwise{kind.__name__}", (HeadwiseProcessor,), {"__call__": call})


# Compiled code names a hook by a number in a tensor, so hooks must be found by it; the table keeps none alive.
_hooks: WeakValueDictionary[int, Hook] = WeakValueDictionary()
_numbers = itertools.count()
_library = torch.library.Library("pared_ditfastattn2", "FRAGMENT")


def _run_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, number: Tensor) -> Tensor:
    hook = _hooks[int(number)]
    return hook.run.attend(hook, q, k, v, mask, scale)


def _fake_attend(q: Tensor, *rest: Any) -> Tensor:
    batch, heads, tokens, channels = q.shape
    return q.new_empty((batch, tokens, heads, channels)).transpose(1, 2)


def _run_recall(hidden_states: Tensor, text: Tensor | None, width: int, number: Tensor) -> Tensor:
    hook = _hooks[int(number)]
    return hook.run.recall(hook).flatten(2).to(hidden_states.device, hidden_states.dtype, copy=True)


def _fake_recall(hidden_states: Tensor, text: Tensor | None, width: int, number: Tensor) -> Tensor:
    tokens = hidden_states.shape[1] + (0 if text is None else text.shape[1])
    return hidden_states.new_empty((hidden_states.shape[0], tokens, width))


for _schema, _run, _fake in (
    (
        "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, Tensor number) -> Tensor",
        _run_attend,
        _fake_attend,
    ),
    ("recall(Tensor hidden_states, Tensor? text, int width, Tensor number) -> Tensor", _run_recall, _fake_recall),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pared_ditfastattn2::{_name}", _fake, lib=_library)
