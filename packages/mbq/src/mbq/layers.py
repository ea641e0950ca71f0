"""Which linear layers of a decoder layer are quantised, and where their scales are searched and folded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pared_hooks import ConfigError, DecoderLayer, DecoderView
from torch import Tensor, nn
from torch.func import functional_call

from mbq.config import PER_ROW, MBQConfig
from mbq.errors import AlreadyQuantizedError, UnsupportedLayerError
from mbq.functional import FoldKind
from mbq.modules import FakeQuantLinear, QuantLinear

Kind = Literal["attn", "mlp"]
DEFAULT_SKIP = MBQConfig().skip_modules


@dataclass(frozen=True)
class Site:
    """Linear layers that share an input and a scale (section 3.5); names are relative to the decoder layer."""

    kind: Kind
    prev: str
    """The operation before, which takes the inverse of the scale."""
    fold: FoldKind
    linears: tuple[str, ...]
    inspected: str
    """The module whose output is compared."""
    heads: tuple[int, int] = (1, 1)
    """(key-value heads, query heads for each): above 1 in the second place, query heads share a scale."""

    def shared(self, scale: Tensor) -> Tensor:
        """The scale of the operation before: one entry where query heads share one."""
        groups, repeats = self.heads
        return scale if repeats == 1 else scale.view(groups, repeats, -1)[:, 0].reshape(-1)

    def average(self, mean_abs: Tensor) -> Tensor:
        """Magnitudes (K,) averaged over the query heads that share a scale."""
        groups, repeats = self.heads
        if repeats == 1:
            return mean_abs
        return mean_abs.view(groups, repeats, -1).mean(1, keepdim=True).expand(-1, repeats, -1).reshape(-1)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One decoder layer: what is searched together, and which of its linear layers are quantised."""

    index: int
    name: str
    module: nn.Module
    layer_type: str
    sites: tuple[Site, ...]
    linears: tuple[str, ...]
    outputs: dict[Kind, str]
    """The linear layers at whose output sensitivities are taken."""

    def linear(self, name: str) -> nn.Linear:
        """The linear layer of this relative name."""
        found = self.module.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return next(self.module.parameters()).device


def plan_layers(model: nn.Module, config: MBQConfig) -> tuple[DecoderView, list[LayerPlan]]:
    """View the language part of `model` and plan each of its layers.

    Raises:
        UnsupportedLayerError: for an unknown decoder, a mixture of experts, or parameters that hold no data.
        AlreadyQuantizedError: when linear layers are quantised already.
        ConfigError: when an input width does not suit the group size, or a pattern of `skip_modules` finds nothing.
    """
    _refuse_quantized(model)
    try:
        view = DecoderView.of(model)
    except ValueError as error:
        raise UnsupportedLayerError(str(error)) from None
    names = [name for name, _ in model.named_modules()]
    for pattern in config.skip_modules:
        if pattern not in DEFAULT_SKIP and not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"skip_modules: {pattern!r} is not valid: it is found in no module's name", "skip_modules"
            )
    plans = [_plan(view, layer, config) for layer in view.layers]
    for plan in plans:
        _check_widths(plan, config)
    return view, plans


def _refuse_quantized(model: nn.Module) -> None:
    foreign = getattr(model, "hf_quantizer", None) or getattr(model, "is_quantized", False)
    declared = getattr(getattr(model, "config", None), "quantization_config", None)
    if declared is not None and not foreign:
        raise AlreadyQuantizedError(
            f"the configuration of {type(model).__name__} says that it is quantised, and its layers are not: the "
            "library that packed it was not imported when it was loaded, so that its weights are random. Import that "
            "(mbq, if the method is pared-mbq) and load it again"
        )
    if foreign or any(isinstance(module, QuantLinear | FakeQuantLinear) for module in model.modules()):
        raise AlreadyQuantizedError(
            f"{type(model).__name__} is quantised already; remove the handle or load the original weights first"
        )


