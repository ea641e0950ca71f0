"""`apply`: let a language model cache keys and values as CSKV does, and the handle that takes this back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pared_hooks import AlreadyAppliedError, ConfigError, DecoderView, Handle, Patch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache, StaticCache

from cskv.backend import resolve_backend
from cskv.cache import Applied, CSKVCache, CSKVLayer, FactorBuffers, LayerSpec, Usage
from cskv.config import CSKVConfig
from cskv.errors import AppliedTwiceError
from cskv.factors import Factors, check_factors
from cskv.fit import fit
from cskv.fused import FusedAttention
from cskv.plan import LayerPlan, plan_layers

OWNER = "cskv"
BUFFERS = "cskv_factors"
"""Name of the submodule that holds the factors of an attention while CSKV is applied."""


class CSKVHandle(Handle):
    """CSKV on a model. While it is there, `model.generate()` and plain calls cache through it."""

    def __init__(
        self,
        patch: Patch,
        view: DecoderView,
        config: CSKVConfig,
        factors: Factors,
        specs: dict[int, LayerSpec],
        shared: Applied,
        backend: str,
    ) -> None:
        super().__init__(patch)
        self.config = config
        self.factors = factors
        self.backend = backend
        self._text_config = view.config.get_text_config(decoder=True)
        self._specs = specs
        self._shared = shared

    def new_cache(self, *, offloading: bool = False) -> CSKVCache:
        """An empty cache to pass as `past_key_values`; several may be in use. Raises RuntimeError after removal."""
        if self._shared.removed:
            raise RuntimeError("this handle was removed from its model; apply CSKV again to make caches")
        return CSKVCache.create(self._text_config, self._specs, offloading=offloading)

    def stats(self) -> dict[str, Any]:
        """What the cache used last holds, and how its layers are stored.

        "tokens" and "batch"; "bytes" by kind ("compressed", "tail", "metadata", "rotary", "total"), allocated but
        unused room included; "full_cache_bytes" of the same layers in a full cache, and "ratio" of the two, None
        before the first token; "layers": rank of keys and values by layer, or "exact" where nothing is gained by a
        factor; "backend".
        """
        usage = self._shared.usage
        kinds = {kind: usage.total(kind) for kind in ("compressed", "tail", "metadata")}
        sizes = {**kinds, "rotary": usage.rotary}
        total, full = sum(sizes.values()), usage.total("full")
        return {
            "tokens": usage.tokens,
            "batch": usage.batch,
            "bytes": {**sizes, "total": total},
            "full_cache_bytes": full,
            "ratio": total / full if full else None,
            "layers": {index: _stored(spec.plan) for index, spec in self._specs.items()},
            "backend": self.backend,
        }

    def reset(self) -> None:
        """Forget the statistics. Caches belong to their callers and stay as they are."""
        self._shared.usage = Usage()


def apply(
    model: nn.Module, config: CSKVConfig | None = None, factors: Factors | Sequence[Any] | None = None
) -> CSKVHandle:
    """Let `model` cache its keys and values as latents with an exact window, until `handle.remove()`.

    `factors` come from `fit`, `finetune`, `load` or `load_official`, or are a sequence of (A_K, B_K, A_V, B_V) for the
    compressed layers in order; without them they are computed here, which works with `init="svd"` alone.

    All or nothing: when an error is raised, the model is as it was. Raises `UnsupportedAttentionError` (a
    NotImplementedError and a ValueError) for an unknown model, ConfigError (a ValueError) for factors that do not fit
    or missing statistics, RuntimeError for a backend that cannot run, and `AppliedTwiceError` (a RuntimeError) when
    CSKV is on the model already.
    """
    config = CSKVConfig() if config is None else config
    if not isinstance(config, CSKVConfig):
        raise ConfigError(f"config = {config!r} is not valid: a CSKVConfig", "config")
    view, plans = plan_layers(model, config)
    backend = resolve_backend(config, view, plans)
    checked = check_factors(fit(model, config) if factors is None else factors, plans)
    shared = Applied()
    specs: dict[int, LayerSpec] = {}
    try:
        with Patch(OWNER) as patch:
            patch.claim(view.model, "decoder.cache")
            patch.on_remove(lambda: setattr(shared, "removed", True))
            fused = FusedAttention(view.config._attn_implementation, shared) if backend != "torch" else None
            if fused is not None:
                # Where the decoder is a part, the other parts keep their own implementation.
                target = view.root if getattr(view.root, "config", None) is view.config else view.model
                fused.name = patch.set_attention(target, OWNER, fused, fused.mask)
            for plan in plans:
                buffers = FactorBuffers(plan, checked[plan.index])
                specs[plan.index] = LayerSpec(plan, buffers, config, shared, fused is not None and plan.has_factors)
                patch.add_module(plan.adapter.module, BUFFERS, buffers)
                patch.add_hook(
                    plan.adapter.module, "forward_pre", _attention_hook(plan, shared, fused), with_kwargs=True
                )
            text_config = view.config.get_text_config(decoder=True)
            patch.add_hook(view.model, "forward_pre", _decoder_hook(view, text_config, specs), with_kwargs=True)
    except AlreadyAppliedError as error:
        raise AppliedTwiceError(str(error)) from None
    return CSKVHandle(patch, view, config, checked, specs, shared, backend)


@contextmanager
def applied(
    model: nn.Module, config: CSKVConfig | None = None, factors: Factors | Sequence[Any] | None = None
) -> Iterator[CSKVHandle]:
    """`apply` for the duration of a `with` block; raises what `apply` raises."""
    with apply(model, config, factors) as handle:
        yield handle


def _stored(plan: LayerPlan) -> dict[str, int | str]:
    return {side: "exact" if plan.rank(side) is None else plan.rank(side) or 0 for side in ("k", "v")}


def _attention_hook(plan: LayerPlan, shared: Applied, fused: FusedAttention | None) -> Callable[..., Any]:
    """Hand the inputs of an attention to its cache layer, and give it the mask for what the layer will return."""
    adapter = plan.adapter

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A call that broke off may have left something for fused attention to read.
        shared.handed.pop(id(module), None)
        arguments = adapter.arguments(args, kwargs)
        cache = arguments.get("past_key_values")
        layer = cache.layers[adapter.index] if isinstance(cache, CSKVCache) else None
        if not isinstance(layer, CSKVLayer):
            return None
        if layer.spec.plan.adapter.module is not module:
            layer._check_applied()
            raise ConfigError(
                "past_key_values is a CSKVCache of another model or handle; make one with this handle's new_cache()",
                "past_key_values",
            )
        cos, sin = arguments["position_embeddings"]
        before = arguments.get("attention_mask")
        implementation = str(adapter.module.config._attn_implementation)  # type: ignore[union-attr]
        # Somebody may have set another implementation since; then the layer returns all columns.
        is_fused = fused is not None and implementation == fused.name
        if fused is not None and is_fused:
            implementation = fused.previous
        fuses = is_fused and layer.spec.fused
        mask = layer.stage(arguments["hidden_states"], cos, sin, before, implementation, fuses)
        if mask is before:
            return None
        # Give every argument by name: the mask may have come by position.
        return (), {**arguments, "attention_mask": mask}

    return hook


def _decoder_hook(view: DecoderView, text_config: Any, specs: dict[int, LayerSpec]) -> Callable[..., Any]:
    """See to it that the decoder runs with a `CSKVCache`, or say why not."""
    names = tuple(inspect.signature(type(view.model).forward).parameters)[1:]
    warned = False

    @torch.compiler.disable
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal warned
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = arguments.get("past_key_values")
        if cache is None:
            use_cache = arguments.get("use_cache")
            if not (getattr(text_config, "use_cache", True) if use_cache is None else use_cache):
                return None
            cache = CSKVCache.create(text_config, specs)
            return (), {**arguments, "past_key_values": cache}
        if type(cache) is DynamicCache and _is_empty(cache):
            CSKVCache.adopt(cache, text_config, specs)
        elif isinstance(cache, StaticCache | QuantizedCache):
            raise ConfigError(
                f"past_key_values is a {type(cache).__name__}; with CSKV applied, leave cache_implementation at its "
                "default, pass an empty DynamicCache, or handle.new_cache()",
                "past_key_values",
            )
        elif not isinstance(cache, CSKVCache) and not warned:
            warned = True
            warnings.warn(
                f"cskv leaves this {type(cache).__name__} as it is, because it is not empty or not a DynamicCache: "
                "nothing in it is compressed. Use handle.new_cache()",
                stacklevel=2,
            )
        if isinstance(cache, CSKVCache):
            _check_padding(cache, arguments)
        return None

    return hook


def _is_empty(cache: Cache) -> bool:
    return not any(getattr(layer, "is_initialized", False) for layer in cache.layers)


def _check_padding(cache: CSKVCache, arguments: dict[str, Any]) -> None:
    """Refuse to go on behind a prompt that was padded on the right."""
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    mask = arguments.get("attention_mask")
    layer = next(layer for layer in cache.layers if isinstance(layer, CSKVLayer))
    past = layer.get_seq_length()
    if cache.padding_unchecked and past and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > past:
        wrong = (mask[:, past - 1] == 0).nonzero().flatten().tolist()
        if wrong:
            raise ConfigError(
                f"attention_mask: rows {wrong} of the prompt are padded on the right; pad on the left for decoding "
                "(tokenizer.padding_side = 'left')",
                "attention_mask",
            )
    cache.padding_unchecked = inputs is not None and inputs.shape[1] > 1
