"""Section 10: perplexity and passkeys of SmolLM2 by factors, ranks, window, bits and finetuning, with baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pared_bench import BenchContext, Record
from torch import Tensor

from cskv.bench import peers
from cskv.bench.arms import Method, dropped_tokens, passkey_accuracy, plainly, relative_errors, with_cskv
from cskv.bench.prompts import ReadPrompt, read
from cskv.bench.text import passkeys, reference_tokens
from cskv.calibrate import Statistics, calibrate
from cskv.config import CSKVConfig
from cskv.evaluate import Logits, cskv_cache, full_cache, perplexity, sequences
from cskv.factors import Factors
from cskv.finetune import finetune
from cskv.fit import fit

PREFIX = 256
LENGTH = 768
CALIBRATION_LENGTH = 1024
PASSKEY_LENGTH = 1000
INITS: tuple[Literal["svd", "asvd", "whiten"], ...] = ("svd", "asvd", "whiten")
RANKS = ((96, 96), (48, 96), (36, 36), (24, 48), (96, 48))
BASE = CSKVConfig(k_rank=48, v_rank=96)
QAT_STEPS = 80
QAT_RATES = (1e-3, 3e-4)
"""Learning rates to choose from, by perplexity on `Study.validation`."""
QAT_SEQUENCES = 8
VALIDATION_SEQUENCES = 3


@dataclass
class Study:
    """The model, its calibration, and the texts it is judged on."""

    model: Any
    stats: Statistics
    calibration: list[Tensor]
    validation: list[Tensor]
    texts: list[Tensor]
    prompts: list[tuple[ReadPrompt, Tensor]]

    @classmethod
    def prepare(cls, context: BenchContext, count: int, prompts: int, calibration: int) -> Study:
        """Load SmolLM2 and calibrate it on `calibration` sequences."""
        from pared_zoo.real import smollm2

        model, tokenizer = smollm2()
        train, held_out = reference_tokens(tokenizer)
        batches = sequences(train, calibration, CALIBRATION_LENGTH)
        stats = calibrate(model, batches, track=lambda items: context.track(items, "calibrating", calibration))
        texts = sequences(held_out, count, LENGTH)
        keys = passkeys(tokenizer, prompts, PASSKEY_LENGTH, context.seed)
        validation = between(train, calibration, CALIBRATION_LENGTH, LENGTH)[:VALIDATION_SEQUENCES]
        return cls(model, stats, batches, validation, texts, [(read(model, one.prompt), one.answer) for one in keys])

    def settings(self, experiment: str) -> dict[str, Any]:
        """What every number was measured on."""
        return {
            "experiment": experiment,
            "model": "SmolLM2-135M-Instruct",
            "scored_tokens": len(self.texts) * (LENGTH - PREFIX),
            "passkeys": len(self.prompts),
            "calibration_tokens": self.stats.tokens,
        }


def run(context: BenchContext, study: Study) -> list[Record]:
    """The table of section 10 with its baselines."""
    records = []
    settings = study.settings("quality")
    configs = [BASE.replace(k_rank=k_rank, v_rank=v_rank, init=init) for k_rank, v_rank in RANKS for init in INITS]
    fitted = {config: fit(study.model, config, study.stats) for config in configs}
    arms = list(_arms(study, fitted))
    for arm in context.track(arms, "judging"):
        variant = {**settings, **arm.settings}
        found = perplexity(arm.logits, study.texts, PREFIX)
        records.append(Record("cskv", arm.name, "perplexity", found, "", variant))
        if study.prompts:
            keys = passkey_accuracy(study.model, arm.method, study.prompts)
            for metric, value in zip(("passkey", "passkey tokens"), keys, strict=True):
                records.append(Record("cskv", arm.name, metric, value, "", variant))
    texts = [read(study.model, ids) for ids in study.texts]
    for config, factors in fitted.items():
        errors = relative_errors(study.model, config, factors, texts)
        variant = {**settings, "k_rank": config.k_rank, "v_rank": config.v_rank}
        for side, error in zip("KV", errors, strict=True):
            records.append(Record("cskv", config.init, f"relative error of {side}", error, "", variant))
    return records


@dataclass(frozen=True)
class Arm:
    """A way to keep a cache small, judged on a whole text by `logits` and behind prompts by `method`."""

    name: str
    logits: Logits
    method: Method
    settings: dict[str, Any]


def _arms(study: Study, fitted: dict[CSKVConfig, Factors]) -> Iterator[Arm]:
    model = study.model

    def cskv(name: str, config: CSKVConfig, factors: Factors, **settings: Any) -> Arm:
        settings = {"window": config.window, **settings}
        return Arm(name, cskv_cache(model, config, factors), with_cskv(model, config, factors), settings)

    yield Arm("full cache", full_cache(model), plainly(lambda model, prompt: prompt.fill(peers.full(model))), {})
    for config, factors in fitted.items():
        yield cskv(config.init, config, factors, k_rank=config.k_rank, v_rank=config.v_rank)
    whitened = {(one.k_rank, one.v_rank): factors for one, factors in fitted.items() if one.init == "whiten"}
    for bits, zero_point in ((4, "affine"), (4, "clamped"), (2, "affine")):
        for ranks in ((96, 96), (48, 96), (36, 36)):
            config = BASE.replace(k_rank=ranks[0], v_rank=ranks[1], k_bits=bits, v_bits=bits, zero_point=zero_point)
            name = f"whiten, int{bits} {zero_point}"
            yield cskv(name, config, whitened[ranks], k_rank=ranks[0], v_rank=ranks[1])
    for ranks in ((48, 96), (36, 36)):
        for window, policy in ((0, "sliding"), (8, "sliding"), (128, "sliding"), (32, "block")):
            config = BASE.replace(k_rank=ranks[0], v_rank=ranks[1], window=window, window_policy=policy)
            name = "whiten" if policy == "sliding" else "whiten, block window"
            yield cskv(name, config, whitened[ranks], k_rank=ranks[0], v_rank=ranks[1])
    exact = CSKVConfig(k_density=1, v_density=1, k_bits=4, v_bits=4)
    yield cskv("full cache in int4 (as KIVI)", exact, fit(model, exact))
    for k_rank, v_rank in RANKS[:3]:
        share = (k_rank + v_rank) / (2 * 192)
        method = plainly(partial(peers.first_and_latest, share=share))
        yield Arm("4 first and latest tokens", dropped_tokens(model, share), method, {"kept_share": round(share, 4)})


def run_finetune(context: BenchContext, study: Study) -> list[Record]:
    """The second proof of section 10: what training with the quantiser in the loop wins back."""
    records = []
    settings = {**study.settings("finetuning"), "steps": QAT_STEPS, "k_rank": 48, "v_rank": 96}
    batches = study.calibration[:QAT_SEQUENCES]
    for init, bits, zero_point in (("asvd", 4, "clamped"), ("whiten", 4, "clamped"), ("whiten", 2, "affine")):
        plain = BASE.replace(init=init)
        factors = fit(study.model, plain, study.stats)
        config = plain.replace(k_bits=bits, v_bits=bits, zero_point=zero_point)
        track = partial(context.track, description="finetuning")
        trained, rate = finetuned(study.model, config, factors, batches, study.validation, track=track)
        variant = {**settings, "init": init, "quantiser": f"int{bits} {zero_point}"}
        for name, one, used in (
            ("not quantised", plain, factors),
            ("quantised", config, factors),
            ("quantised and finetuned", config, trained),
        ):
            found = perplexity(cskv_cache(study.model, one, used), study.texts, PREFIX)
            note = f"learning rate {rate:g}, chosen on other text" if used is trained else ""
            records.append(Record("cskv", name, "perplexity", found, "", variant, note=note))
    return records


def finetuned(
    model: Any,
    config: CSKVConfig,
    factors: Factors,
    batches: Sequence[Tensor],
    validation: Sequence[Tensor],
    *,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Factors, float]:
    """Factors after training with the learning rate of `QAT_RATES` that is best on `validation`, and that rate."""
    options: dict[str, Any] = {"steps": QAT_STEPS, "cache_inputs": True, "track": track}
    trained = {rate: finetune(model, config, factors, batches, learning_rate=rate, **options) for rate in QAT_RATES}
    best = min(QAT_RATES, key=lambda rate: perplexity(cskv_cache(model, config, trained[rate]), validation, PREFIX))
    return trained[best], best


def between(ids: Tensor, count: int, length: int, wanted: int) -> list[Tensor]:
    """Sequences (1, wanted) from the middle of the gaps that `sequences(ids, count, length)` leaves.

    Raises ValueError when there are no gaps of this length.
    """
    stride = (len(ids) - length) // max(count - 1, 1)
    first = length + (stride - length - wanted) // 2
    if count < 2 or stride < length + wanted:
        raise ValueError(f"count = {count}, length = {length}: they leave no gaps of {wanted} in {len(ids)} tokens")
    return [ids[place * stride + first :][:wanted][None] for place in range(count - 1)]
