"""Section 11: time of the prefill with random weights, as a ratio within one run.

How much merges depends on the input: synthetic embeddings x_t = rho x_(t-1) + sqrt(1 - rho^2) noise, rho drawn for each
place of a frame, so that about half of the tokens pass the threshold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import peak_memory, time_paired
from torch import Tensor

from framefusion.apply import FrameFusionHandle, apply
from framefusion.config import FrameFusionConfig
from framefusion.layout import TokenLayout, VideoBlock

COSTS = (0.7, 0.5, 0.3)
TEXT = 32
THRESHOLD = 0.6
DECODED = 64

QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
MID_SIZE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Setting:
    """A model of random weights and a prompt."""

    model: str
    config: dict[str, int]
    frames: int
    patches: int
    dtype: torch.dtype
    batch: int = 1

    def describe(self, experiment: str) -> dict[str, Any]:
        """The setting as JSON values."""
        return {
            "experiment": experiment,
            "model": self.model,
            "weights": "random",
            "frames": self.frames,
            "tokens": self.frames * self.patches + TEXT,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def run(context: BenchContext) -> list[Record]:
    """Prefill of the LLM alone, then (on a GPU) of the whole model on a real clip, and decoding behind it."""
    if context.device.type != "cuda":
        setting = Setting("mid-size Qwen2", MID_SIZE, 64, 36, torch.bfloat16)
        records = _prefill(context, setting, rounds=5 if context.full else 3)
        note = "needs a GPU: a model of full size does not run on this machine"
        for name in ("LLM prefill at full size", "end to end at full size"):
            settings = {"experiment": name, "model": "LLaVA-OneVision-7B shape", "weights": "random"}
            records.append(Record("framefusion", "cost 0.3", "speed-up over dense", None, "×", settings, note=note))
        return records
    records = []
    for frames in (32, 64, 128, 256):
        setting = Setting("Qwen2-7B", QWEN2_7B, frames, 196, torch.bfloat16)
        records += _prefill(context, setting, rounds=20 if context.full else 5)
    records += _prefill(context, Setting("Qwen2-7B", QWEN2_7B, 64, 196, torch.bfloat16, batch=4), rounds=5)
    for frames in (32, 64, 128, 256):
        records += _end_to_end(context, frames, rounds=20 if context.full else 5)
    return records


def synthetic(setting: Setting, generator: torch.Generator, device: torch.device) -> Tensor:
    """Embeddings (batch, tokens, hidden) of a prompt whose video is as redundant as said above."""
    shape = (setting.batch, setting.patches, setting.config["hidden_size"])
    rho = torch.rand(setting.batch, setting.patches, 1, generator=generator) ** 0.7
    frame = torch.randn(shape, generator=generator)
    frames = [frame]
    for _ in range(setting.frames - 1):
        frames.append(rho * frames[-1] + (1 - rho**2).sqrt() * torch.randn(shape, generator=generator))
    text = torch.randn(setting.batch, TEXT, shape[-1], generator=generator)
    rows = torch.cat((text[:, : TEXT // 2], torch.stack(frames, 1).flatten(1, 2), text[:, TEXT // 2 :]), 1)
    return (0.02 * rows).to(device, setting.dtype)


def _prefill(context: BenchContext, setting: Setting, rounds: int) -> list[Record]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device(context.device):
        config = Qwen2Config(**setting.config, max_position_embeddings=1 << 17)
        model = Qwen2ForCausalLM(config).to(setting.dtype).eval()
    embeddings = synthetic(setting, torch.Generator().manual_seed(context.seed), context.device)
    tokens = embeddings.shape[1]
    block = VideoBlock(TEXT // 2, setting.frames, setting.patches)
    layout = TokenLayout.from_blocks(tokens, *[[block]] * setting.batch)

    @torch.no_grad()
    def forward(model: Any) -> Any:
        return model(inputs_embeds=embeddings, logits_to_keep=1, use_cache=True)

    candidates, handles = _candidates(model, forward, layout)
    return _timed(context, setting, candidates, handles, "LLM prefill", rounds)


def _candidates(
    model: Any, forward: Callable[[Any], Any], layout: TokenLayout | None
) -> tuple[dict[str, Callable[[], Any]], dict[str, FrameFusionHandle]]:
    """`forward` on the model as it is and under each cost, and the handles of the latter.

    Each cost has a copy of the model with the same weights, so that no arm pays for putting the method on.
    """
    handles = {f"cost {cost}": _attached(model, cost, layout) for cost in COSTS}
    off = _attached(model, COSTS[-1], layout)

    def disabled() -> Any:
        with off.disabled():
            return forward(off.patched)

    candidates: dict[str, Callable[[], Any]] = {"dense": lambda: forward(model), "attached, disabled": disabled}
    for name, handle in handles.items():
        candidates[name] = partial(forward, handle.patched)
    return candidates, handles


def _attached(model: Any, cost: float, layout: TokenLayout | None) -> Any:
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    handle: Any = apply(copied, FrameFusionConfig(cost=cost, similarity_threshold=THRESHOLD), layout=layout)
    handle.patched = copied
    return handle


def _timed(
    context: BenchContext,
    setting: Setting,
    candidates: dict[str, Callable[[], Any]],
    handles: dict[str, FrameFusionHandle],
    experiment: str,
    rounds: int,
) -> list[Record]:
    timings = time_paired(candidates, device=context.device, rounds=rounds, warmup=1)
    settings = setting.describe(experiment)
    records = timings.records("framefusion", "dense", settings)
    for name, handle in handles.items():
        report = handle.stats()
        if report["requests"]:
            saved = report["kv_bytes_saved"] / report["requests"]
            records.append(Record("framefusion", name, "cost", report["cost"], "", settings))
            records.append(Record("framefusion", name, "FLOPs of the prefill", report["flops_ratio"], "", settings))
            records.append(Record("framefusion", name, "KV bytes saved", saved, "B", settings))
    if context.device.type == "cuda":
        for name, call in candidates.items():
            peak = peak_memory(call, context.device)
            records.append(Record("framefusion", name, "peak memory", peak.bytes, "B", settings))
    return records


def _end_to_end(context: BenchContext, frames: int, rounds: int) -> list[Record]:
    """Tower, projector and LLM on a real film in the shape of LLaVA-OneVision-7B, then decoding."""
    from pared_zoo.real import clip
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    from framefusion.bench.redundancy import fit_frames

    setting = Setting("LLaVA-OneVision-7B shape", QWEN2_7B, frames, 196, torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(context.device):
        config = LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **QWEN2_7B, "max_position_embeddings": 1 << 17},
            vision_config=SIGLIP_SO400M,
            image_token_id=151646,
            video_token_id=151647,
        )
        model = LlavaOnevisionForConditionalGeneration(config).to(setting.dtype).eval()
    film = clip("bikes", width=None, frames=4 * frames)
    pixels = (fit_frames(film, frames, 384).float() / 127.5 - 1)[None].to(context.device, setting.dtype)
    text = torch.arange(100, 100 + TEXT // 2)
    ids = torch.cat((text, torch.full((frames * 196 + 1,), config.video_token_id), text))[None].to(context.device)

    @torch.no_grad()
    def forward(model: Any) -> Any:
        return model(input_ids=ids, pixel_values_videos=pixels, logits_to_keep=1, use_cache=True)

    candidates, handles = _candidates(model, forward, None)
    records = _timed(context, setting, candidates, handles, "end to end", rounds)
    decoding, _ = _candidates(model, partial(_decode, forward, ids.shape[1]), None)
    timings = time_paired(decoding, device=context.device, rounds=3, warmup=1)
    return records + timings.records("framefusion", "dense", setting.describe(f"prefill and {DECODED} tokens"))


@torch.no_grad()
def _decode(prefill: Callable[[Any], Any], tokens: int, model: Any) -> Any:
    out = prefill(model)
    token = out.logits[:, -1:].argmax(-1)
    for step in range(DECODED):
        position = torch.tensor([[tokens + step]], device=token.device)
        out = model(input_ids=token, past_key_values=out.past_key_values, position_ids=position, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return token
