"""cskv beside other ways to shrink a cache, at equal bytes: how a text goes on behind a prompt that was compressed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pared_bench import BenchContext, Record
from torch import Tensor

from cskv.bench import peers
from cskv.bench.arms import Keep, Method, passkey_accuracy, plainly, with_cskv
from cskv.bench.memory import tensor_bytes
from cskv.bench.prompts import ReadPrompt, continued, read
from cskv.bench.quality import Study
from cskv.config import CSKVConfig
from cskv.factors import Factors
from cskv.fit import fit

CONTINUED = 128
"""Tokens that are scored behind each prompt. In every cache but cskv's, whose window is shorter, they stay exact."""

DENSITIES = ((0.5, 1.0), (0.25, 0.5), (0.2, 0.2))
"""Keys and values. The first leaves values alone, as ThinK does; the second is the default; the third the paper's."""


@dataclass(frozen=True)
class Arm:
    """A way to keep a prompt: cskv with `factors`, or what `keep` leaves of it.

    `share`: that of a full cache's bytes, where it cannot be measured.
    """

    name: str
    keep: Keep | None = None
    config: CSKVConfig | None = None
    factors: Factors | None = None
    share: float | None = None
    note: str = ""

    def on(self, model: Any) -> Method:
        """The method on a model."""
        if self.config is not None and self.factors is not None:
            return with_cskv(model, self.config, self.factors)
        assert self.keep is not None
        return plainly(self.keep)


def run(context: BenchContext, study: Study) -> list[Record]:
    """Quality and measured bytes of every cache; other methods get as many tokens or channels as cskv's bytes buy."""
    settings = {**study.settings("equal bytes"), "scored_tokens": len(study.texts) * CONTINUED}
    judge = Judge.of(study)
    missing = peers.missing_peers()
    records = judge.records(Arm("full cache", _full), {**settings, "budget": "all"})
    for k_density, v_density in context.track(DENSITIES, "equal bytes"):
        variant = {**settings, "budget": f"k {k_density:g}, v {v_density:g}"}
        config = CSKVConfig(k_density=k_density, v_density=v_density)
        ours = _cskv(study, config)
        arms = [ours, *(_cskv(study, config.replace(init=init)) for init in ("asvd", "svd"))]
        for arm in (*arms, *_without_factors(judge.share(ours), peers.KVPRESS not in missing)):
            records += judge.records(arm, variant)
    for bits in (4, 2):
        variant = {**settings, "budget": f"int{bits}"}
        records += judge.records(_cskv(study, CSKVConfig(k_bits=bits, v_bits=bits)), variant)
        whole = CSKVConfig(k_density=1, v_density=1, k_bits=bits, v_bits=bits)
        records += judge.records(_cskv(study, whole, "cskv without factors"), variant)
        if peers.QUANTIZED not in missing:
            records += judge.records(Arm(peers.QUANTIZED, partial(_quantized, bits=bits)), variant)
    for name, reason in missing.items():
        records.append(Record("cskv", name, "perplexity", None, "", settings, note=reason))
    return records


def _cskv(study: Study, config: CSKVConfig, name: str = "") -> Arm:
    name = name or ("cskv" if config.init == "whiten" else f"cskv with factors of {config.init}")
    return Arm(name, config=config, factors=fit(study.model, config, study.stats))


def _full(model: Any, prompt: ReadPrompt) -> Any:
    return prompt.fill(peers.full(model))


def _quantized(model: Any, prompt: ReadPrompt, bits: int) -> Any:
    return prompt.fill(peers.quantized(model, bits))


def _without_factors(share: float, kvpress: bool) -> Iterator[Arm]:
    """Methods without factors that keep `share` of the bytes: fewer tokens, fewer key channels, or both."""
    yield Arm("4 first and latest tokens", partial(peers.first_and_latest, share=share))
    if not kvpress:
        return
    from kvpress import SnapKVPress, ThinKPress

    yield Arm("SnapKV (kvpress)", partial(peers.pressed, presses=[SnapKVPress(compression_ratio=1 - share)]))
    # Keys are half of the bytes. kvpress writes zeros where ThinK drops a channel.
    note = "kvpress zeroes the channels that ThinK drops; the share counts them as gone"
    if share > 0.5:
        press = ThinKPress(key_channel_compression_ratio=2 * (1 - share))
        yield Arm("ThinK (kvpress)", partial(peers.pressed, presses=[press]), share=share, note=note)
    if share < 0.75:
        presses = [SnapKVPress(compression_ratio=1 - share / 0.75), ThinKPress(key_channel_compression_ratio=0.5)]
        yield Arm("SnapKV and ThinK (kvpress)", partial(peers.pressed, presses=presses), share=share, note=note)


@dataclass(frozen=True)
class Judge:
    """Scores an arm on held-out text and passkeys in the study's dtype, and measures its bytes in bfloat16.

    `texts` are prompts and how they go on. Caches are mostly kept in 16 bits, so bytes are counted in `light`, the
    model in bfloat16, for a prompt in that dtype.
    """

    study: Study
    texts: list[tuple[ReadPrompt, Tensor]]
    light: Any
    measured: ReadPrompt
    full_bytes: int

    @classmethod
    def of(cls, study: Study) -> Judge:
        """Read the prompts."""
        texts = [(read(study.model, ids[:, :-CONTINUED]), ids[:, -CONTINUED:]) for ids in study.texts]
        light, measured = copy.deepcopy(study.model).to(torch.bfloat16), texts[0][0].to(torch.bfloat16)
        return cls(study, texts, light, measured, tensor_bytes(_full(light, measured)))

    def records(self, arm: Arm, settings: dict[str, Any]) -> list[Record]:
        """What `arm` keeps of quality and takes in bytes."""
        model, prompts = self.study.model, self.study.prompts
        values = {"perplexity": self._perplexity(arm), "share of the full cache": self.share(arm)}
        if prompts:
            found = passkey_accuracy(model, arm.on(model), prompts)
            values |= dict(zip(("passkey", "passkey tokens"), found, strict=True))
        return [
            Record("cskv", arm.name, metric, value, "", settings, note=arm.note) for metric, value in values.items()
        ]

    def _perplexity(self, arm: Arm) -> float:
        total, model = 0.0, self.study.model
        with arm.on(model) as keep:
            for prompt, continuation in self.texts:
                logits = continued(model, keep(model, prompt), prompt, continuation).float()
                total += float(torch.nn.functional.cross_entropy(logits, continuation[0], reduction="sum"))
        return math.exp(total / (CONTINUED * len(self.texts)))

    def share(self, arm: Arm) -> float:
        """Bytes of what is left of a prompt, as a share of a full cache's."""
        if arm.share is not None:
            return arm.share
        with arm.on(self.light) as keep:
            return tensor_bytes(keep(self.light, self.measured)) / self.full_bytes
