"""`quantize`: fold the scales into a model and put packed (or rounded) linear layers into place, reversibly."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pared_hooks import ConfigError, Handle, Patch
from torch import Tensor, nn
from torch.func import functional_call

from mbq.batches import Batch, Sample, capture, joined
from mbq.calibrate import calibrate
from mbq.config import PER_ROW, MBQConfig
from mbq.errors import FoldError, RestoreUnavailableError
from mbq.fold import LayerScales, folded_state, quantized_weights
from mbq.hf import mark_quantized
from mbq.layers import LayerPlan, plan_layers
from mbq.modules import FakeQuantLinear, QuantLinear
from mbq.result import MBQResult

Mode = Literal["packed", "fake"]
Restore = Literal["cpu", "none"]
GUARD_TOLERANCE = 1e-3
GUARD_TOKENS = 8


class MBQHandle(Handle):
    """mbq on a model: what it costs and does, and the way back."""

    def __init__(self, patch: Patch, plans: list[LayerPlan], result: MBQResult, restore: Restore) -> None:
        super().__init__(patch)
        self.result = result
        self.restore = restore
        self._plans = plans

    def stats(self) -> dict[str, Any]:
        """Bits per weight with scales and zero points, bytes of the quantised layers, and errors by modality.

        "error" holds for each layer and kind the mean |D| (or D^2) over answer and vision tokens that the search saw,
        of the chosen scale and of plain rounding.
        """
        return {**stats_of(self._plans), "error": self.result.errors()}

    def remove(self) -> None:
        """Put the original weights back, bit for bit; a second call does nothing.

        Raises RestoreUnavailableError when they were given up.
        """
        if self.restore == "none" and self.applied:
            raise RestoreUnavailableError(
                'the original weights were given up with restore="none"; load the model again'
            )
        super().remove()


def quantize(
    model: nn.Module,
    result: MBQResult | Iterable[Batch],
    config: MBQConfig | None = None,
    mode: Mode = "packed",
    restore: Restore = "cpu",
    **calibration: Any,
) -> MBQHandle:
    """Quantise the linear layers of the language part of `model` with what calibration found.

    Args:
        model: a model of transformers; changed in place.
        result: what `calibrate` returned, or the batches to calibrate on (further keywords go to `calibrate`).
        config: must agree with the result's on all that matters; None: that of the result.
        mode: "packed" stores codes and runs kernels; "fake" stores dequantised weights, for research.
        restore: "cpu" keeps the original weights in the CPU's memory for `remove`; "none" gives them up.

    Raises:
        ConfigError: for a configuration that cannot be packed.
        ResultMismatchError: for a result of another model or configuration.
        FoldError: when folding changes what a layer computes; the model is then as it was.
        UnsupportedLayerError, AlreadyQuantizedError: as `calibrate`.
    """
    if mode not in ("packed", "fake"):
        raise ConfigError(f"mode = {mode!r} is not valid: 'packed' or 'fake'", "mode")
    if restore not in ("cpu", "none"):
        raise ConfigError(f"restore = {restore!r} is not valid: 'cpu' or 'none'", "restore")
    if not isinstance(result, MBQResult):
        config = config or MBQConfig()
        if mode == "packed":
            require_packable(config)
        result = calibrate(model, result, config, **calibration)
    elif calibration:
        raise TypeError(f"{sorted(calibration)[0]} is for calibration, and a finished result was given")
    config = config or result.config
    if mode == "packed":
        require_packable(config)
    view, plans = plan_layers(model, config)
    result.check(plans, config)
    sample = _probe(view)
    # All layers are tried before the first is changed, since weights that are given up cannot come back.
    for plan in plans:
        _guard(plan, folded_state(plan, result.layer(plan).scales), sample)
    patch = Patch("mbq")
    with patch:
        for plan in plans:
            patch.claim(plan.module, "decoder.weights")
            _quantize_layer(plan, result.layer(plan), config, mode, restore, patch)
        mark_quantized(view.root, plans, config, mode, patch)
    return MBQHandle(patch, plans, result, restore)


def apply(
    model: nn.Module,
    config: MBQConfig | None,
    batches: Iterable[Batch],
    mode: Mode = "packed",
    restore: Restore = "cpu",
    **calibration: Any,
) -> MBQHandle:
    """Calibrate on `batches` and quantise: `calibrate` and `quantize` in one."""
    return quantize(model, batches, config or MBQConfig(), mode, restore, **calibration)


def require_packable(config: MBQConfig) -> None:
    """Raise ConfigError unless weights can be stored packed and run by a kernel."""
    config.check(
        config.group_size == PER_ROW or config.group_size % 32 == 0,
        "group_size",
        config.group_size,
        '-1 or a multiple of 32 to be packed; use mode="fake"',
    )
    config.check(
        config.scale_dtype != "float32", "scale_dtype", config.scale_dtype, 'float16 or bfloat16; use mode="fake"'
    )
    config.check(
        config.a_bits == 16 or config.w_bits == 4,
        "w_bits",
        config.w_bits,
        '4 with 8-bit inputs, which is what the integer kernel takes; use mode="fake"',
    )


def _probe(view: Any) -> Sample:
    """Random hidden states with the arguments that the decoder calls its layers with."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, GUARD_TOKENS, view.hidden_size, generator=generator)
    weight = next(view.embed.parameters())
    batch = {"inputs_embeds": embeds.to(weight), "answer_mask": torch.ones(1, GUARD_TOKENS)}
    return capture(view, batch)[0]


