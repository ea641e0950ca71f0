"""`calibrate`: sensitivities from one backward pass, then scales layer by layer; the model is never changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pared_hooks import DecoderView
from torch import Tensor, nn

from mbq.activations import InputSums, Stream
from mbq.batches import Batch, capture, masks
from mbq.config import MBQConfig
from mbq.errors import CalibrationError, ResultMismatchError
from mbq.fold import LayerScales, quantized_state
from mbq.functional import layer_weights
from mbq.gptq import gptq
from mbq.layers import LayerPlan, plan_layers
from mbq.processes import Processes
from mbq.result import MBQResult, ScaleGroup, architecture_of, digest
from mbq.search import Found, LayerSearch, Weighting
from mbq.sensitivity import Sensitivity, measure_sensitivity

Track = Callable[[Iterable[Any]], Iterable[Any]]
KINDS = ("attn", "mlp")


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: MBQConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    device: torch.device | str | None = None,
    accelerator: Any = None,
    track: Track = lambda items: items,
) -> MBQResult:
    """Find the scales of every decoder layer of `model` on some samples (sections 3.3 to 3.6).

    A batch is what the model's processor returns with `labels` added (-100 outside the answer), or token ids (B, T),
    which are text that is all answer. Padding is left out by `attention_mask`. Vision tokens are found by themselves; a
    batch may bring `vision_mask` and `answer_mask`, bool (B, T).

    With `checkpoint` a file is written after every layer, and an interrupted run on the same data goes on from it. With
    `device` each layer moves there while it is searched, so that one layer and its activations are all that is held
    there. With an `accelerate.Accelerator` the batches are shared out among its processes. `track` wraps the layers to
    show progress. The model may be spread by `device_map`, but not offloaded.

    Raises:
        CalibrationError: without answer tokens, or for activations or gradients that are not finite.
        UnsupportedLayerError, AlreadyQuantizedError, ConfigError: for a model that cannot be quantised so.
        ResultMismatchError: for a checkpoint of another model, configuration or data.
    """
    config = config or MBQConfig()
    view, plans = plan_layers(model, config)
    processes = Processes(accelerator)
    every = [] if config.method == "rtn" else list(batches)
    mine = processes.share(every) if every else []
    found = [masks(view, batch, config.answer_positions) for batch in every]
    if config.method != "rtn":
        _require_answers(config, found)
    data = digest([mask for each in found for mask in each] + [_ids(batch) for batch in every])
    result = MBQResult(config, architecture_of(plans), len(plans), data=data)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.is_file():
        result = _resume(path, result, plans)
    if config.method == "rtn":
        result.weights, result.done = [dict.fromkeys(KINDS) for _ in plans], len(plans)
        return result
    sensitivity = None
    if config.needs_gradients and (not result.sensitivity or config.method == "token"):
        sensitivity = measure_sensitivity(
            view, plans, mine, config.method == "token", processes, config.answer_positions
        )
        result.sensitivity = {
            "vision": {kind: sensitivity.vision[kind] for kind in sensitivity.vision},
            "answer": {kind: sensitivity.answer[kind] for kind in sensitivity.answer},
        }
    result.weights = _lambdas(config, result.sensitivity, len(plans))
    _search_layers(view, plans, mine, config, result, sensitivity, processes, path, device, track)
    return result


def _ids(batch: Batch) -> Tensor:
    found = batch if isinstance(batch, Tensor) else batch.get("input_ids", batch.get("inputs_embeds"))
    return found if isinstance(found, Tensor) else torch.zeros(0, dtype=torch.int64)


def _require_answers(config: MBQConfig, found: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    if not any(bool(valid.any()) for _, _, valid in found):
        raise CalibrationError("batches: there is no token to calibrate on")
    if config.needs_answers:
        if not any(bool(answer.any()) for answer, _, _ in found):
            raise CalibrationError(
                f"batches: no answer tokens for method = {config.method!r}; add labels with -100 outside the answer"
            )
        if config.method == "mbq" and not any(
            bool((vision.any(1) & answer.any(1)).any()) for answer, vision, _ in found
        ):
            warnings.warn(
                "no calibration sample with an answer has vision tokens: there is nothing to balance, and errors are "
                "averaged plainly, as method='awq' does",
                stacklevel=3,
            )


def _resume(path: Path, fresh: MBQResult, plans: list[LayerPlan]) -> MBQResult:
    kept = MBQResult.load(path)
    same = kept.config.calibration_fields == fresh.config.calibration_fields
    if not same or kept.architecture != fresh.architecture or kept.data != fresh.data:
        what = "configuration" if not same else "model" if kept.architecture != fresh.architecture else "data"
        raise ResultMismatchError(f"{path} belongs to another {what}; remove it or choose another checkpoint")
    return kept


def _lambdas(config: MBQConfig, sensitivity: dict[str, dict[str, list[float]]], layers: int) -> list[Any]:
    if config.vision_weight is not None:
        return [dict.fromkeys(KINDS, config.vision_weight) for _ in range(layers)]
    if config.method != "mbq" or any(value != value for value in sensitivity["vision"]["attn"]):
        return [dict.fromkeys(KINDS) for _ in range(layers)]
    found = {
        kind: layer_weights(sensitivity["vision"][kind], sensitivity["answer"][kind], config.ratio_floor)
        for kind in KINDS
    }
    return [{kind: found[kind][index] for kind in KINDS} for index in range(layers)]


def _search_layers(
    view: DecoderView,
    plans: list[LayerPlan],
    batches: list[Batch],
    config: MBQConfig,
    result: MBQResult,
    sensitivity: Sensitivity | None,
    processes: Processes,
    path: Path | None,
    device: torch.device | str | None,
    track: Track,
) -> None:
    full = Stream(
        [sample for batch in batches for sample in capture(view, batch, config.answer_positions)], config.batch_size
    )
    distorted = full.copy() if config.distort else None
    for plan in track(plans):
        with _placed(plan, device):
            if plan.index >= result.done:
                layer = _search_layer(plan, full, distorted, config, result, sensitivity, processes)
                result.done = plan.index + 1
                if path is not None and processes.is_main:
                    result.save(path)
            else:
                layer = result.layer(plan)
            if plan.index + 1 == len(plans):
                break
            full.run(plan, advance=True)
            if distorted is not None:
                distorted.run(plan, (), quantized_state(plan, layer, config), config.a_bits, advance=True)


def _search_layer(
    plan: LayerPlan,
    full: Stream,
    distorted: Stream | None,
    config: MBQConfig,
    result: MBQResult,
    sensitivity: Sensitivity | None,
    processes: Processes,
) -> LayerScales:
    if config.method == "gptq":
        layer = LayerScales(codes=_gptq_codes(plan, full, config, processes))
        result.codes |= {f"{plan.name}.{name}": code for name, code in layer.codes.items()}
        return layer
    by_token = None
    if config.method == "token":
        assert sensitivity is not None
        by_token = {kind: [layers[plan.index] for layers in sensitivity.tokens[kind]] for kind in sensitivity.tokens}
    weighting = Weighting(result.weights[plan.index], by_token)  # type: ignore[arg-type]
    layer, found = LayerSearch(plan, full, distorted, weighting, config, processes).run()
    result.groups += _groups(plan, found)
    result.clips |= {f"{plan.name}.{name}": clip.cpu() for name, clip in layer.clips.items()}
    return layer


def _groups(plan: LayerPlan, found: list[Found]) -> Iterator[ScaleGroup]:
    for number, (site, one) in enumerate(zip(plan.sites, found, strict=True)):
        names = tuple(f"{plan.name}.{name}" for name in site.linears)
        scale = one.scale.detach().cpu()
        yield ScaleGroup(
            f"{plan.name}.{site.prev}", names, scale, one.ratio, one.losses, site.kind, plan.index, number, one.errors
        )


def _gptq_codes(plan: LayerPlan, full: Stream, config: MBQConfig, processes: Processes) -> dict[str, Any]:
    calls = full.run(plan, plan.linears)
    codes = {}
    for name in plan.linears:
        linear = plan.linear(name)
        sums = InputSums(linear.in_features, moments=True)
        for batch in calls:
            sums.add(batch.calls[name].hidden)
        assert sums.moment is not None
        code = gptq(linear.weight, processes.sum(sums.moment), config)
        zeros = None if code.zeros is None else code.zeros.cpu()
        codes[name] = code._replace(codes=code.codes.cpu(), scales=code.scales.cpu(), zeros=zeros)
    return codes


@contextmanager
def _placed(plan: LayerPlan, device: torch.device | str | None) -> Iterator[None]:
    """Hold the layer on `device` inside the block; None leaves it where it is."""
    before = plan.device
    if device is None or torch.device(device) == before:
        yield
        return
    plan.module.to(device)
    try:
        yield
    finally:
        plan.module.to(before)
