"""The weights of a decoder layer after its scales are folded, and after they are quantised; no model is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mbq.config import MBQConfig
from mbq.functional import QuantizedWeight, dequantize_weight, fold, quantize_weight
from mbq.layers import LayerPlan


@dataclass
class LayerScales:
    """What was found for one layer: scales by site, shares of the range and finished codes by linear layer."""

    scales: dict[int, Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, QuantizedWeight] = field(default_factory=dict)


def folded_state(plan: LayerPlan, scales: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return every parameter that folding changes, by its name in the layer, in float32 (section 3.7)."""
    current: dict[str, Tensor] = {}
    parameters = dict(plan.module.named_parameters())

    def value(name: str) -> Tensor:
        return current.get(name, parameters[name].detach().float())

    for number, site in enumerate(plan.sites):
        scale = scales.get(number)
        if scale is None:
            continue
        scale = scale.to(plan.device, copy=False).float()
        before = site.shared(scale)
        for part in ("weight", "bias"):
            name = f"{site.prev}.{part}"
            if name in parameters:
                # A bias is added after the weight, also in norms that multiply by 1 + weight.
                kind = "norm" if part == "bias" and site.fold == "norm_plus_one" else site.fold
                current[name] = fold(value(name), before, kind)
        for linear in site.linears:
            current[f"{linear}.weight"] = value(f"{linear}.weight") * scale
    return current


def quantized_weights(
    plan: LayerPlan, found: LayerScales, config: MBQConfig, folded: Mapping[str, Tensor]
) -> dict[str, QuantizedWeight]:
    """Return codes, scales and zero points of every quantised linear layer, by its name in the layer."""
    weights = {}
    for name in plan.linears:
        if name in found.codes:
            weights[name] = found.codes[name]
            continue
        weight = folded.get(f"{name}.weight")
        weights[name] = quantize(plan.linear(name).weight if weight is None else weight, config, found.clips.get(name))
    return weights


def quantize(weight: Tensor, config: MBQConfig, clip: Tensor | None = None) -> QuantizedWeight:
    """Quantise a weight (N, K) as the configuration says."""
    return quantize_weight(
        weight.detach(),
        config.w_bits,
        config.group_size,
        config.is_symmetric,
        config.include_zero,
        config.torch_scale_dtype,
        None if clip is None else clip.to(weight.device),
    )


def quantized_state(plan: LayerPlan, found: LayerScales, config: MBQConfig) -> dict[str, Tensor]:
    """Return every parameter that folding and quantising change, dequantised, in the dtype of the layer."""
    state = folded_state(plan, found.scales)
    for name, weight in quantized_weights(plan, found, config, state).items():
        state[f"{name}.weight"] = dequantize_weight(weight)
    parameters = dict(plan.module.named_parameters())
    return {name: value.to(parameters[name]) for name, value in state.items()}
