"""Models of full size with random weights: the cost of a pass, and acceptance replayed from a trained small model.

With random weights p hardly depends on the context, and nearly everything would be accepted: free-running speed would
mean nothing. What is timed is a pass; how many passes an image takes is the trace of ar-world, or a published mean.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import peak_memory, time_paired

from sjd.adapters.base import Adapter
from sjd.bench.shapes import EMU3, LLAMAGEN, LUMINA, Shape
from sjd.bench.world import Arm, World
from sjd.config import SJDConfig
from sjd.engine import Engine, Request
from sjd.processing import Guidance, Processing

Traces = Mapping[tuple[str, int], Sequence[Sequence[int]]]
"""By rule and drafts: for each image of a trained model, the lengths that its passes committed."""
PUBLISHED = {("independent", 15): 2.3, ("maximal", 63): 4.2}
"""Mean tokens a pass on Lumina-mGPT 7B that papers report, by rule and drafts."""
WINDOWS = (0, 15, 31, 63)
SHAPES = (LUMINA, replace(LUMINA, batch=8), EMU3, LLAMAGEN)


def run(context: BenchContext, world: Callable[[], World], images: int) -> list[Record]:
    """Milliseconds of a pass by window and part, then end to end with replayed acceptance. `world` draws the traces."""
    if context.device.type != "cuda":
        settings = {"experiment": "full size, acceptance replayed", "model": LUMINA.name, "weights": "random"}
        note = "needs a GPU: a model of 7 billion parameters does not run on this machine"
        return [Record("sjd", "maximal, 63", "speed-up over one token a pass", None, "×", settings, note=note)]
    traces = traces_of(world(), images, context.seed)
    return [record for shape in SHAPES for record in measure(context, shape, traces)]


def traces_of(world: World, images: int, seed: int) -> Traces:
    """What ar-world commits pass by pass, by the paper's rule and by the default."""
    arms = [Arm("independent", window, "independent", "random") for window in WINDOWS if window]
    arms += [Arm("maximal", window) for window in WINDOWS if window]
    return {
        (arm.name, arm.window): [image.committed for run in world.draw(arm, images, seed).runs for image in run.images]
        for arm in arms
    }  # fmt: skip


def measure(context: BenchContext, shape: Shape, traces: Traces, rounds: int = 20) -> list[Record]:
    """One shape, eager and compiled to CUDA graphs."""
    adapter = shape.make(context.device)
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
            records += [
                Record("sjd", name, part, 1e3 * seconds, "ms", settings)
                for part, seconds in parts(context, engine, rounds).items()
            ]
            records.append(Record("sjd", name, "stored distributions", engine.window.peak_bytes, "B", settings))
            if context.device.type == "cuda":
                peak = peak_memory(candidates[name], context.device).bytes
                records.append(Record("sjd", name, "peak of a pass", peak, "B", settings))
        times = {window: timings.median(f"{window} drafts") for window in WINDOWS}
        records += replayed(shape, times, traces, settings)
        if mode != "off":
            # The memory of its graphs is what the next shape needs.
            torch.compiler.reset()
    return records


@torch.no_grad()
def parts(context: BenchContext, engine: Engine, rounds: int) -> dict[str, float]:
    """Seconds of the model's forward pass, of its head in it, and of what follows on logits that are there."""
    conditional, unconditional = engine._read()
    width = engine.window.size + 1
    rows = sum(len(side.prompt.embeds) for side in engine.sides)
    embeds = engine.sides[0].prompt.embeds
    hidden_states = embeds.new_zeros(rows, width, embeds.shape[-1])
    candidates: dict[str, Callable[[], Any]] = {
        "forward": torch.no_grad()(engine._read),
        "head": torch.no_grad()(partial(engine.adapter.head, hidden_states, engine.columns)),
        "step": torch.no_grad()(partial(engine._decide, conditional, unconditional)),
    }
    timings = time_paired(candidates, device=context.device, rounds=rounds, warmup=3)
    return {name: timings.median(name) for name in candidates}


def replayed(shape: Shape, times: dict[int, float], traces: Traces, settings: dict[str, Any]) -> list[Record]:
    """Seconds an image: passes of the trace, scaled to the tokens of this image, times the cost of a pass."""
    tokens = shape.grammar.length
    settings = {**settings, "experiment": "full size, acceptance replayed"}
    base = tokens * times[0]
    records = [Record("sjd", "one token a pass", "time of an image", base, "s", settings)]
    rates = [("published", *key, rate) for key, rate in PUBLISHED.items()]
    for (rule, window), lengths in traces.items():
        rate = statistics.fmean(sum(image) / len(image) for image in lengths)
        rates.append(("replayed from ar-world", rule, window, rate))
    for origin, rule, window, rate in rates:
        if window in times:
            seconds, variant = tokens / rate * times[window], f"{rule}, {window}"
            where = {**settings, "acceptance": origin, "tokens per pass": rate}
            records.append(Record("sjd", variant, "time of an image", seconds, "s", where))
            records.append(Record("sjd", variant, "speed-up over one token a pass", base / seconds, "×", where))
    return records


def middle(adapter: Adapter, shape: Shape, window: int, context: BenchContext, logits: Any) -> Engine:
    """A guided generation in the middle of its image, whose caches hold what they would hold there."""
    prompts = shape.prompts(adapter, shape.batch)
    nothing = torch.empty(shape.batch, 0, dtype=torch.int64, device=context.device)
    request = Request(
        prompts,
        shape.grammar,
        Processing(Guidance(shape.scale), top_k=shape.top_k),
        True,
        nothing,
        generator=torch.Generator().manual_seed(context.seed),
    )
    engine = Engine(adapter, request, SJDConfig(window=max(window, 1)), window, logits=logits)
    with torch.no_grad():
        engine._advance()
    # Nothing is committed by what is timed: every pass stands at the same place.
    half = shape.grammar.length // 2
    assert isinstance(shape.grammar.allowed, slice)
    engine.window.known.fill_(shape.grammar.allowed.start)
    engine.window.committed.fill_(half)
    engine.window.ends = engine.window.committed.clone()
    engine.lengths = [half] * shape.batch
    return engine


@torch.no_grad()
def _pass(engine: Engine) -> Any:
    return engine._advance()
