"""`FrameFusionConfig`: every option of the method, validated before any module is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pared_hooks import Config, ConfigError

PRESETS: dict[str, dict[str, float | int]] = {
    "llava-video": {"similarity_threshold": 0.6},
    "minicpm-v": {"similarity_threshold": 0.7},
    "nvila": {"similarity_threshold": 0.7},
    "qwen2-vl": {"similarity_threshold": 0.5, "importance_queries": 4},
    "internvl": {"similarity_threshold": 0.5},
}
"""Hyperparameters of the published code, by model family; cost and floor are 0.3 and 0.1 for all."""


@dataclass(frozen=True)
class FrameFusionConfig(Config):
    """Options of FrameFusion. Raises `ConfigError` (a `ValueError`) naming the field, its value and what is valid."""

    cost: float = 0.3
    """Vision tokens present, averaged over the LLM's layers, as a share of all; in (0, 1]. 0.3 drops 70 %."""
    similarity_threshold: float = 0.6
    """Cosine similarity from which a token is merged into its predecessor, in [-1, 1]; depends on the model family."""
    merge_floor: float = 0.1
    """Merging ends when a stage merges less than this share of the tokens, in [0, 1]; 0 never ends it."""
    budget_layers: int | None = None
    """Number of layers the cost is averaged over; None is the model's depth, 28 what the published code assumes."""
    importance_queries: int = 1
    """Last queries whose attention is the importance; the published code has 4 for Qwen2-VL, else 1."""
    prune_scope: Literal["vision", "span"] = "vision"
    """What competes in pruning: vision tokens, or (published code) everything from the first to the last of them."""
    average: Literal["plain", "weighted"] = "plain"
    """A merge is a plain mean of tokens (published code), or weighted by how many each stands for."""
    on_budget: Literal["force", "error"] = "force"
    """When another stage would overdraw the budget: prune at once to what is left, or raise `BudgetError`."""
    min_keep: int = 1
    """Vision tokens of every video that pruning leaves at least."""
    min_vision_tokens: int = 0
    """Sequences with fewer vision tokens stay dense."""
    image_streams: Literal["auto", "always", "never"] = "auto"
    """Which images of equal size count as the frames of a video: where the family shows videos so, all, or none."""
    placement: Literal["post_attention", "layer_input"] = "post_attention"
    """Stages run before the MLP (published), or at the input of the next layer, which any layer class allows."""
    merge_ratios: tuple[float, ...] | None = None
    """Fixed share to merge at each of the first stages, in place of threshold and floor; counts depend on N alone."""
    importance_dtype: Literal["float32", "model"] = "float32"
    """Precision of the importance's inner products; the softmax is always float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 < self.cost <= 1, "cost", self.cost, "a share in (0, 1]")
        self.check(
            -1 <= self.similarity_threshold <= 1, "similarity_threshold", self.similarity_threshold, "a cosine, -1 to 1"
        )
        self.check(0 <= self.merge_floor <= 1, "merge_floor", self.merge_floor, "a share, 0 to 1")
        layers = self.budget_layers
        self.check(layers is None or layers >= 1, "budget_layers", layers, "None or at least 1")
        self.check(self.importance_queries >= 1, "importance_queries", self.importance_queries, "at least 1")
        self.check(self.min_keep >= 0, "min_keep", self.min_keep, "at least 0")
        self.check(self.min_vision_tokens >= 0, "min_vision_tokens", self.min_vision_tokens, "at least 0")
        ratios = self.merge_ratios
        self.check(
            ratios is None or (len(ratios) > 0 and all(0 <= one < 1 for one in ratios)),
            "merge_ratios",
            ratios,
            "None, or shares in [0, 1), one for each of the first stages",
        )

    @classmethod
    def preset(cls, name: str) -> FrameFusionConfig:
        """The published hyperparameters of a model family: one of `PRESETS`. Raises `ConfigError` for another name."""
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is not valid: one of {', '.join(PRESETS)}", "name")
        return cls().replace(**PRESETS[name])
