"""`MBQConfig`: every option of the method, validated before a model is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pared_hooks import Config

Method = Literal["mbq", "awq", "gptq", "rtn", "smoothquant", "token"]
PER_ROW = -1


@dataclass(frozen=True)
class MBQConfig(Config):
    """Options of MBQ and of the methods it is compared with.

    Raises `ConfigError` (a `ValueError`) naming the field, its value and what is valid.
    """

    w_bits: int = 3
    """Bits of a weight, 2 to 8."""
    a_bits: int = 16
    """Bits of the inputs of linear layers: 16 leaves them, 8 quantises each token as it comes."""
    group_size: int = 128
    """Input channels that share a scale; -1: one scale for each row, which the default becomes for 8-bit inputs."""
    symmetric: bool | None = None
    """Codes around zero, without a zero point; None: for 8-bit inputs alone."""
    method: Method = "mbq"
    """"mbq": errors weighted by modality. "awq": not weighted (the original with `loss="mse"`). "token": weighted by
    the gradient of each token. "gptq", "smoothquant", "rtn" (rounding alone): baselines without that search."""
    loss: Literal["mae", "mse"] = "mae"
    """Absolute or squared error of a block's output."""
    answer_positions: Literal["answer", "predicting"] = "answer"
    """Where answer tokens are weighed: at themselves, as in the paper's code, or one before, where they are predicted.

    For answers of a word or two the second is the sensible one: there little is left to predict at the answer itself.
    """
    ratio_floor: Literal["median"] | None = "median"
    """Least weight of vision tokens: the median over layers, as in the paper's code, or none."""
    vision_weight: float | None = None
    """The weight of vision tokens in every layer, in place of the measured one: 0 weighs the answer alone."""
    distort: bool = False
    """Search each layer on the outputs of the quantised layers before it."""
    grid: int = 20
    """Exponents that are tried, at least 1."""
    gqa: Literal["skip", "shared"] = "skip"
    """The output projection under grouped queries: left unscaled, or one scale for each key-value channel."""
    clip: Literal["none", "search"] = "none"
    """Search how much of each group's range to keep, after the scales (the second half of AWQ)."""
    include_zero: bool = True
    """Let every group's range hold zero; without it a group of one sign is destroyed, as in the paper's code."""
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """How scales are stored; float32 for research, it cannot be packed."""
    skip_modules: tuple[str, ...] = ("lm_head",)
    """Regular expressions found in names of linear layers that stay as they are."""
    batch_size: int = 4
    """Samples that run at once during the search; no effect on the result."""
    seed: int = 0
    """Stored with the result; the method itself draws nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(2 <= self.w_bits <= 8, "w_bits", self.w_bits, "2 to 8")
        self.check(self.a_bits in (8, 16), "a_bits", self.a_bits, "16 or 8")
        if self.a_bits == 8 and self.group_size == 128:
            object.__setattr__(self, "group_size", PER_ROW)
        self.check(
            self.group_size == PER_ROW or self.group_size >= 1, "group_size", self.group_size, "-1 or at least 1"
        )
        self.check(
            self.a_bits == 16 or self.group_size == PER_ROW, "group_size", self.group_size, "-1 for 8-bit inputs"
        )
        self.check(
            self.a_bits == 16 or self.symmetric is not False,
            "symmetric",
            self.symmetric,
            "True or None for 8-bit inputs",
        )
        self.check(self.grid >= 1, "grid", self.grid, "at least 1")
        self.check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        if self.vision_weight is not None:
            self.check(self.vision_weight >= 0, "vision_weight", self.vision_weight, "at least 0")
            self.check(self.method == "mbq", "vision_weight", self.vision_weight, "None for a method without weights")
        for pattern in self.skip_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                self.check(False, "skip_modules", pattern, f"a regular expression ({error})")
        if self.distort:
            valid = "False for a method without a search"
            self.check(self.searches, "distort", self.distort, valid)
        if self.clip == "search":
            self.check(self.searches, "clip", self.clip, "'none' for a method without a search")

    @property
    def is_symmetric(self) -> bool:
        """Whether codes are symmetric, with the default resolved."""
        return self.a_bits == 8 if self.symmetric is None else self.symmetric

    @property
    def searches(self) -> bool:
        """Whether the method searches scales on calibration data."""
        return self.method in ("mbq", "awq", "token")

    @property
    def needs_gradients(self) -> bool:
        """Whether the method weighs errors by gradients."""
        return self.method == "token" or (self.method == "mbq" and self.vision_weight is None)

    @property
    def needs_answers(self) -> bool:
        """Whether the method has to know which tokens are the answer."""
        return self.method in ("mbq", "token")

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """`scale_dtype` as torch has it."""
        dtype: Any = getattr(torch, self.scale_dtype)
        return dtype

    @property
    def calibration_fields(self) -> dict[str, Any]:
        """The fields that a calibration result depends on."""
        return {name: value for name, value in self.to_dict().items() if name not in ("batch_size", "seed")}