@torch.no_grad()
def _quantize_layer(
    plan: LayerPlan,
    found: LayerScales,
    config: MBQConfig,
    mode: Mode,
    restore: Restore,
    patch: Patch,
) -> None:
    folded = folded_state(plan, found.scales)
    weights = quantized_weights(plan, found, config, folded)
    parameters = dict(plan.module.named_parameters())
    quantised = {f"{name}.{part}" for name in plan.linears for part in ("weight", "bias")}
    for name, value in folded.items():
        if name not in quantised:
            _set_parameter(plan.module, name, value.to(parameters[name]), restore, patch)
    for name, weight in weights.items():
        linear = plan.linear(name)
        bias = folded.get(f"{name}.bias", linear.bias)
        moved = weight._replace(
            codes=weight.codes.to(linear.weight.device),
            scales=weight.scales.to(linear.weight.device),
            zeros=None if weight.zeros is None else weight.zeros.to(linear.weight.device),
        )
        new: nn.Module
        if mode == "packed":
            new = QuantLinear.pack(moved, bias, config.a_bits, linear.weight.dtype)
        else:
            new = FakeQuantLinear.round(linear, moved, bias, config.a_bits)
        new.train(linear.training)
        _swap(plan.module, name, new, restore, patch)


@torch.no_grad()
def _guard(plan: LayerPlan, folded: dict[str, Tensor], sample: Sample) -> None:
    """Raise FoldError unless the folded layer computes in float32 what the layer did, within 1e-3."""
    if not folded:
        return
    exact = copy.deepcopy(plan.module).float()
    hidden = sample.hidden.to(plan.device, torch.float32)
    arguments = {
        name: _widened(joined([value], GUARD_TOKENS, plan.device))
        for name, value in sample.arguments[plan.layer_type].items()
    }
    before: Any = exact(hidden, **arguments)
    after: Any = functional_call(exact, folded, (hidden,), arguments)
    before, after = (one[0] if isinstance(one, tuple) else one for one in (before, after))
    error = float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
    if not error <= GUARD_TOLERANCE:
        where = "; ".join(f"{site.prev} -> {', '.join(site.linears)}" for site in plan.sites)
        raise FoldError(
            f"{plan.name}: folding changes the layer's output by {error:.1e} (limit {GUARD_TOLERANCE:g}), so that an "
            f"operation between these does not let a scale through: {where}"
        )


def _widened(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_widened(one) for one in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _swap(layer: nn.Module, name: str, new: nn.Module, restore: Restore, patch: Patch) -> None:
    parent = layer.get_submodule(name.rpartition(".")[0])
    child = name.rpartition(".")[2]
    old = parent._modules[child]
    assert old is not None
    parent._modules[child] = new
    if restore == "none":
        return
    old.to("cpu")

    def put_back() -> None:
        # The model may have moved meanwhile; the dtype is that of the original weights.
        parent._modules[child] = old.to(next(iter([*new.buffers(), *new.parameters()])).device)

    patch.on_remove(put_back)


def _set_parameter(layer: nn.Module, name: str, value: Tensor, restore: Restore, patch: Patch) -> None:
    owner = layer.get_submodule(name.rpartition(".")[0])
    parameter = owner._parameters[name.rpartition(".")[2]]
    assert parameter is not None
    old = parameter.detach().to("cpu", copy=True)
    parameter.data.copy_(value)
    if restore == "none":
        return

    def put_back() -> None:
        parameter.data = old.to(parameter.device)

    patch.on_remove(put_back)


def stats_of(plans: list[LayerPlan]) -> dict[str, Any]:
    """Sizes of the quantised linear layers, from the tensors that are there."""
    stored, weights, count = 0, 0, 0
    for plan in plans:
        for name in plan.linears:
            module = plan.module.get_submodule(name)
            rows, columns = module.out_features, module.in_features
            assert isinstance(rows, int)
            assert isinstance(columns, int)
            count, weights = count + 1, weights + rows * columns
            if isinstance(module, QuantLinear):
                stored += module.stored_bytes
            else:
                weight = module.weight
                assert isinstance(weight, Tensor)
                stored += weight.nbytes
    return {
        "layers": len(plans),
        "modules": count,
        "weights": weights,
        "bytes": stored,
        "bytes_16bit": 2 * weights,
        "bits_per_weight": 8 * stored / max(weights, 1),
    }
