"""Ways to keep a cache small, each as the logits it would give: CSKV, plain factors, token dropping, the full cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cskv.bench.text import Passkey
from cskv.config import CSKVConfig
from cskv.evaluate import Logits, perplexity
from cskv.factors import Factors
from cskv.functional import split_heads
from cskv.plan import plan_layers

SINKS = 4
"""First tokens that token dropping keeps, as StreamingLLM does."""


@dataclass(frozen=True)
class Quality:
    """Perplexity of the tokens behind the prompts, share of passkeys that came out whole, and of their tokens."""

    perplexity: float
    passkey: float
    passkey_tokens: float


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


@torch.no_grad()
def passkey_accuracy(logits: Logits, prompts: Sequence[Passkey]) -> tuple[float, float]:
    """Share of passkeys, and of their tokens, that greedy decoding gives; equal to teacher-forced argmax."""
    whole, right, count = 0, 0, 0
    for one in prompts:
        prefix = one.prompt.shape[1]
        rows = logits(torch.cat((one.prompt, one.answer), 1), prefix)[0, prefix - 1 : -1]
        hits = rows.argmax(-1) == one.answer[0]
        whole, right, count = whole + int(hits.all()), right + int(hits.sum()), count + hits.numel()
    return whole / len(prompts), right / count


def measure(logits: Logits, texts: Sequence[Tensor], prompts: Sequence[Passkey], prefix: int) -> Quality:
    """Both judgements of one way to keep a cache."""
    passkey = passkey_accuracy(logits, prompts) if prompts else (math.nan, math.nan)
    return Quality(perplexity(logits, texts, prefix), *passkey)


@torch.no_grad()
def relative_errors(model: Any, config: CSKVConfig, factors: Factors, texts: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over layers of |K - K_hat|^2 / |K|^2 and |V - V_hat|^2 / |V|^2 on `texts`, before any quantisation."""
    from cskv.capture import reading, run_batch

    view, plans = plan_layers(model, config)
    sums: dict[tuple[int, str], list[float]] = {}
    by_index = {plan.index: plan for plan in plans}

    def read(adapter: Any, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        for side, (weight, bias) in zip("kv", adapter.maps(), strict=True):
            a, b = factors[adapter.index].side(side)
            exact = torch.nn.functional.linear(x, weight, bias)
            rebuilt = exact if a is None or b is None else torch.nn.functional.linear(x @ a.T.to(x), b.to(x), bias)
            if side == "k" and adapter.key_norm is not None:
                exact, rebuilt = (split_heads(adapter.norm_keys(one), adapter.num_kv_heads) for one in (exact, rebuilt))
            pair = sums.setdefault((adapter.index, side), [0.0, 0.0])
            pair[0] += float((exact - rebuilt).double().square().sum())
            pair[1] += float(exact.double().square().sum())

    with reading([plan.adapter for plan in plans], read):
        for ids in texts:
            run_batch(view, ids)
    means = []
    for side in "kv":
        shares = [sums[index, side][0] / sums[index, side][1] for index in by_index]
        means.append(sum(shares) / len(shares))
    return means[0], means[1]
