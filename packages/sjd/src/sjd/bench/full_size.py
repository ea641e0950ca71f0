"""Models of full size with random weights: the cost of a pass, and acceptance replayed from a trained small model.

With random weights p hardly depends on the context, and nearly everything would be accepted: free-running speed would
mean nothing. What is timed is a pass; how many passes an image takes is the trace of ar-world, or a published mean.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import peak_memory, time_paired

from sjd.adapters.base import Prompt
from sjd.adapters.chameleon import Chameleon, lumina_grammar
from sjd.config import SJDConfig
from sjd.engine import Engine, Request
from sjd.processing import Guidance, Processing

PUBLISHED = {"independent": 2.3, "maximal": 4.2}
"""Mean tokens a pass on Lumina-mGPT 7B that papers report, for independent refresh at 15 and coupled at 63 drafts."""
WINDOWS = (0, 15, 31, 63)
PROMPT = 64
SCALE, TOP_K = 3.0, 2000


@dataclass(frozen=True)
class Shape:
    """A model of the Chameleon class and the image it draws."""

    name: str
    config: dict[str, Any]
    grid: tuple[int, int]
    dtype: torch.dtype
    batch: int = 1


LUMINA = Shape("Chameleon/Lumina-mGPT 7B shape", {}, (48, 48), torch.bfloat16)
SMALL = Shape(
    "small Chameleon shape",
    {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
     "num_key_value_heads": 4, "vocab_size": 9216},
    (8, 8),
    torch.float32,
)  # fmt: skip


def run(context: BenchContext, traces: Mapping[str, Sequence[Sequence[int]]]) -> list[Record]:
    """Milliseconds of a pass by window, then end to end with replayed acceptance.

    `traces`: for each rule, the lengths that the passes of each image of a trained model committed.
    """
    settings = {"experiment": "full size, acceptance replayed", "model": LUMINA.name, "weights": "random"}
    if context.device.type != "cuda":
        note = "needs a GPU: a model of 7 billion parameters does not run on this machine"
        return [Record("sjd", "maximal, 63", "speed-up over one token a pass", None, "×", settings, note=note)]
    records = []
    for batch in (1, 8):
        records += measure(context, Shape(**{**vars(LUMINA), "batch": batch}), traces)
    return records


def measure(
    context: BenchContext, shape: Shape, traces: Mapping[str, Sequence[Sequence[int]]], rounds: int = 20
) -> list[Record]:
    """One shape, eager and compiled to CUDA graphs."""
    adapter = Chameleon(make(shape, context.device))
    records: list[Record] = []
    modes = ("off", "reduce-overhead") if context.device.type == "cuda" else ("off",)
    for mode in modes:
        logits = None if mode == "off" else torch.compile(adapter.logits, mode=mode, dynamic=False)
        engines = {window: middle(adapter, shape, window, context, logits) for window in WINDOWS}
        candidates: dict[str, Callable[[], Any]] = {
            f"{window} drafts": partial(_pass, engine) for window, engine in engines.items()
        }
        timings = time_paired(candidates, device=context.device, rounds=rounds, warmup=3)
        settings = {
            "experiment": "full size, cost of a pass",
            "model": shape.name,
            "weights": "random",
            "batch": shape.batch,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "passes": "eager" if mode == "off" else "CUDA graphs",
        }
        records += timings.records("sjd", "0 drafts", settings)
        for window, engine in engines.items():
            name = f"{window} drafts"
            records.append(
                Record("sjd", name, "stored distributions", engine.window.peak_bytes, "B", settings)
            )  # fmt: skip
            if context.device.type == "cuda":
                peak = peak_memory(candidates[name], context.device).bytes
                records.append(Record("sjd", name, "peak of a pass", peak, "B", settings))
        times = {window: timings.median(f"{window} drafts") for window in WINDOWS}
        records += replayed(shape, times, traces, settings)
    return records


def replayed(
    shape: Shape, times: dict[int, float], traces: Mapping[str, Sequence[Sequence[int]]], settings: dict[str, Any]
) -> list[Record]:
    """Seconds an image: passes of the trace, scaled to the tokens of this image, times the cost of a pass."""
    tokens = lumina_grammar(*shape.grid).length
    settings = {**settings, "experiment": "full size, acceptance replayed"}
    base = tokens * times[0]
    records = [Record("sjd", "one token a pass", "time of an image", base, "s", settings)]
    rates = {("published", name): rate for name, rate in PUBLISHED.items()}
    for name, lengths in traces.items():
        rates[("replayed from ar-world", name)] = statistics.fmean(
            sum(image) / len(image) for image in lengths
        )  # fmt: skip
    for (origin, name), rate in rates.items():
        for window in WINDOWS[1:]:
            seconds = tokens / rate * times[window]
            variant = f"{name}, {window}"
            where = {**settings, "acceptance": origin, "tokens per pass": rate}
            records.append(Record("sjd", variant, "time of an image", seconds, "s", where))
            records.append(Record("sjd", variant, "speed-up over one token a pass", base / seconds, "×", where))
    return records


def make(shape: Shape, device: torch.device) -> Any:
    """The model, with random weights and a small VQ model that is not used."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    vq = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(shape.dtype)
        try:
            config = ChameleonConfig(**shape.config, vq_config=vq, vocabulary_map={"<image>": 8711})
            return ChameleonForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(dtype)


def middle(adapter: Chameleon, shape: Shape, window: int, context: BenchContext, logits: Any) -> Engine:
    """A guided generation in the middle of its image, whose caches hold what they would hold there."""
    grammar = lumina_grammar(*shape.grid)
    ids = torch.randint(10, 8000, (shape.batch, PROMPT), device=context.device)
    embeds = adapter.embed(ids, "prompt")
    padding = torch.zeros(shape.batch, dtype=torch.int64, device=context.device)
    processing = Processing(Guidance(SCALE), top_k=TOP_K)
    prompts = [Prompt(embeds, padding), Prompt(embeds[:, -1:], padding)]
    request = Request(prompts, grammar, processing, True, ids, generator=torch.Generator().manual_seed(context.seed))
    engine = Engine(adapter, request, SJDConfig(window=max(window, 1)), window, logits=logits)
    with torch.no_grad():
        engine._advance()
    # Nothing is committed by what is timed: every pass stands at the same place.
    engine.window.committed.fill_(grammar.length // 2)
    engine.window.ends = engine.window.committed.clone()
    engine.lengths = [grammar.length // 2] * shape.batch
    return engine


@torch.no_grad()
def _pass(engine: Engine) -> Any:
    return engine._advance()
