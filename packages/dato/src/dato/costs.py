"""FLOPs of a denoiser call by depth and pruning ratio, counted on meta tensors: no weights, no data, no GPU."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from pared_hooks import UnsupportedModelError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dato.adapters.example_inputs import example_inputs
from dato.adapters.unet_units import enumerate_units
from dato.config import DaToConfig
from dato.functional import FULL, prune_count

TEXT_TOKENS = 77
"""Text tokens of the CLIP encoders of Stable Diffusion."""


@dataclass(frozen=True)
class AttentionCost:
    """FLOPs of one self-attention module at one call, all tokens attending."""

    name: str
    unit: int
    """Unit it belongs to; a call of depth k runs it when `unit < k`."""
    batch: int
    grid: tuple[int, int]
    """Token grid `(h, w)`."""
    channels: int
    """Channels of the tokens that matching compares."""
    text_tokens: int
    """Tokens of joint attention that are never pruned; 0 for self-attention over the image alone."""
    linear: float
    """FLOPs of the projections, proportional to the tokens."""
    quadratic: float
    """FLOPs of the two token-by-token products."""
    downsample: int = 1
    """Side of the latent (of the patch grid for a DiT) divided by the side of the token grid."""
    plans: bool = True
    """False for a module that uses the token plan of the module before it in the same block."""

    @property
    def num_tokens(self) -> int:
        """Image tokens N."""
        return self.grid[0] * self.grid[1]

    @property
    def total(self) -> float:
        """FLOPs with all tokens."""
        return self.linear + self.quadratic

    def kept(self, num_kept: int) -> float:
        """FLOPs with `num_kept` image tokens."""
        share = (num_kept + self.text_tokens) / (self.num_tokens + self.text_tokens)
        return self.linear * share + self.quadratic * share**2


@dataclass(frozen=True)
class CallCost:
    """FLOPs of one denoiser call: `computed` without pruning, less what pruning `saved`, plus `matching`."""

    computed: float
    saved: float = 0.0
    matching: float = 0.0

    @property
    def total(self) -> float:
        """FLOPs that the call takes."""
        return self.computed - self.saved + self.matching


@dataclass(frozen=True)
class UnitCosts:
    """FLOPs of every kind of call of one denoiser at one sample shape, under one configuration of pruning."""

    full: float
    """FLOPs of a call that computes everything and prunes nothing."""
    depth: tuple[float, ...]
    """`depth[k]`: FLOPs of a call of depth k without pruning, for k = 0..L; `depth[0]` is 0."""
    attention: tuple[AttentionCost, ...]
    """Self-attention modules in the order they run."""
    config: DaToConfig = field(default_factory=DaToConfig)
    """Which attention is pruned, and how its matching is done; the policy in it is not used."""

    @property
    def num_units(self) -> int:
        """Number L of units: the largest depth."""
        return len(self.depth) - 1

    def call(self, depth: int, ratio: float = 0.0) -> CallCost:
        """FLOPs of a call of `depth` that prunes `ratio` of the tokens. Raises `ValueError` for an unknown depth."""
        if not FULL <= depth <= self.num_units:
            raise ValueError(f"depth={depth} is outside -1..{self.num_units}")
        if depth == 0:
            return CallCost(0.0)
        saved = matching = 0.0
        shared: set[tuple[int, int]] = set()
        for attention in self.attention:
            if depth != FULL and attention.unit >= depth:
                continue
            num_prune = self.num_prune(attention, ratio)
            if num_prune == 0:
                continue
            saved += attention.total - attention.kept(attention.num_tokens - num_prune)
            if attention.plans and not (self.config.share_match and attention.grid in shared):
                matching += self.matching(attention, num_prune) / self.config.reuse_match
                shared.add(attention.grid)
        return CallCost(self.full if depth == FULL else self.depth[depth], saved, matching)

    def num_prune(self, attention: AttentionCost, ratio: float) -> int:
        """Number R of tokens that `attention` prunes at `ratio`."""
        if attention.downsample > self.config.max_downsample or attention.num_tokens < self.config.min_tokens:
            return 0
        return prune_count(
            attention.num_tokens, ratio, num_base=self._num_base(attention), kept_multiple=self.config.kept_multiple
        )

    def matching(self, attention: AttentionCost, num_prune: int) -> float:
        """FLOPs of the similarities: candidates x base tokens, and pruned x kept tokens with `recover="kept"`."""
        num_tokens, num_base = attention.num_tokens, self._num_base(attention)
        pairs = (num_tokens - num_base) * num_base
        if self.config.recover == "kept":
            pairs += num_prune * (num_tokens - num_prune)
        return 2.0 * attention.batch * pairs * attention.channels

    def _num_base(self, attention: AttentionCost) -> int:
        return (attention.grid[0] // self.config.patch[0]) * (attention.grid[1] // self.config.patch[1])


def unit_costs(
    model: Any, sample_shape: tuple[int, ...], config: DaToConfig | None = None, *, text_tokens: int = TEXT_TOKENS
) -> UnitCosts:
    """Count the FLOPs of `model` at a sample of `sample_shape = (B, C, H, W)`, guidance samples included in B.

    Counts a copy of the model's configuration on the meta device; the model itself is not touched.
    Raises `UnsupportedModelError` for a class that dato cannot patch, `ValueError` for a wrong shape.
    """
    if len(sample_shape) != 4:
        raise ValueError(f"sample_shape={tuple(sample_shape)} needs four numbers: samples, channels, height, width")
    copy = model_on_meta(type(model), model.config)
    counted = _unet_modules(copy) if hasattr(copy, "down_blocks") else _transformer_modules(copy)
    meter = _Meter()
    for module, unit in counted.units:
        meter.count(module, unit)
    for attention in counted.attention:
        meter.count(attention.module, attention.name)
    with torch.no_grad(), meter.counter:
        copy(**example_inputs(copy, tuple(sample_shape), text_tokens))

    full = float(meter.counter.get_total_flops())
    units = [meter.flops[unit] for unit in range(counted.num_units + 1)]
    outside = full - sum(units)
    depth = (0.0, *(outside + sum(units[:k]) for k in range(1, counted.num_units + 1)))
    patch_size = getattr(copy.config, "patch_size", None) or 1
    size = (sample_shape[2] // patch_size, sample_shape[3] // patch_size)
    attention_costs = tuple(_attention_cost(attention, meter, size, text_tokens) for attention in counted.attention)
    return UnitCosts(full, depth, attention_costs, config or DaToConfig())


def model_on_meta(cls: Any, config: Any) -> Any:
    """A model of a diffusers class built from its configuration on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return cls.from_config(dict(config)).eval()


