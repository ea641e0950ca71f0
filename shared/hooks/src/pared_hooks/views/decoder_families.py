"""The decoder families that are known from the start."""

from __future__ import annotations

from pared_hooks.views.decoder import DecoderFamily, register_decoder_family

_HEAD_NORMS = {"query": "q_norm", "key": "k_norm"}

for _family in (
    DecoderFamily("llama", ("LlamaModel",)),
    DecoderFamily("mistral", ("MistralModel",)),
    DecoderFamily("qwen2", ("Qwen2Model",)),
    DecoderFamily("qwen3", ("Qwen3Model",), attention_norms=_HEAD_NORMS),
    DecoderFamily(
        "gemma3",
        ("Gemma3TextModel",),
        attention_norms=_HEAD_NORMS,
        layer_norms={
            "attention": "input_layernorm",
            "after_attention": "post_attention_layernorm",
            "mlp": "pre_feedforward_layernorm",
            "after_mlp": "post_feedforward_layernorm",
        },
    ),
    DecoderFamily("qwen2_5_vl", ("Qwen2_5_VLTextModel",)),
    DecoderFamily("qwen3_vl", ("Qwen3VLTextModel",), attention_norms=_HEAD_NORMS),
):
    register_decoder_family(_family)
