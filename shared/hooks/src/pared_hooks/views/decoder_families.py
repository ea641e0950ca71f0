"""The decoder families that are known from the start."""

from __future__ import annotations

from pared_hooks.views.decoder import DecoderFamily, register_decoder_family

_HEAD_NORMS = {"query": "q_norm", "key": "k_norm"}
_FOUR_NORMS = {
    "attention": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
_DELTA_NET = {
    "qkv": "in_proj_qkv",
    "gate": "in_proj_z",
    "beta": "in_proj_b",
    "decay": "in_proj_a",
    "output": "out_proj",
}
_NORMS_AFTER = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}

for _family in (
    DecoderFamily("llama", ("LlamaModel",)),
    DecoderFamily("mistral", ("MistralModel", "Ministral3Model")),
    DecoderFamily("qwen2", ("Qwen2Model",)),
    DecoderFamily("qwen3", ("Qwen3Model", "Qwen3MoeModel"), attention_norms=_HEAD_NORMS),
    DecoderFamily("gemma2", ("Gemma2Model",), layer_norms=_FOUR_NORMS),
    DecoderFamily("gemma3", ("Gemma3TextModel",), attention_norms=_HEAD_NORMS, layer_norms=_FOUR_NORMS),
    DecoderFamily("smollm3", ("SmolLM3Model",)),
    DecoderFamily("granite", ("GraniteModel",)),
    DecoderFamily("gpt_oss", ("GptOssModel",)),
    DecoderFamily("olmo", ("Olmo2Model", "Olmo3Model"), attention_norms=_HEAD_NORMS, layer_norms=_NORMS_AFTER),
    DecoderFamily(
        "phi3",
        ("Phi3Model",),
        projections={"qkv": "qkv_proj", "output": "o_proj"},
        mlp_projections={"gate_up": "gate_up_proj", "down": "down_proj"},
    ),
    DecoderFamily("qwen2_vl", ("Qwen2VLTextModel",)),
    DecoderFamily("qwen2_5_vl", ("Qwen2_5_VLTextModel",)),
    DecoderFamily("qwen3_vl", ("Qwen3VLTextModel", "Qwen3VLMoeTextModel"), attention_norms=_HEAD_NORMS),
    DecoderFamily(
        "qwen3_5",
        ("Qwen3_5TextModel",),
        attention_norms=_HEAD_NORMS,
        linear_attention="linear_attn",
        linear_projections=_DELTA_NET,
    ),
    DecoderFamily(
        "gemma4",
        ("Gemma4TextModel",),
        attention_norms=_HEAD_NORMS,
        layer_norms=_FOUR_NORMS,
        # Layers that take keys and values from an earlier one have no projections for them, and some values are keys.
        optional=("key", "value"),
    ),
):
    register_decoder_family(_family)
