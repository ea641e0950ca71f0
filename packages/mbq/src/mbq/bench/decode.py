"""Section 11: decoding of a LLaVA-OneVision-7B text stack with random weights on a GPU, packed against bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import time_paired

from mbq.config import PER_ROW
from mbq.modules import QuantLinear

CONTEXT = 1024
PREFILL = 2048


def run(context: BenchContext) -> list[Record]:
    """Tokens per second of decoding at batch 1, 4 and 16, and of a prompt; on a GPU alone."""
    if context.device.type != "cuda":
        note = "needs a GPU: at 7B the dense weights alone are 15 GB"
        return [Record("mbq", "W3A16", "decode speed-up", None, "", {"experiment": "decoding at 7B"}, note=note)]
    records = []
    for batch in (1, 4, 16):
        steps = {name: _decode(context, options, batch) for name, options in _variants().items()}
        settings = {"experiment": "decoding at 7B", "batch": batch, "context": CONTEXT, "dtype": "bfloat16"}
        records += time_paired(steps, device=context.device).records("mbq", "bfloat16", settings)
        del steps
        torch.cuda.empty_cache()
    steps = {name: _prefill(context, options) for name, options in _variants().items()}
    settings = {"experiment": "prompt at 7B", "tokens": PREFILL, "dtype": "bfloat16"}
    return records + time_paired(steps, device=context.device).records("mbq", "bfloat16", settings)


def _variants() -> dict[str, dict[str, Any] | None]:
    return {
        "bfloat16": None,
        "W3A16": {"bits": 3, "group_size": 128, "symmetric": False},
        "W4A16": {"bits": 4, "group_size": 128, "symmetric": False},
        "W4A8": {"bits": 4, "group_size": PER_ROW, "symmetric": True, "a_bits": 8},
    }


def _model(context: BenchContext, options: dict[str, Any] | None) -> Any:
    """Qwen2-7B, the text part of LLaVA-OneVision-7B, with random weights, its linear layers packed if asked for."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
        for layer in model.model.layers if options else ():
            for owner in (layer.self_attn, layer.mlp):
                for name, linear in list(owner.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        new = QuantLinear(
                            linear.in_features,
                            linear.out_features,
                            linear.bias is not None,
                            dtype=torch.bfloat16,
                            **(options or {}),
                        )
                        setattr(owner, name, new)
    model = model.to_empty(device=context.device).eval()
    generator = torch.Generator(context.device).manual_seed(context.seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.02, generator=generator)
        elif tensor.dtype == torch.int32:
            tensor.data.random_(generator=generator)
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device=context.device)
    return model


def _decode(context: BenchContext, options: dict[str, Any] | None, batch: int) -> Callable[[], object]:
    from transformers import StaticCache

    model = _model(context, options)
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + 256)
    token = torch.zeros(batch, 1, dtype=torch.long, device=context.device)
    with torch.no_grad():
        model(token.expand(-1, CONTEXT), past_key_values=cache, logits_to_keep=1)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    place = torch.tensor([[CONTEXT]], device=context.device).expand(batch, -1)

    @torch.no_grad()
    def step() -> object:
        return compiled(token, past_key_values=cache, position_ids=place).logits

    return step


def _prefill(context: BenchContext, options: dict[str, Any] | None) -> Callable[[], object]:
    model = _model(context, options)
    tokens = torch.zeros(1, PREFILL, dtype=torch.long, device=context.device)

    @torch.no_grad()
    def step() -> object:
        return model(tokens, use_cache=False, logits_to_keep=1).logits

    return step
