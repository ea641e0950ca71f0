"""Ways to keep a cache small: as the caches that are left of a prompt, and as the logits of a text decoded so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cskv.apply import applied
from cskv.bench.peers import SINKS
from cskv.bench.prompts import ReadPrompt, continued
from cskv.config import CSKVConfig
from cskv.evaluate import Logits
from cskv.factors import Factors
from cskv.functional import split_heads
from cskv.plan import plan_layers

Keep = Callable[[Any, ReadPrompt], Cache]
"""(model, prompt): the cache that is left of the prompt."""

Method = AbstractContextManager[Keep]
"""What has to be done to the model while such caches are in use."""


@contextmanager
def plainly(keep: Keep) -> Iterator[Keep]:
    """Caches of a model as it is."""
    yield keep


@contextmanager
def with_cskv(model: Any, config: CSKVConfig, factors: Factors) -> Iterator[Keep]:
    """Caches of cskv, applied to `model`."""
    with applied(model, config, factors) as handle:
        yield lambda _, prompt: prompt.fill(handle.new_cache())


def dropped_tokens(model: Any, share: float) -> Logits:
    """The first tokens and the latest ones alone, `share` of all tokens together (as StreamingLLM keeps them)."""

    def logits(ids: Tensor, prefix: int) -> Tensor:
        tokens = ids.shape[1]
        rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)
        recent = (share * (rows + 1)).ceil().clamp(min=SINKS + 1) - SINKS
        kept = (columns < SINKS) | (columns > rows - recent) | (rows < prefix)
        hidden = ~(kept & (columns <= rows))
        mask = torch.zeros(1, 1, tokens, tokens).masked_fill(hidden, torch.finfo(torch.float32).min)
        return model(ids, attention_mask=mask.to(model.device, model.dtype), use_cache=False).logits

    return logits


def passkey_accuracy(model: Any, method: Method, prompts: Sequence[tuple[ReadPrompt, Tensor]]) -> tuple[float, float]:
    """Share of passkeys (prompt, answer (1, n)), and of their tokens, that greedy decoding gives.

    Equal to teacher-forced argmax. Raises ValueError without prompts.
    """
    if not prompts:
        raise ValueError("there are no prompts to judge by")
    with method as keep:
        hits = [
            continued(model, keep(model, prompt), prompt, answer).argmax(-1) == answer[0] for prompt, answer in prompts
        ]
    return sum(bool(one.all()) for one in hits) / len(hits), float(torch.cat(hits).double().mean())


@torch.no_grad()
def relative_errors(
    model: Any, config: CSKVConfig, factors: Factors, texts: Sequence[ReadPrompt]
) -> tuple[float, float]:
    """Mean over layers of |K - K_hat|^2 / |K|^2 and |V - V_hat|^2 / |V|^2 on `texts`, before any quantisation."""
    _, plans = plan_layers(model, config)
    shares: dict[str, list[float]] = {"k": [], "v": []}
    for plan in plans:
        for side, (weight, bias) in zip("kv", plan.adapter.maps(), strict=True):
            a, b = factors[plan.index].side(side)
            lost = kept = 0.0
            for text in texts:
                x = text.inputs[plan.index]
                exact = torch.nn.functional.linear(x, weight, bias)
                rebuilt = exact if a is None or b is None else torch.nn.functional.linear(x @ a.T.to(x), b.to(x), bias)
                if side == "k" and plan.adapter.key_norm is not None:
                    exact, rebuilt = (
                        split_heads(plan.adapter.norm_keys(one), plan.adapter.num_kv_heads) for one in (exact, rebuilt)
                    )
                lost += float((exact - rebuilt).double().square().sum())
                kept += float(exact.double().square().sum())
            shares[side].append(lost / kept)
    return sum(shares["k"]) / len(plans), sum(shares["v"]) / len(plans)
