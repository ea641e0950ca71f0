"""`CSKVConfig`: every option of the method, validated before any module is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pared_hooks import Config

K_DENSITY, V_DENSITY = 0.25, 0.5
BITS = (2, 4, 8)


@dataclass(frozen=True)
class CSKVConfig(Config):
    """Options of CSKV. Raises `ConfigError` (a `ValueError`) naming the field, its value and what is valid."""

    k_density: float = K_DENSITY
    """Share of the key channels that is kept, in (0, 1]; 1 keeps keys exactly, without a factor."""
    v_density: float = V_DENSITY
    """Share of the value channels that is kept, in (0, 1]; values are the sensitive side."""
    k_rank: int | tuple[int, ...] | None = None
    """Rank of the key factors, for all layers or one for each compressed layer; replaces `k_density`."""
    v_rank: int | tuple[int, ...] | None = None
    """Rank of the value factors, for all layers or one for each compressed layer; replaces `v_density`."""
    init: Literal["whiten", "asvd", "svd"] = "whiten"
    """How factors are computed: optimal for the calibration data, scaled by channel means, or of the weight alone."""
    asvd_alpha: float = 0.5
    """Exponent of the channel means for `init="asvd"`, in [0, 1]."""
    window: int = 32
    """Latest past tokens kept exactly; 0 keeps only the current one exact."""
    window_policy: Literal["sliding", "block"] = "sliding"
    """The window slides with every token (paper), or fills and empties in aligned blocks (published code)."""
    k_bits: int | None = None
    """Bits of stored key latents: 2, 4, 8 or None for the model's dtype."""
    v_bits: int | None = None
    """Bits of stored value latents: 2, 4, 8 or None for the model's dtype."""
    quant_group: int = 32
    """Consecutive tokens that are quantised together; a multiple of 8, equal to `window` for the block policy."""
    v_group: int | None = None
    """Channels that share a scale within a token's value latent; None: rank / key-value heads."""
    zero_point: Literal["affine", "clamped"] = "affine"
    """Offset of the quantiser: the group's minimum, or the published code's clamped integer."""
    layers: tuple[int, ...] | None = None
    """Full-attention layers to compress; None: all of them."""
    chunked_prefill: Literal["compressed", "exact"] = "compressed"
    """Prompts given in several calls: later chunks read compressed tokens, or all stay exact until decoding begins."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of decoding: plain torch, or fused kernels, which need CUDA and heads of 64, 128 or 256 channels.
    "auto" takes the kernels where they run, and their operators without kernels on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for side, default in (("k", K_DENSITY), ("v", V_DENSITY)):
            density, rank, bits = (getattr(self, f"{side}_{name}") for name in ("density", "rank", "bits"))
            self.check(0 < density <= 1, f"{side}_density", density, "a share in (0, 1]")
            if rank is not None:
                ranks = (rank,) if isinstance(rank, int) else rank
                valid = "a rank of at least 1, or one for each compressed layer"
                self.check(len(ranks) > 0 and all(one >= 1 for one in ranks), f"{side}_rank", rank, valid)
                self.check(
                    density == default, f"{side}_density", density, f"left at {default} when {side}_rank is given"
                )
            self.check(bits is None or bits in BITS, f"{side}_bits", bits, "None, 2, 4 or 8")
        self.check(0 <= self.asvd_alpha <= 1, "asvd_alpha", self.asvd_alpha, "a number in [0, 1]")
        self.check(self.window >= 0, "window", self.window, "at least 0")
        self.check(self.quant_group >= 8 and self.quant_group % 8 == 0, "quant_group", self.quant_group, "8, 16, 24 ..")
        self.check(self.v_group is None or self.v_group >= 1, "v_group", self.v_group, "None or at least 1")
        if self.window_policy == "block":
            self.check(self.window >= 1, "window", self.window, 'at least 1 for window_policy="block"')
            if self.k_bits is not None or self.v_bits is not None:
                valid = f'equal to window ({self.window}) for window_policy="block"'
                self.check(self.quant_group == self.window, "quant_group", self.quant_group, valid)
        if self.layers is not None:
            valid = "different layer numbers of at least 0, at least one"
            distinct = len(set(self.layers)) == len(self.layers) > 0
            self.check(distinct and min(self.layers) >= 0, "layers", self.layers, valid)