@dataclass(frozen=True)
class _Attention:
    """A self-attention module to count; the fields mean what they do in `AttentionCost`."""

    name: str
    module: Any
    unit: int
    downsample: int = 1
    plans: bool = True


@dataclass(frozen=True)
class _Counted:
    """Modules to count: those of units, with the unit's index, and those of self-attention."""

    num_units: int
    units: list[tuple[nn.Module, int]]
    attention: list[_Attention]


class _Meter:
    """FLOPs by key, summed over the calls of the modules counted under it."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)
        self.flops: defaultdict[Any, float] = defaultdict(float)
        self.shapes: dict[Any, tuple[int, ...]] = {}

    def count(self, module: nn.Module, key: Any) -> None:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.flops[key] -= self.counter.get_total_flops()
            hidden_states = args[0] if args else kwargs["hidden_states"]
            self.shapes[key] = tuple(hidden_states.shape)

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            self.flops[key] += self.counter.get_total_flops()

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)


def _unet_modules(unet: Any) -> _Counted:
    units = enumerate_units(unet)
    attention = [
        _Attention(f"{block.name}.attn1", block.module.attn1, block.unit, block.downsample)  # type: ignore[union-attr]
        for block in units.blocks
    ]
    return _Counted(units.num_units, list(units.modules()), attention)


def _transformer_modules(model: Any) -> _Counted:
    """The stack of a DiT: unit k is block k, and nothing is deeper than the last."""
    attention = []
    for index, block in enumerate(model.transformer_blocks):
        names = ("attn1",) if hasattr(block, "attn1") else ("attn", "attn2")
        present = [name for name in names if getattr(block, name) is not None]
        attention += [
            _Attention(f"transformer_blocks.{index}.{name}", getattr(block, name), index, plans=name == present[0])
            for name in present
        ]
    return _Counted(
        len(model.transformer_blocks),
        [(block, index) for index, block in enumerate(model.transformer_blocks)],
        attention,
    )


def _attention_cost(attention: _Attention, meter: _Meter, size: tuple[int, int], text_tokens: int) -> AttentionCost:
    batch, num_tokens, channels = meter.shapes[attention.name]
    # Stride-2 convolutions round an odd side up.
    grid = (-(-size[0] // attention.downsample), -(-size[1] // attention.downsample))
    if grid[0] * grid[1] != num_tokens:
        raise UnsupportedModelError(f"{attention.name} attends over {num_tokens} tokens, not over a grid of {grid}")
    is_joint = getattr(attention.module, "added_kv_proj_dim", None) is not None
    joined = text_tokens if is_joint else 0
    quadratic = 4.0 * batch * (num_tokens + joined) ** 2 * attention.module.inner_dim
    linear = meter.flops[attention.name] - quadratic
    return AttentionCost(
        attention.name,
        attention.unit,
        batch,
        grid,
        channels,
        joined,
        linear,
        quadratic,
        attention.downsample,
        attention.plans,
    )
