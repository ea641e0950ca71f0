"""cskv beside other ways to shrink a cache, at equal bytes: how a text goes on behind a prompt that was compressed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pared_bench import BenchContext, Record
from torch import Tensor
from transformers.cache_utils import Cache

from cskv.apply import applied
from cskv.bench import peers
from cskv.bench.memory import tensor_bytes
from cskv.bench.quality import Study
from cskv.config import CSKVConfig
from cskv.fit import fit

CONTINUED = 128
"""Tokens that are scored behind each prompt. In every cache but cskv's, whose window is shorter, they stay exact."""

DENSITIES = ((0.5, 1.0), (0.25, 0.5), (0.2, 0.2))
"""Keys and values. The first leaves values alone, as ThinK does; the second is the default; the third the paper's."""


@dataclass(frozen=True)
class Arm:
    """A way to keep a prompt: `read` makes the cache, of a model that cskv is applied to when there is a `config`.

    `share`: that of a full cache's bytes, where it cannot be measured.
    """

    name: str
    read: Callable[[Any, Tensor], Cache]
    config: CSKVConfig | None = None
    share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Found:
    """What an arm left of quality, and the bytes it took: those measured as a share of the full cache's."""

    perplexity: float
    passkeys: tuple[float, float] | None
    share: float


def run(context: BenchContext, study: Study) -> list[Record]:
    """Quality and measured bytes of every cache; other methods get as many tokens or channels as cskv's bytes buy."""
    settings = {**study.settings("equal bytes"), "scored_tokens": len(study.texts) * CONTINUED}
    judge = Judge.of(study)
    missing = peers.missing_peers()
    records: list[Record] = []

    def add(arm: Arm, budget: str) -> Found:
        found, variant = judge(arm), {**settings, "budget": budget}
        values = {"perplexity": found.perplexity, "share of the full cache": found.share}
        if found.passkeys is not None:
            values |= dict(zip(("passkey", "passkey tokens"), found.passkeys, strict=True))
        records.extend(
            Record("cskv", arm.name, name, value, "", variant, note=arm.note) for name, value in values.items()
        )
        return found

    add(Arm("full cache", peers.full), "all")
    for k_density, v_density in context.track(DENSITIES, "equal bytes"):
        budget = f"k {k_density:g}, v {v_density:g}"
        config = CSKVConfig(k_density=k_density, v_density=v_density)
        share = add(Arm("cskv", peers.full, config), budget).share
        for init in ("asvd", "svd"):
            add(Arm(f"cskv with factors of {init}", peers.full, config.replace(init=init)), budget)
        for arm in _without_factors(share, peers.KVPRESS not in missing):
            add(arm, budget)
    for bits in (4, 2):
        add(Arm("cskv", peers.full, CSKVConfig(k_bits=bits, v_bits=bits)), f"int{bits}")
        if peers.QUANTIZED not in missing:
            add(Arm(peers.QUANTIZED, partial(peers.quantized, bits=bits)), f"int{bits}")
    return records + [
        Record("cskv", name, "perplexity", None, "", settings, note=reason) for name, reason in missing.items()
    ]


def _without_factors(share: float, kvpress: bool) -> list[Arm]:
    """Methods without factors that keep `share` of the bytes: fewer tokens, fewer key channels, or both."""
    arms = [Arm("4 first and latest tokens", partial(peers.first_and_latest, share=share))]
    if not kvpress:
        return arms
    from kvpress import SnapKVPress, ThinKPress

    arms.append(Arm("SnapKV (kvpress)", partial(peers.pressed, presses=[SnapKVPress(compression_ratio=1 - share)])))
    # Keys are half of the bytes. kvpress writes zeros where ThinK drops a channel.
    note = "kvpress zeroes the channels that ThinK drops; the share counts them as gone"
    if share > 0.5:
        press = ThinKPress(key_channel_compression_ratio=2 * (1 - share))
        arms.append(Arm("ThinK (kvpress)", partial(peers.pressed, presses=[press]), None, share, note))
    if share < 0.75:
        presses = [SnapKVPress(compression_ratio=1 - share / 0.75), ThinKPress(key_channel_compression_ratio=0.5)]
        arms.append(Arm("SnapKV and ThinK (kvpress)", partial(peers.pressed, presses=presses), None, share, note))
    return arms


@dataclass(frozen=True)
class Judge:
    """Scores an arm on held-out text and passkeys in float32, and measures its bytes in bfloat16."""

    study: Study
    light: Any
    full_bytes: int

    @classmethod
    def of(cls, study: Study) -> Judge:
        """Caches are mostly kept in 16 bits: a copy of the model in bfloat16 makes those whose bytes are counted."""
        light = copy.deepcopy(study.model).to(torch.bfloat16)
        judge = cls(study, light, 0)
        return replace(judge, full_bytes=tensor_bytes(peers.full(light, judge.measured)))

    @property
    def measured(self) -> Tensor:
        """The prompt whose cache is measured."""
        return self.study.texts[0][:, : -CONTINUED - 1]

    def __call__(self, arm: Arm) -> Found:
        """What `arm` keeps of quality and takes in bytes."""
        with self._with(self.study.model, arm):
            perplexity, passkeys = self._perplexity(arm), self._passkeys(arm)
        return Found(perplexity, passkeys, self._share(arm) if arm.share is None else arm.share)

    def _with(self, model: Any, arm: Arm) -> AbstractContextManager[Any]:
        if arm.config is None:
            return nullcontext()
        return applied(model, arm.config, fit(model, arm.config, self.study.stats))

    def _logits(self, arm: Arm, prompt: Tensor, continuation: Tensor) -> Tensor:
        """Logits that predict the continuation. The prompt's last token is already decoded, behind what was kept."""
        past = prompt.shape[1] - 1
        cache = arm.read(self.study.model, prompt[:, :past])
        return peers.continued(self.study.model, cache, past, torch.cat((prompt[:, past:], continuation), 1)[:, :-1])

    def _perplexity(self, arm: Arm) -> float:
        total, count = 0.0, 0
        for ids in self.study.texts:
            prompt, continuation = ids[:, :-CONTINUED], ids[:, -CONTINUED:]
            logits = self._logits(arm, prompt, continuation).float()
            total += float(torch.nn.functional.cross_entropy(logits, continuation[0], reduction="sum"))
            count += continuation.shape[1]
        return math.exp(total / count)

    def _passkeys(self, arm: Arm) -> tuple[float, float] | None:
        """Share of passkeys that come out whole, and of their tokens; None without prompts."""
        prompts = self.study.prompts
        if not prompts:
            return None
        hits = [self._logits(arm, one.prompt, one.answer).argmax(-1) == one.answer[0] for one in prompts]
        return sum(bool(one.all()) for one in hits) / len(hits), float(torch.cat(hits).double().mean())

    def _share(self, arm: Arm) -> float:
        with self._with(self.light, arm):
            return tensor_bytes(arm.read(self.light, self.measured)) / self.full_bytes
