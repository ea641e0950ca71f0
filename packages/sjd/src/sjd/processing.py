"""Which distribution a list of logits processors stands for, at every position of a window."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pared_hooks import ConfigError
from torch import Tensor
from transformers.generation import LogitsProcessor

from sjd.functional.processing import guide, masked, process_rows, with_forced

# What looks at one row of scores alone, so that all rows of a window may go through it at once.
ROW_WISE = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "LogitNormalization",
    "InfNanRemoveLogitsProcessor",
)
# The same, but it names tokens of the whole vocabulary.
ROW_WISE_BY_ID = ("SuppressTokensLogitsProcessor",)
# Their state advances with every call, and a window calls them for guesses too.
REFUSED = {
    "SynthIDTextWatermarkLogitsProcessor": "its state advances with every call",
    "ClassifierFreeGuidanceLogitsProcessor": "pass guidance_scale to generate instead",
    "DiaClassifierFreeGuidanceLogitsProcessor": "pass guidance_scale to generate instead",
    "AlternatingCodebooksLogitsProcessor": "it is for audio",
    "WhisperTimeStampLogitsProcessor": "it is for speech recognition",
    "WhisperNoSpeechDetection": "it runs the model itself",
}
GUIDANCE = "UnbatchedClassifierFreeGuidanceLogitsProcessor"
Prefix = Callable[[int], list[tuple[Tensor, list[int]]]]
"""For a place of the window: token tensors (B, n), and the rows of the batch each of them is right for."""


@dataclass
class Guidance:
    """Scale s of u + s (c - u), and the unconditional prompt (B, P) with its mask, None for the adapter's own."""

    scale: float
    ids: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class Processing:
    """What turns logits into probabilities.

    Temperature, top-k and top-p in this order, and nothing else, are `plain`: they then run fused, on the columns that
    are needed. Any other list runs as it is, in its own order.
    """

    guidance: Guidance | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    others: tuple[LogitsProcessor, ...] = ()

    @classmethod
    def of(cls, processors: Any) -> Processing:
        """Read a `LogitsProcessorList`.

        Raises `ConfigError` for a processor that cannot work on a window, or guidance that is not the first.
        """
        guidance, rest = None, list(processors or ())
        for place, processor in enumerate(rest):
            name = type(processor).__name__
            if name in REFUSED:
                raise ConfigError(
                    f"logits_processor {name} cannot be used with sjd: {REFUSED[name]}", "logits_processor"
                )
            if name == GUIDANCE and place:
                raise ConfigError(f"logits_processor {name} must come first, it is number {place}", "logits_processor")
        if rest and type(rest[0]).__name__ == GUIDANCE:
            first = rest.pop(0)
            context = first.unconditional_context
            guidance = Guidance(float(first.guidance_scale), context["input_ids"], context["attention_mask"])
        made = cls(guidance)
        names = [type(processor).__name__ for processor in rest]
        order = ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"]
        if names != [name for name in order if name in names]:
            made.others = tuple(rest)
            made._warn()
            return made
        for processor in rest:
            name = type(processor).__name__
            if getattr(processor, "filter_value", -torch.inf) != -torch.inf:
                made.others = tuple(rest)
            elif name == "TemperatureLogitsWarper":
                made.temperature = float(processor.temperature)
            elif name == "TopKLogitsWarper":
                made.top_k = int(processor.top_k)
            else:
                made.top_p = float(processor.top_p)
        if made.top_p is not None and getattr(rest[-1], "min_tokens_to_keep", 1) > 1:
            made.others = tuple(rest)
        return made

    @property
    def plain(self) -> bool:
        """Whether temperature, top-k and top-p are all there is."""
        return not self.others

    @property
    def by_prefix(self) -> bool:
        """Whether some processor looks at the tokens in front."""
        return any(_looks_at_prefix(processor) for processor in self.others)

    @property
    def by_id(self) -> bool:
        """Whether some processor names tokens, and therefore needs the whole vocabulary."""
        return any(type(processor).__name__ not in ROW_WISE for processor in self.others)

    def scores(
        self,
        conditional: Tensor,
        unconditional: Tensor | None,
        allowed: Tensor | slice | None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Processed logits (B, K, V) of logits (B, K, V), by the processors as they are."""
        scores = conditional
        if self.guidance is not None and unconditional is not None:
            # As transformers combines them; what follows may not be indifferent to a constant.
            scores = guide(scores.log_softmax(-1), unconditional.log_softmax(-1), self.guidance.scale)
        if allowed is not None:
            scores = masked(scores, allowed)
        for processor in self.others:
            if _looks_at_prefix(processor):
                assert prefix is not None
                scores = _by_prefix(processor, scores, prefix)
            else:
                flat = scores.flatten(0, 1)
                scores = processor(flat.new_zeros(len(flat), 1, dtype=torch.int64), flat).view_as(scores)
        return scores

    def probs(
        self, conditional: Tensor, unconditional: Tensor | None, allowed: Tensor | slice | None, forced: Tensor | None
    ) -> Tensor:
        """Distributions (B, K, V) for a plain list; `forced` (B, K) column of the rows that are certain, or -1."""
        rows, width, columns = conditional.shape
        guidance = None
        if self.guidance is not None and unconditional is not None:
            guidance = (self.guidance.scale, unconditional.reshape(-1, columns))
        probs = process_rows(
            conditional.reshape(-1, columns),
            guidance=guidance,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            allowed=allowed,
            forced=None if forced is None else forced.reshape(-1),
        )
        return probs.view(rows, width, columns)

    def target(
        self,
        conditional: Tensor,
        unconditional: Tensor | None,
        allowed: Tensor | slice | None,
        forced: Tensor | None,
        prefix: Prefix | None = None,
        greedy: bool = False,
    ) -> Tensor:
        """What a `Window` takes: distributions (B, K, V), or for greedy decoding scores of the same order."""
        if self.plain and not greedy:
            return self.probs(conditional, unconditional, allowed, forced)
        scores = self.scores(conditional, unconditional, allowed, prefix)
        if not greedy:
            probs = scores.softmax(-1)
            return probs if forced is None else with_forced(probs, forced)
        # Two logits may be different and their probabilities equal: greedy decoding needs the logits.
        if forced is None:
            return scores
        certain = torch.full_like(scores[:1, :1], -torch.inf)
        certain[..., 0] = 0.0
        return torch.where((forced >= 0)[..., None], certain, scores)

    def _warn(self) -> None:
        slow = sorted({type(one).__name__ for one in self.others if _looks_at_prefix(one)})
        if slow:
            warnings.warn(
                f"{', '.join(slow)}: called once for each position of the window, with the tokens in front of it, "
                "which is slow; a processor that keeps state between calls would see guesses among them",
                stacklevel=4,
            )


def _looks_at_prefix(processor: Any) -> bool:
    return type(processor).__name__ not in (*ROW_WISE, *ROW_WISE_BY_ID)


def _by_prefix(processor: LogitsProcessor, scores: Tensor, prefix: Prefix) -> Tensor:
    """Call the processor for each place with the batch it expects, and keep the rows whose prefix was right."""
    out = scores.clone()
    for place in range(scores.shape[1]):
        for ids, rows in prefix(place):
            found = processor(ids, scores[:, place].clone())
            out[rows, place] = found[rows].to(out.dtype)
    return out
