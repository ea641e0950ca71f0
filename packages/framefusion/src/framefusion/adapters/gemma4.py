"""The second half of Gemma 4's layers: an MLP, experts beside it in some models, and inputs of every layer's own."""

from __future__ import annotations

from typing import Any

from pared_hooks import DecoderLayer
from torch import Tensor

from framefusion.decoder_layer import REST, Rest


def gemma4_rest(layer: DecoderLayer) -> Rest:
    """What `Gemma4TextDecoderLayer.forward` does after its attention."""
    module: Any = layer.module

    def rest(hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        out = module.mlp(module.pre_feedforward_layernorm(hidden))
        if module.enable_moe_block:
            flat = hidden.reshape(-1, hidden.shape[-1])
            _, weights, index = module.router(flat)
            experts = module.experts(module.pre_feedforward_layernorm_2(flat), index, weights).reshape(hidden.shape)
            out = module.post_feedforward_layernorm_1(out) + module.post_feedforward_layernorm_2(experts)
        hidden = hidden + module.post_feedforward_layernorm(out)
        if module.hidden_size_per_layer_input:
            gate = module.act_fn(module.per_layer_input_gate(hidden)) * arguments["per_layer_input"]
            hidden = hidden + module.post_per_layer_input_norm(module.per_layer_projection(gate))
        return hidden * module.layer_scalar

    return rest


REST["Gemma4TextDecoderLayer"] = gemma4_rest
