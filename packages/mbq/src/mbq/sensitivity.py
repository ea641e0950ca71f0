"""How much the loss depends on vision and on answer tokens: one backward pass over the calibration samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pared_hooks import DecoderView, Patch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mbq.batches import Batch, masks, model_inputs
from mbq.errors import CalibrationError
from mbq.functional import token_sensitivity
from mbq.layers import Kind, LayerPlan
from mbq.processes import Processes


@dataclass
class Sensitivity:
    """Mean |gradient| at the output of each layer's attention and MLP, averaged over samples (section 3.3)."""

    vision: dict[Kind, list[float]]
    answer: dict[Kind, list[float]]
    tokens: dict[Kind, list[list[Tensor]]] = field(default_factory=dict)
    """Mean |gradient| over channels for each token (T,), by kind, sample and layer; kept for method "token" alone."""

    @property
    def has_vision(self) -> bool:
        """Whether any sample had vision tokens."""
        return all(math.isfinite(value) for values in self.vision.values() for value in values)


def measure_sensitivity(
    view: DecoderView,
    plans: list[LayerPlan],
    batches: Iterable[Batch],
    keep_tokens: bool = False,
    processes: Processes | None = None,
    positions: str = "answer",
) -> Sensitivity:
    """Back-propagate the answers' cross-entropy and average |gradient| by modality; the model is left as it was.

    The loss of a batch is the sum over its rows of the mean over their answer tokens, so rows do not depend on each
    other. Only gradients of activations are computed, and each layer's own activations are recomputed.

    Raises CalibrationError, naming layer and sample, for a gradient that is not finite.
    """
    kinds: tuple[Kind, ...] = ("attn", "mlp")
    # Sums and counts of samples: (kind, layer, modality, 2).
    totals = torch.zeros(len(kinds), len(plans), 2, 2, dtype=torch.float64)
    tokens: dict[Kind, list[list[Tensor]]] = {kind: [] for kind in kinds}
    number = 0
    for batch in batches:
        answer, vision, valid = masks(view, batch, positions)
        found = _gradients(view, plans, batch, masks(view, batch)[0])
        for k, kind in enumerate(kinds):
            kept: list[list[Tensor]] = [[] for _ in range(len(valid))]
            for plan in plans:
                grad = found[kind, plan.index]
                for row in range(len(valid)):
                    if answer[row].any() and not bool(torch.isfinite(grad[row][valid[row].to(grad.device)]).all()):
                        raise CalibrationError(
                            f"the gradient at {plan.name}.{plan.outputs[kind]} is not finite for sample "
                            f"{number + row}; a float16 model can overflow here: calibrate in bfloat16"
                        )
                answered = answer.any(1)
                for m, mask in enumerate((vision, answer)):
                    means = token_sensitivity(grad, mask.to(grad.device)).cpu().double()
                    fine = answered & means.isfinite()
                    totals[k, plan.index, m] += torch.tensor([float(means[fine].sum()), float(fine.sum())])
                if keep_tokens:
                    per_token = grad.float().abs().mean(-1).cpu()
                    for row, keep in enumerate(valid):
                        kept[row].append(per_token[row, keep])
            tokens[kind] += [layers for layers, keep in zip(kept, valid, strict=True) if keep.any()]
        number += len(valid)
    totals = totals if processes is None else processes.sum(totals)
    means = totals[..., 0] / totals[..., 1]
    return Sensitivity(
        {kind: means[k, :, 0].tolist() for k, kind in enumerate(kinds)},
        {kind: means[k, :, 1].tolist() for k, kind in enumerate(kinds)},
        tokens if keep_tokens else {},
    )


def _gradients(
    view: DecoderView, plans: list[LayerPlan], batch: Batch, answer: Tensor
) -> dict[tuple[Kind, int], Tensor]:
    """Gradient (B, T, C) of the loss at the inspected output of every layer."""
    root: Any = view.root
    if view.head is None:
        raise CalibrationError("gradients need a model with a language head; pass the whole model, not its decoder")
    inputs = model_inputs(batch, next(view.embed.parameters()).device)
    ids = inputs.get("input_ids")
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    targets = labels if isinstance(labels, Tensor) else ids
    if targets is None:
        raise CalibrationError("batches: gradients need labels, or input_ids with an answer_mask")
    found: dict[tuple[Kind, int], Tensor] = {}
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    mode = [(module, module.training) for module in root.modules() if module.training]
    patch = Patch("mbq.sensitivity")

    def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    def keep(place: tuple[Kind, int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            # A layer that is recomputed for the backward pass comes by again; its gradients do not.
            if output.requires_grad:
                output.register_hook(lambda grad: found.__setitem__(place, grad.detach()))

        return hook

    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for module, _ in mode:
            module.training = False
        with patch, torch.enable_grad():
            patch.add_hook(view.embed, "forward", leaf)
            for plan in plans:
                patch.wrap_forward(plan.module, _checkpointed)
                for kind, name in plan.outputs.items():
                    patch.add_hook(plan.module.get_submodule(name), "forward", keep((kind, plan.index)))
            if "inputs_embeds" in inputs:
                inputs["inputs_embeds"] = inputs["inputs_embeds"].detach().requires_grad_()
            logits = root(**inputs, use_cache=False).logits
            _loss(logits, targets.to(logits.device), answer.to(logits.device)).backward()
    finally:
        patch.remove()
        for module, training in mode:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)
    missing = [plan.name for plan in plans for kind in plan.outputs if (kind, plan.index) not in found]
    if missing:
        raise CalibrationError(f"no gradient reached {missing[0]}; is the sample longer than its answer's context?")
    return found


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _loss(logits: Tensor, targets: Tensor, answer: Tensor) -> Tensor:
    """Sum over rows of the mean cross-entropy of the row's answer tokens, each predicted from the token before."""
    wanted = answer[:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets[:, 1:].masked_fill(~wanted, -100), reduction="none"
    )
    return (losses.sum(1) / wanted.sum(1).clamp(min=1)).sum()
