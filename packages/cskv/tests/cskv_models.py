"""Tiny language models of the real transformers classes, with random weights."""

from __future__ import annotations

import torch

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

FAMILIES = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "ministral3": ("Ministral3", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 24, **EXPERTS}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, **MIXED}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "query_pre_attn_scalar": 16, **MIXED}),
    "phi3": ("Phi3", {}),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, **MIXED}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", MIXED),
    "granite": ("Granite", {}),
}


def language_model(family: str = "llama", **options):
    """A model of the family; biases and norms are random as well, so that forgetting one would show."""
    import transformers

    name, extra = FAMILIES[family]
    kind = "Gemma3ForCausalLM" if name == "Gemma3Text" else f"{name}ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**{**TEXT, **extra, **options}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model.eval()
