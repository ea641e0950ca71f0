"""What will be stored for each layer: ranks and quantisers, decided before anything is computed or patched."""

from __future__ import annotations

from dataclasses import dataclass

from pared_hooks import ConfigError, DecoderView
from torch import nn

from cskv.adapters import AttentionAdapter, adapters_of
from cskv.config import CSKVConfig
from cskv.functional import rank_from_density
from cskv.storage import QuantizationPlan

FULL = "full_attention"


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """Ranks (None: kept exactly, without a factor) and quantisers (None: kept in the model's dtype) of one layer."""

    adapter: AttentionAdapter
    k_rank: int | None
    v_rank: int | None
    k_quantization: QuantizationPlan | None
    v_quantization: QuantizationPlan | None

    @property
    def index(self) -> int:
        """Number of the layer in the model."""
        return self.adapter.index

    @property
    def has_factors(self) -> bool:
        """Whether both keys and values are kept as latents of a factor."""
        return self.k_rank is not None and self.v_rank is not None

    def rank(self, side: str) -> int | None:
        """Rank of the side "k" or "v"."""
        return self.k_rank if side == "k" else self.v_rank


def plan_layers(model: nn.Module, config: CSKVConfig) -> tuple[DecoderView, list[LayerPlan]]:
    """The decoder and a plan for each layer that `config` compresses.

    Raises `ConfigError` (a `ValueError`) for a layer that is not of full attention, naming its type, for a model
    without such layers, a list of ranks of another length, or a group that does not divide the rank; and
    `UnsupportedAttentionError` for an unknown model.
    """
    view, adapters = adapters_of(model)
    chosen = _chosen(adapters, config)
    plans = []
    for place, adapter in enumerate(chosen):
        ranks = {side: _rank(config, side, place, len(chosen), adapter) for side in ("k", "v")}
        plans.append(
            LayerPlan(
                adapter,
                ranks["k"],
                ranks["v"],
                _quantization(config, "k", ranks["k"], adapter),
                _quantization(config, "v", ranks["v"], adapter),
            )
        )
    return view, plans


def _chosen(adapters: list[AttentionAdapter], config: CSKVConfig) -> list[AttentionAdapter]:
    full = [adapter for adapter in adapters if adapter.layer_type == FULL]
    if not full:
        kinds = ", ".join(sorted({adapter.layer_type for adapter in adapters}))
        raise ConfigError(f"this model has no layer of full attention to compress, only {kinds}", "layers")
    if config.layers is None:
        return full
    for index in config.layers:
        if index >= len(adapters):
            raise ConfigError(f"layers = {config.layers} is not valid: the model has {len(adapters)} layers", "layers")
        if adapters[index].layer_type != FULL:
            raise ConfigError(
                f"layers = {config.layers} is not valid: layer {index} is of type {adapters[index].layer_type!r}, "
                f"and only {FULL!r} is compressed (layers {', '.join(str(one.index) for one in full)})",
                "layers",
            )
    return [adapters[index] for index in sorted(config.layers)]


def _rank(config: CSKVConfig, side: str, place: int, layers: int, adapter: AttentionAdapter) -> int | None:
    given = config.k_rank if side == "k" else config.v_rank
    if given is None:
        density = config.k_density if side == "k" else config.v_density
        rank = rank_from_density(density, adapter.num_kv_heads, adapter.head_dim)
    elif isinstance(given, int):
        rank = given
    elif len(given) != layers:
        raise ConfigError(
            f"{side}_rank = {given} is not valid: one rank for each of the {layers} compressed layers", f"{side}_rank"
        )
    else:
        rank = given[place]
    # A factor of full rank, or one that is wider than the hidden state, could only cost.
    return None if rank >= min(adapter.width, adapter.hidden_size) else rank


def _quantization(
    config: CSKVConfig, side: str, rank: int | None, adapter: AttentionAdapter
) -> QuantizationPlan | None:
    bits = config.k_bits if side == "k" else config.v_bits
    if bits is None:
        return None
    channels = adapter.width if rank is None else rank
    if side == "k":
        return QuantizationPlan(bits, "channel", config.quant_group, channels, config.zero_point)
    group = config.v_group
    if group is None:
        if channels % adapter.num_kv_heads:
            raise ConfigError(
                f"v_group = None is not valid for rank {channels} of layer {adapter.index}: it stands for rank / "
                f"{adapter.num_kv_heads} key-value heads; give a divisor of the rank",
                "v_group",
            )
        group = channels // adapter.num_kv_heads
    if channels % group:
        raise ConfigError(
            f"v_group = {group} is not valid: a divisor of rank {channels} of layer {adapter.index}", "v_group"
        )
    return QuantizationPlan(bits, "token", config.quant_group, group, config.zero_point)
