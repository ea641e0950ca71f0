"""`SJDConfig`: every option of the method, validated when it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pared_hooks import Config, ConfigError

WINDOWS = (7, 15, 31, 63)
"""What `window="auto"` chooses from."""


@dataclass(frozen=True)
class SJDConfig(Config):
    """Options of speculative Jacobi decoding. Every combination keeps the law of the output, but for `relax` above 0.

    Raises `ConfigError` (a ValueError) naming the field, its value and what is valid.
    """

    window: int | Literal["auto"] = 31
    """Drafts per pass, 1 to 256; "auto" chooses among 7, 15, 31 and 63 by the tokens per second of earlier images."""
    verify: Literal["speculative", "match"] = "speculative"
    """A draft is accepted with probability min(1, p / q), or if it is the token that plain sampling would draw from the
    same noise: the output is then a function of the seed alone."""
    refresh: Literal["independent", "maximal", "gumbel"] = "maximal"
    """How drafts behind the first rejection are renewed: drawn anew (paper), tested and resampled one by one, or drawn
    with noise that is fixed for a position."""
    init: Literal["random", "uniform", "left", "above", "left_sample", "above_sample", "auto"] = "auto"
    """First guesses for positions that no pass has seen; "auto" is "above", and "left" in the first row or without
    rows."""
    seed: int | None = None
    """Of the noise of `verify="match"` and `refresh="gumbel"`; None draws one from the generator."""
    guidance_batch: Literal["joint", "sequential"] = "joint"
    """Conditional and unconditional rows in one forward pass, or in two of half the size."""
    vocab_slice: Literal["auto", "off"] = "auto"
    """Compute logits of the image tokens alone where they are contiguous."""
    prob_dtype: Literal["float32", "float64"] = "float32"
    """Of the stored distributions; ratios of half precision ones would not keep the law."""
    cache: Literal["ragged", "dynamic"] = "ragged"
    """Fixed buffers with rows of their own length, or transformers' `DynamicCache`, for one row."""
    relax: float = 0.0
    """Lossy above 0: a draft x is accepted with min(1, sum of p over N(x) / q(x)), N(x) its nearest codebook entries
    whose added mass stays within this."""
    compile: Literal["off", "reduce-overhead", "max-autotune"] = "off"
    """Mode of `torch.compile` for the passes behind the prompt."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of the test and resampling; "auto" takes the kernels on a GPU where they apply."""
    stop_margin: int = 0
    """Positions at the end that are decoded one by one, to compare with implementations that need it."""

    def __post_init__(self) -> None:
        valid = "window must be 1..256, or 'auto'"
        # Before the annotations are looked at, so that every wrong window gets the same message.
        window = self.window
        fits = window == "auto" or (isinstance(window, int) and not isinstance(window, bool) and 1 <= window <= 256)
        if not fits:
            raise ConfigError(f"SJDConfig.window = {window!r} is not valid: {valid}", "window")
        super().__post_init__()
        self.check(self.seed is None or 0 <= self.seed < 2**64, "seed", self.seed, "None or 0 <= seed < 2**64")
        self.check(0 <= self.relax < 1, "relax", self.relax, "0 <= relax < 1")
        self.check(self.stop_margin >= 0, "stop_margin", self.stop_margin, "at least 0")
        if self.verify == "match":
            self.check(self.relax == 0, "relax", self.relax, "0 with verify='match', which compares tokens")


def preset(name: str) -> SJDConfig:
    """Return the configuration called `name`.

    "paper": a window of 16 rows, of which 15 are drafts, random guesses, independent refresh. Raises `ConfigError` for
    another name.
    """
    if name != "paper":
        raise ConfigError(f"preset {name!r} does not exist; valid: 'paper'", "name")
    return SJDConfig(window=15, refresh="independent", init="random", cache="dynamic")
