"""`apply`: reduce the video tokens of a model's prompts, and the handle that takes this back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from pared_hooks import ConfigError, DecoderView, Handle, Patch, UnsupportedModelError
from torch import Tensor, nn

from framefusion.adapters import RESOLVERS, find_resolver
from framefusion.attention import interface_of
from framefusion.config import FrameFusionConfig
from framefusion.decoder_layer import check_layers
from framefusion.engine import Engine, Strategy
from framefusion.errors import LayoutError
from framefusion.layout import LayoutResolver, TokenLayout
from framefusion.layout_source import LayoutSource
from framefusion.masks import is_flash
from framefusion.request import StageTrace
from framefusion.stats import Sizes, Stats

OWNER = "framefusion"
SITES = ("decoder.tokens", "decoder.cache")
"""What no other method can change at the same time: the tokens of the decoder, and how many its cache holds."""


class FrameFusionHandle(Handle):
    """FrameFusion on a model."""

    def __init__(self, patch: Patch, engine: Engine) -> None:
        super().__init__(patch)
        self.config = engine.config
        self._engine = engine

    @property
    def trace(self) -> list[StageTrace]:
        """The stages of the last prompt."""
        return list(self._engine.last.trace) if self._engine.last is not None else []

    @property
    def kept(self) -> Tensor | None:
        """(batch, n) int64: positions of the last prompt that were left in the end, -1 for padding."""
        request = self._engine.last
        return None if request is None else request.kept()

    @property
    def groups(self) -> Tensor | None:
        """(batch, tokens) int64: the row of the last prompt's end that each token went into, -1 where it vanished."""
        request = self._engine.last
        return None if request is None else request.groups()

    @property
    def layout(self) -> TokenLayout | None:
        """Where the videos of the last prompt were."""
        request = self._engine.last
        return None if request is None else request.layout

    @property
    def sizes(self) -> Sizes:
        """Widths of the decoder, which FLOPs are computed from."""
        return self._engine.stats.sizes

    def stats(self) -> dict[str, Any]:
        """What was done since the last reset, as averages over the sequences that had vision tokens.

        "requests", "sequences"; "vision_tokens" of a sequence; "attention_tokens" and "mlp_tokens", vision tokens in
        each layer; "cost", the share of vision tokens present averaged over layers, and "costs" by sequence;
        "flops_ratio" of the decoder's prefill to the dense one; "kv_bytes_saved" in all; "controller_seconds".
        """
        return self._engine.stats.report()

    def reset(self) -> None:
        """Forget statistics and the last prompt."""
        self._engine.stats = Stats(self._engine.stats.sizes)
        self._engine.last = None

    def set_layout(self, layout: TokenLayout) -> None:
        """Use this layout for the next prompt. Raises `LayoutError` for one that is not valid."""
        if not isinstance(layout, TokenLayout):
            raise LayoutError(f"layout is a {type(layout).__name__}; valid: a TokenLayout")
        layout.check()
        self._engine.source.announce(layout)

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which prompts pass unreduced."""
        return self._engine.off()


def apply(
    model: nn.Module,
    cfg: FrameFusionConfig | None = None,
    *,
    layout: TokenLayout | LayoutResolver | None = None,
) -> FrameFusionHandle:
    """Merge and prune video tokens in the LLM of `model`, until `handle.remove()` (arXiv 2501.01986).

    `layout` says where the videos of every prompt are, for models whose prompts FrameFusion cannot read itself: a
    `TokenLayout`, or a function of the arguments of the model's forward that returns one.

    All or nothing: when an error is raised, the model is as it was. Raises `UnsupportedModelError` for a model that is
    unknown and comes without layout, `UnsupportedLayerError` for layers that cannot be split, `LayoutError`,
    `AlreadyAppliedError`, and `ConflictError` when another method changes which tokens the decoder has or how it caches
    them.
    """
    cfg = FrameFusionConfig() if cfg is None else cfg
    if not isinstance(cfg, FrameFusionConfig):
        raise ConfigError(f"cfg = {cfg!r} is not valid: a FrameFusionConfig", "cfg")
    return install(model, cfg, None, layout, OWNER)


@contextmanager
def applied(
    model: nn.Module,
    cfg: FrameFusionConfig | None = None,
    *,
    layout: TokenLayout | LayoutResolver | None = None,
) -> Iterator[FrameFusionHandle]:
    """`apply` for the duration of a `with` block; raises what `apply` raises."""
    with apply(model, cfg, layout=layout) as handle:
        yield handle


def install(
    model: nn.Module,
    cfg: FrameFusionConfig,
    strategy: Strategy | None,
    layout: TokenLayout | LayoutResolver | None,
    owner: str,
) -> FrameFusionHandle:
    """Put a way of reducing tokens on a model; `strategy` None is FrameFusion. Raises what `apply` raises."""
    view = DecoderView.of(model)
    inner = view.root.get_submodule(view.name.rpartition(".")[0])
    resolver = find_resolver(inner)
    if callable(layout) and not isinstance(layout, TokenLayout):
        function = layout
        resolver, layout = (lambda model, config, inputs: function(inputs)), None
    if isinstance(layout, TokenLayout):
        layout.check()
    elif resolver is None:
        raise UnsupportedModelError.unknown(
            inner,
            RESOLVERS,
            "To use another model, say where its videos are: apply(model, cfg, layout=TokenLayout.from_blocks(...)).",
        )
    base = str(view.config._attn_implementation)
    _check_model(view, base)
    if base == "flex_attention":
        raise NotImplementedError(
            "attn_implementation = 'flex_attention' has block masks, which cannot be shortened; use 'sdpa'"
        )
    source = LayoutSource(inner, cfg, resolver, layout)
    engine = Engine(view, cfg, strategy, source, base)
    if cfg.placement == "post_attention":
        check_layers(view, engine.layers)
    with Patch(owner) as patch:
        for site in SITES:
            patch.claim(view.model, site)
        patch.on_remove(partial(setattr, engine.applied, "removed", True))
        attention, mask = interface_of(base)
        # Not named after the base: transformers would look for flash functions of any name with "flash" in it.
        patch.set_attention(view.model, OWNER, attention, mask)
        for split in engine.layers:
            patch.wrap_forward(split.layer.module, partial(engine.run_layer, split))
        patch.wrap_forward(view.model, engine.run_decoder)
        if inner is not view.model:
            patch.wrap_forward(inner, source.run_inner)
            for name in ("get_video_features", "get_image_features"):
                if hasattr(inner, name):
                    names = tuple(inspect.signature(getattr(type(inner), name)).parameters)[1:]
                    patch.wrap_method(inner, name, partial(source.run_features, names))
        if view.root is not inner and view.root is not view.model:
            patch.wrap_forward(view.root, engine.run_root)
            if hasattr(view.root, "_expand_multimodal_outputs"):
                patch.wrap_method(view.root, "_expand_multimodal_outputs", source.run_expand)
            if hasattr(view.root, "_prefill"):
                patch.wrap_method(view.root, "_prefill", source.run_prefill)
            loss: Any = view.root.loss_function
            patch.set_attribute(view.root, "_loss_function", partial(engine.run_loss, loss))
        if hasattr(view.model, "_deepstack_process"):
            patch.wrap_method(view.model, "_deepstack_process", engine.run_deepstack)
    return FrameFusionHandle(patch, engine)


def _check_model(view: DecoderView, base: str) -> None:
    shared = [layer.index for layer in view.layers if getattr(layer.attention, "is_kv_shared_layer", False)]
    if shared:
        raise UnsupportedModelError(
            f"{type(view.model).__name__}: layers {shared[0]} to {shared[-1]} reuse the keys of an earlier layer, "
            "which then holds other tokens than they do; models with num_kv_shared_layers > 0 are not supported"
        )
    windows = [layer.index for layer in view.layers if layer.sliding_window is not None]
    if windows and is_flash(base):
        raise UnsupportedModelError(
            f"attn_implementation = {base!r} counts the window of layer {windows[0]} in tokens that are present, not "
            "in positions of the sequence; use 'sdpa'"
        )
