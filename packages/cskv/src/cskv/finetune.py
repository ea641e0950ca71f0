"""`finetune`: layer-wise regression of the factors, with the quantiser in the loop (section 3.3 and 3.5)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pared_hooks import ConfigError
from pared_hooks.files import write_whole
from torch import Tensor, nn

from cskv.adapters import AttentionAdapter
from cskv.capture import Batch, reading, run_batch
from cskv.config import CSKVConfig
from cskv.factors import Factors, LayerFactors, check_factors
from cskv.functional import fake_quantize
from cskv.plan import LayerPlan, plan_layers
from cskv.storage import QuantizationPlan

SCHEMA = "cskv.finetune/1"
MOMENTS = ("exp_avg", "exp_avg_sq")


class LayerRegression:
    """Factors of one layer in training: AdamW on the two reconstruction errors, which share nothing between layers."""

    def __init__(self, plan: LayerPlan, factors: LayerFactors, learning_rate: float, accelerator: Any) -> None:
        self.plan = plan
        self._maps = [(weight.float(), None if bias is None else bias.float()) for weight, bias in plan.adapter.maps()]
        device = self._maps[0][0].device
        self.parameters = {
            name: nn.Parameter(getattr(factors, name).detach().to(device, torch.float32, copy=True))
            for side in ("k", "v")
            if plan.rank(side) is not None
            for name in (f"a_{side}", f"b_{side}")
        }
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=learning_rate, weight_decay=0.0)
        self._accelerator = accelerator

    def losses(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
        """Mean squared error of rotated keys ("k") and of values ("v"), for the sides that have factors.

        `hidden_states`: (B, T, d); `cos`, `sin`: (B or 1, T, D_rot). Equals `functional.reconstruction_loss`, and also
        applies a family's norm of keys.
        """
        adapter = self.plan.adapter
        x = hidden_states.detach().float()
        found = {}
        for side, (weight, bias), quantization in zip(
            ("k", "v"), self._maps, (self.plan.k_quantization, self.plan.v_quantization), strict=True
        ):
            if self.plan.rank(side) is None:
                continue
            latents = nn.functional.linear(x, self.parameters[f"a_{side}"])
            rebuilt = nn.functional.linear(_rounded(latents, quantization), self.parameters[f"b_{side}"], bias)
            exact = nn.functional.linear(x, weight, bias)
            if side == "k":
                rebuilt, exact = (adapter.finish_keys(one, cos.float(), sin.float()) for one in (rebuilt, exact))
            found[side] = nn.functional.mse_loss(rebuilt, exact)
        return found

    def step(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, share_left: float) -> float:
        """One step of AdamW with the learning rate times `share_left`; returns the sum of the losses before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * share_left
        with torch.enable_grad():
            loss = torch.stack(list(self.losses(hidden_states, cos, sin).values())).sum()
            self.optimizer.zero_grad()
            loss.backward()
        if not bool(torch.isfinite(loss)):
            raise ConfigError(
                f"the loss of layer {self.plan.index} is not finite; lower learning_rate ({self.learning_rate:g})",
                "learning_rate",
            )
        if self._accelerator is not None:
            for parameter in self.parameters.values():
                parameter.grad = self._accelerator.reduce(parameter.grad, reduction="mean")
        self.optimizer.step()
        return float(loss.detach())

    def factors(self, like: LayerFactors) -> LayerFactors:
        """The factors as they are now, in the dtype and on the device of `like`."""
        return LayerFactors(
            **{name: parameter.detach().to(getattr(like, name)) for name, parameter in self.parameters.items()}
        )

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments of the optimizer, by name."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[name] = parameter.detach().cpu()
            moments = self.optimizer.state[parameter]
            tensors |= {f"{name}.{moment}": moments[moment].cpu() for moment in MOMENTS if moment in moments}
        return tensors

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Go on from what `state` gave after `step` steps."""
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[name])
            moments = {moment: tensors[f"{name}.{moment}"].to(parameter) for moment in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}


def finetune(
    model: nn.Module,
    config: CSKVConfig,
    factors: Factors | Sequence[Any],
    batches: Sequence[Batch],
    *,
    steps: int | None = None,
    learning_rate: float = 5e-5,
    cache_inputs: bool = False,
    accelerator: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 20,
    track: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> Factors:
    """Train the factors to rebuild keys and values as they will be stored, quantised if `config` says so (section 3.3).

    The model is frozen and attends exactly, so every layer is a regression of its own and no loss of the language model
    is involved. A step takes one batch, a tensor of token ids (B, T) or a mapping of model inputs without padding;
    `steps` goes round the batches, once by default. The learning rate falls linearly to zero. With quantisation, the
    length is cut to whole groups of tokens. `cache_inputs` runs the model once over the batches and keeps what its
    attentions receive (4 bytes x d x tokens x layers): the way to take many steps on little text. With an
    `accelerate.Accelerator`, its processes take different batches and average gradients. With `checkpoint`, an
    interrupted run continues from that file.

    Returns new factors. Raises ConfigError for factors that do not fit, batches that are empty, padded or shorter than
    a group, a learning rate that is not positive, and a loss that is not finite.
    """
    view, plans = plan_layers(model, config)
    checked = check_factors(factors, plans)
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate = {learning_rate!r} is not valid: above 0", "learning_rate")
    if len(batches) == 0:
        raise ConfigError("batches are empty; give at least one", "batches")
    total = len(batches) if steps is None else steps
    if total < 1:
        raise ConfigError(f"steps = {steps!r} is not valid: at least 1", "steps")
    lengths = [_length(batch, config) for batch in batches]
    layers = {
        plan.index: LayerRegression(plan, checked[plan.index], learning_rate, accelerator)
        for plan in plans
        if plan.k_rank is not None or plan.v_rank is not None
    }
    place, count = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    path = None if checkpoint is None else Path(checkpoint)
    begin = _restore(path, layers)
    adapters = [layer.plan.adapter for layer in layers.values()]
    kept = _inputs(view, adapters, batches, lengths) if cache_inputs else None
    step, number = begin, 0

    def train(adapter: AttentionAdapter, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> None:
        length = lengths[number]
        rows = hidden_states[:, :length], cos[:, :length], sin[:, :length]
        layers[adapter.index].step(*rows, share_left=1 - step / total)

    for step in track(range(begin, total)):
        number = (step * count + place) % len(batches)
        if kept is not None:
            for adapter in adapters:
                train(adapter, *kept[number][adapter.index])
        else:
            with reading(adapters, train):
                run_batch(view, batches[number])
        if path is not None and place == 0 and ((step + 1) % checkpoint_every == 0 or step + 1 == total):
            _save(path, layers, step + 1)
    trained = {index: layers[index].factors(checked[index]) if index in layers else checked[index] for index in checked}
    return Factors(trained, checked.fingerprints)


def _rounded(latents: Tensor, plan: QuantizationPlan | None) -> Tensor:
    if plan is None:
        return latents
    return fake_quantize(
        latents, bits=plan.bits, axis=plan.axis, group_size=plan.group_size, zero_point=plan.zero_point
    )


def _length(batch: Batch, config: CSKVConfig) -> int:
    """Tokens of a batch that are trained on."""
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    if not isinstance(batch, Tensor):
        mask = batch.get("attention_mask")
        if mask is not None and not bool(mask.bool().all()):
            raise ConfigError("batches: attention_mask has padding; give sequences of one length", "batches")
    length = ids.shape[-1]
    if config.k_bits is not None or config.v_bits is not None:
        length -= length % config.quant_group
    if length == 0:
        raise ConfigError(
            f"batches: {ids.shape[-1]} tokens are fewer than quant_group = {config.quant_group}", "batches"
        )
    return length


def _inputs(
    view: Any, adapters: list[AttentionAdapter], batches: Sequence[Batch], lengths: list[int]
) -> list[dict[int, tuple[Tensor, Tensor, Tensor]]]:
    """What every attention receives, by batch and layer."""
    kept: list[dict[int, tuple[Tensor, Tensor, Tensor]]] = []

    def read(adapter: AttentionAdapter, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> None:
        length = lengths[len(kept) - 1]
        kept[-1][adapter.index] = (hidden_states[:, :length].detach(), cos[:, :length], sin[:, :length])

    with reading(adapters, read):
        for batch in batches:
            kept.append({})
            run_batch(view, batch)
    return kept


def _save(path: Path, layers: dict[int, LayerRegression], step: int) -> None:
    from safetensors.torch import save

    tensors = {
        f"{index}.{name}": tensor.contiguous()
        for index, layer in layers.items()
        for name, tensor in layer.state().items()
    }
    write_whole(path, save(tensors, metadata={"cskv": json.dumps({"schema": SCHEMA, "step": step})}))


def _restore(path: Path | None, layers: dict[int, LayerRegression]) -> int:
    """Load a checkpoint if there is one; returns the number of steps that are done."""
    from safetensors import safe_open

    if path is None or not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        document = json.loads((file.metadata() or {}).get("cskv", "{}"))
        names = set(file.keys())
        expected = {f"{index}.{name}" for index, layer in layers.items() for name in layer.parameters}
        if document.get("schema") != SCHEMA or not expected <= names:
            raise ConfigError(f"{path} is no checkpoint of this finetuning; move it away to begin anew", "checkpoint")
        step = int(document["step"])
        for index, layer in layers.items():
            prefix = f"{index}."
            layer.restore(
                {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}, step
            )
    return step