def _plan(view: DecoderView, layer: DecoderLayer, config: MBQConfig) -> LayerPlan:
    if not layer.mlp_projections:
        raise UnsupportedLayerError(
            f"{layer.name}: {type(layer.mlp).__name__} is no plain gated MLP (a mixture of experts?); mbq quantises "
            "dense decoder layers alone"
        )
    for name, parameter in layer.module.named_parameters():
        if parameter.device.type == "meta":
            raise UnsupportedLayerError(
                f"{layer.name}.{name} is on the meta device (offloaded?); load the model with its weights on a device"
            )
        owner = layer.module.get_submodule(name.rpartition(".")[0])
        # The convolution of linear attention follows its projections, and stays as it is.
        if parameter.dim() > 1 and not isinstance(owner, nn.Linear | nn.Conv1d):
            raise UnsupportedLayerError(
                f"{layer.name}.{name} of {type(owner).__name__} is a weight outside of nn.Linear, which mbq "
                "does not know"
            )
    names = {id(module): name for name, module in layer.module.named_modules()}

    def named(modules: Sequence[nn.Module]) -> tuple[str, ...]:
        return tuple(names[id(module)] for module in modules)

    skipped = [re.compile(pattern) for pattern in config.skip_modules]
    linears = tuple(
        name
        for name, module in layer.module.named_modules()
        if isinstance(module, nn.Linear) and not any(one.search(f"{layer.name}.{name}") for one in skipped)
    )
    attention_linears = layer.projections or layer.linear_projections
    readers = [module for role, module in attention_linears.items() if role != "output"]
    value = layer.projections.get("qkv") or layer.projections.get("value")
    if layer.projections and value is None:
        raise UnsupportedLayerError(
            f"{layer.name}: {type(layer.attention).__name__} takes its values from another layer, so that no scale can "
            "be folded into them"
        )
    output, up = attention_linears["output"], layer.mlp_projections.get("gate_up") or layer.mlp_projections["up"]
    gates = [layer.mlp_projections[role] for role in ("gate_up", "gate", "up") if role in layer.mlp_projections]
    down = layer.mlp_projections["down"]
    sites: list[Site] = []
    if "attention" in layer.norms:
        kind = norm_kind(layer.norms["attention"], f"{layer.name}: norm before attention")
        attention = names[id(layer.attention)]
        sites.append(Site("attn", names[id(layer.norms["attention"])], kind, named(readers), attention))
    repeats = view.num_key_value_groups
    # What linear attention hands to its output goes through a norm of each head: a scale there cannot be folded.
    if value is not None and (repeats == 1 or config.gqa == "shared"):
        heads = (view.num_key_value_heads, repeats)
        sites.append(Site("attn", names[id(value)], "rows", named([output]), names[id(output)], heads))
    if "mlp" in layer.norms:
        kind = norm_kind(layer.norms["mlp"], f"{layer.name}: norm before the MLP")
        sites.append(Site("mlp", names[id(layer.norms["mlp"])], kind, named(gates), names[id(layer.mlp)]))
    sites.append(Site("mlp", names[id(up)], "rows", named([down]), names[id(down)]))
    return LayerPlan(
        layer.index,
        layer.name,
        layer.module,
        layer.layer_type,
        tuple(site for site in sites if set(site.linears) & set(linears)),
        linears,
        {"attn": names[id(output)], "mlp": names[id(down)]},
    )


def norm_kind(norm: nn.Module, where: str) -> FoldKind:
    """How a norm applies its weight, found by running it: "norm" multiplies by w, "norm_plus_one" by 1 + w.

    Raises UnsupportedLayerError for a norm of another kind.
    """
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1:
        probe = torch.linspace(-1.0, 2.0, weight.shape[0], device=weight.device, dtype=torch.float32)[None]
        state = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in norm.named_parameters()}
        with torch.no_grad():
            nothing = functional_call(norm, state, (probe,))
            once = functional_call(norm, {**state, "weight": torch.ones_like(state["weight"])}, (probe,))
        if not nothing.any():
            return "norm"
        if torch.allclose(once, 2 * nothing, rtol=1e-4):
            return "norm_plus_one"
    raise UnsupportedLayerError(f"{where}: {type(norm).__name__} does not scale by its weight or by 1 + weight")


def _check_widths(plan: LayerPlan, config: MBQConfig) -> None:
    hint = "choose another group_size, or leave the module out with skip_modules"
    for name in plan.linears:
        columns = plan.linear(name).in_features
        where = f"{plan.name}.{name} has {columns} input channels"
        if config.group_size != PER_ROW and columns % config.group_size:
            raise ConfigError(
                f"group_size = {config.group_size}: {where}, which it does not divide; {hint}", "group_size"
            )
        if columns % 32:
            raise ConfigError(f"{where}, no multiple of 32, and cannot be packed; {hint}", "skip_modules")
