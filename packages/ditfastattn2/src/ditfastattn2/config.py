"""What a calibration may choose from, and how far a plan may go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pared_hooks import Config

from ditfastattn2.functional import BACKENDS
from ditfastattn2.methods import Method, parse

BLOCK_SIZES = (16, 32, 64, 128, 256)
CACHE_DTYPES = (None, "float32", "float16", "bfloat16", "float8_e4m3fn")
CACHE_DEVICES = ("same", "cpu")


@dataclass(frozen=True)
class DiTFastAttnV2Config(Config):
    """Choices of DiTFastAttnV2 (arXiv 2503.22796, sections 3.1 and 3.3).

    delta: bound on the sum of relative squared errors of the heads of one layer at one step.
    coef: a head may use up `coef * delta / heads` of it at most; None: all. 1.5 for images, 1.0 for video.
    methods: what a head may do beside full attention: "cached", "arrow:1/8", and for video "reorder_arrow:1/8"; with
        "+cfg" half of a guidance batch is computed, with "+residual" it adds what it lacked at a full step.
    first_full_steps, last_full_steps: steps that are computed in full everywhere.
    min_cache_steps: runs of fewer steps do not reuse outputs, their steps are too far apart.
    dense_above: layers that would still compute more than this share of their attention are computed in full. It is the
        density above which the dense kernel of a GPU is faster; `pared bench ditfastattn2` measures it.
    block: rows and columns that the kernel computes as a whole; powers of two from 16 to 256.
    exact_mask: take arrows element by element and not in blocks: a little fewer pairs, a slower kernel.
    cache_dtype: type of cached outputs, such as "float8_e4m3fn"; None keeps that of the model.
    cache_device: "same" or "cpu".
    skip_projections: leave out queries, keys and values of a layer whose heads are all cached.
    backend: "triton", "flex", "sdpa", or "auto" for the fused kernel where it runs.

    Raises `ConfigError`, a `ValueError`, for what is not valid.
    """

    schema: ClassVar[str | None] = "pared.dfa2.config/1"

    delta: float = 0.6
    coef: float | None = 1.5
    methods: tuple[str, ...] = ("cached", "arrow:1/8", "arrow:1/16", "arrow:1/32")
    first_full_steps: int = 1
    last_full_steps: int = 0
    min_cache_steps: int = 5
    dense_above: float = 1.0
    block: tuple[int, int] = (128, 64)
    exact_mask: bool = False
    cache_dtype: str | None = None
    cache_device: str = "same"
    skip_projections: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        finite = math.isfinite(self.delta)
        self.check(finite and self.delta >= 0, "delta", self.delta, "delta must be >= 0 and finite")
        self.check(self.coef is None or self.coef > 0, "coef", self.coef, "above 0, or None")
        self.check(bool(self.methods), "methods", self.methods, "at least one method")
        for method in self.parsed_methods():
            self.check(method.name != "full", "methods", method.name, "full attention is always a choice, leave it out")
        distinct = len(set(self.methods)) == len(self.methods)
        self.check(distinct, "methods", self.methods, "each method once")
        self.check(len(self.methods) <= 52, "methods", len(self.methods), "at most 52 methods")
        self.check(self.first_full_steps >= 1, "first_full_steps", self.first_full_steps, ">= 1, caches must exist")
        self.check(self.last_full_steps >= 0, "last_full_steps", self.last_full_steps, ">= 0")
        self.check(self.min_cache_steps >= 1, "min_cache_steps", self.min_cache_steps, ">= 1")
        self.check(0 < self.dense_above <= 1, "dense_above", self.dense_above, "above 0, at most 1")
        known = all(size in BLOCK_SIZES for size in self.block)
        self.check(known, "block", self.block, f"two of {', '.join(map(str, BLOCK_SIZES))}")
        self.check(self.cache_dtype in CACHE_DTYPES, "cache_dtype", self.cache_dtype, f"one of {CACHE_DTYPES}")
        self.check(self.cache_device in CACHE_DEVICES, "cache_device", self.cache_device, f"one of {CACHE_DEVICES}")
        self.check(self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}")

    def parsed_methods(self) -> tuple[Method, ...]:
        """The methods beside full attention, in the order of `methods`."""
        return tuple(parse(name) for name in self.methods)

    @property
    def mask_block(self) -> tuple[int, int] | None:
        """The block that attention is computed in, None for the exact mask."""
        return None if self.exact_mask else self.block
