"""What `pared demo cskv` shows: memory over length, and perplexity over the size of the cache, of a real model."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any, Literal

import torch
from pared_bench import DemoContext, DemoResult, Figure, Table

from cskv.apply import applied
from cskv.bench import peers
from cskv.bench.arms import Method, dropped_tokens, passkey_accuracy, plainly, with_cskv
from cskv.bench.memory import tensor_bytes
from cskv.bench.prompts import read
from cskv.bench.text import passkeys, reference_tokens
from cskv.calibrate import calibrate
from cskv.config import CSKVConfig
from cskv.evaluate import Logits, cskv_cache, full_cache, perplexity, sequences
from cskv.factors import Factors
from cskv.fit import fit

PREFIX, LENGTH = 128, 512
CHUNK = 256
MEMORY_LENGTHS = (256, 512, 1024)
FULL_MEMORY_LENGTHS = (256, 512, 1024, 2048, 4096)
CALIBRATION_LENGTH = 1024
PASSKEY_LENGTH = 400
DENSITIES = ((0.5, 0.5), (0.25, 0.5), (0.2, 0.2))


@torch.no_grad()
def run(context: DemoContext, *, calibration: int = 8, texts: int = 1, bits: int = 4) -> DemoResult:
    """Calibrate SmolLM2-135M-Instruct on `calibration` sequences, then compare caches on `texts` held-out ones.

    `bits` (2, 4 or 8) is the width of the quantised variant. Raises ConfigError for another width, ValueError for
    counts that the text does not hold.
    """
    from pared_zoo.real import smollm2

    quantised = CSKVConfig(k_bits=bits, v_bits=bits)
    model, tokenizer = smollm2()
    model.to(context.device)
    train, held_out = reference_tokens(tokenizer)
    held = [text.to(context.device) for text in sequences(held_out, texts, LENGTH)]
    keys = passkeys(tokenizer, 2, PASSKEY_LENGTH, context.seed)
    prompts = [(read(model, one.prompt.to(context.device)), one.answer.to(context.device)) for one in keys]
    batches = sequences(train, calibration, CALIBRATION_LENGTH)
    stats = calibrate(model, batches, track=lambda items: context.track(items, "calibrating", len(batches)))

    lengths = FULL_MEMORY_LENGTHS if context.full else MEMORY_LENGTHS
    # Caches are mostly kept in 16 bits; bytes are counted there, and quality is judged in full precision.
    light = copy.deepcopy(model).to(torch.bfloat16)

    @cache
    def factors_of(k_density: float, v_density: float, init: Literal["svd", "whiten"]) -> Factors:
        return fit(model, CSKVConfig(k_density=k_density, v_density=v_density, init=init), stats)

    usual = factors_of(quantised.k_density, quantised.v_density, "whiten")
    sizes = _memory(context, light, usual, quantised, train[: lengths[-1]][None], lengths)
    judged: list[tuple[str, float, float, float]] = []

    def judge(name: str, share: float, logits: Logits, method: Method) -> None:
        found = perplexity(logits, held, PREFIX), passkey_accuracy(model, method, prompts)[1]
        judged.append((name, share, *found))

    judge("full cache", 1.0, full_cache(model), plainly(lambda model, prompt: prompt.fill(peers.full(model))))
    plain_arms: tuple[Literal["svd", "whiten"], ...] = ("svd", "whiten")
    arms: list[tuple[float, float, Literal["svd", "whiten"], int | None]]
    arms = [(k, v, init, None) for k, v in DENSITIES for init in plain_arms]
    arms += [(k, v, "whiten", bits) for k, v in DENSITIES]
    for k_density, v_density, init, width in context.track(arms, "judging"):
        config = CSKVConfig(k_density=k_density, v_density=v_density, init=init, k_bits=width, v_bits=width)
        factors = factors_of(k_density, v_density, init)
        name = f"{init}, {k_density:g} / {v_density:g}" + (f", int{width}" if width else "")
        judge(name, _share(light, config), cskv_cache(model, config, factors), with_cskv(model, config, factors))
    for k_density, v_density in context.track(DENSITIES, "dropping tokens"):
        share = (k_density + v_density) / 2
        method = plainly(partial(peers.first_and_latest, share=share))
        judge(f"first 4 and latest tokens, {share:g}", share, dropped_tokens(model, share), method)

    rows = [(name, f"{100 * share:.1f} %", f"{ppl:.2f}", f"{100 * key:.0f} %") for name, share, ppl, key in judged]
    quality = Table(
        f"{len(held) * (LENGTH - PREFIX)} tokens decoded behind prompts of {PREFIX}; two passkeys",
        ("cache", "bytes per old token", "perplexity", "passkey digits"),
        rows,
        "Names give the density of keys / values. Bytes leave out the exact window, which does not grow.",
    )
    memory = Table(
        "Bytes of the tensors that the cache holds, after a real text, in bfloat16",
        ("tokens", *sizes),
        [(length, *(f"{sizes[name][place] / 1e6:.2f} MB" for name in sizes)) for place, length in enumerate(lengths)],
    )
    best = next(row for row in judged if row[0] == "whiten, 0.25 / 0.5")
    saved = {name: 1 - values[-1] / sizes["full cache"][-1] for name, values in sizes.items()}
    metrics = {
        "full.perplexity": judged[0][2],
        "cskv.perplexity": best[2],
        **{f"{name}.saved": value for name, value in saved.items() if name != "full cache"},
    }
    small = next(name for name in sizes if "int" in name)
    summary = (
        f"At {lengths[-1]} tokens the cache of SmolLM2-135M takes {100 * saved['cskv']:.0f} % less memory with cskv, "
        f"and {100 * saved[small]:.0f} % less with its latents in {bits} bits; the perplexity of held-out text goes "
        f"from {judged[0][2]:.2f} to {best[2]:.2f}. Calibration took {calibration} sequences and no training."
    )
    figure = Figure.from_plot("Memory over length, perplexity over size", _plot(lengths, sizes, judged))
    return DemoResult("A KV cache of a fraction of the size", summary, [memory, quality], [figure], metrics)


def _memory(
    context: DemoContext,
    model: Any,
    factors: Factors,
    quantised: CSKVConfig,
    ids: torch.Tensor,
    lengths: tuple[int, ...],
) -> dict[str, list[int]]:
    """Bytes of each kind of cache while the model reads a text in chunks."""
    configs = {"full cache": None, "cskv": CSKVConfig(), f"cskv, int{quantised.k_bits}": quantised}
    found: dict[str, list[int]] = {name: [] for name in configs}
    for name, config in context.track(configs.items(), "reading a text", len(configs)):
        if config is None:
            found[name] = _read(model, ids, lengths)
            continue
        with applied(model, config, factors):
            found[name] = _read(model, ids, lengths)
    return found


def _read(model: Any, ids: torch.Tensor, lengths: tuple[int, ...]) -> list[int]:
    cache, sizes = None, []
    for end in range(CHUNK, lengths[-1] + 1, CHUNK):
        chunk = ids[:, end - CHUNK : end].to(model.device)
        cache = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        if end in lengths:
            sizes.append(tensor_bytes(cache))
    return sizes


def _share(model: Any, config: CSKVConfig) -> float:
    """Bytes that an old token takes, as a share of what it takes in a full cache, measured on two long caches."""
    from cskv.bench.memory import cache_of, fill

    grown = []
    for one in (config, None):
        sizes = []
        for tokens in (1024, 3072):
            cache, handle = cache_of(model, one)
            fill(model, cache, tokens, torch.bfloat16)
            sizes.append(tensor_bytes(cache))
            if handle is not None:
                handle.remove()
        grown.append(sizes[1] - sizes[0])
    return grown[0] / grown[1]


def _plot(lengths: tuple[int, ...], sizes: dict[str, list[int]], judged: list[tuple[str, float, float, float]]) -> Any:
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(10, 4), layout="constrained")
    left, right = plot.subplots(1, 2)
    for name, values in sizes.items():
        left.plot(lengths, [value / 1e6 for value in values], marker="o", label=name)
    left.set(xlabel="tokens", ylabel="cache [MB]", ylim=(0, None))
    left.legend()
    kinds = {"svd": "plain SVD", "whiten": "cskv", "first": "first and latest tokens"}
    for start, label in kinds.items():
        points = sorted((share, ppl) for name, share, ppl, _ in judged if name.startswith(start) and "int" not in name)
        right.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
    points = sorted((share, ppl) for name, share, ppl, _ in judged if ", int" in name)
    right.plot([x for x, _ in points], [y for _, y in points], marker="s", label="cskv, quantised")
    right.axhline(judged[0][2], color="black", linewidth=1, linestyle=":", label="full cache")
    right.set(xlabel="bytes per old token, share of the full cache", ylabel="perplexity", yscale="log")
    right.legend()
    return plot
