"""`calibrate`: one forward pass over some text collects what the closed-form factors need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pared_hooks import ConfigError
from pared_hooks.files import write_whole
from torch import Tensor, nn

from cskv.adapters import AttentionAdapter, adapters_of
from cskv.capture import Batch, reading, run_batch
from cskv.plan import FULL

SCHEMA = "cskv.statistics/1"


@dataclass
class Statistics:
    """Sums over calibration tokens of the inputs x of each attention, in float64.

    `second_moments[i]` is the sum of x x^T (d, d), `abs_means[i]` the sum over sequences of mean_t |x_t| (d,).
    """

    second_moments: dict[int, Tensor] = field(default_factory=dict)
    abs_means: dict[int, Tensor] = field(default_factory=dict)
    tokens: int = 0
    batches: int = 0

    def second_moment(self, index: int) -> Tensor:
        """E[x x^T] of layer `index`, (d, d)."""
        return self.second_moments[index] / max(self.tokens, 1)

    def add(self, index: int, hidden_states: Tensor, mask: Tensor | None) -> None:
        """Add the inputs (B, T, d) of one layer; `mask` (B, T) is 0 for padding."""
        for row, states in enumerate(hidden_states.detach()):
            valid = states if mask is None else states[mask[row].bool()]
            if len(valid) == 0:
                continue
            exact = valid.double()
            moment, means = exact.T @ exact, exact.abs().mean(0)
            if index in self.second_moments:
                self.second_moments[index] += moment
                self.abs_means[index] += means
            else:
                self.second_moments[index], self.abs_means[index] = moment, means

    def check(self) -> None:
        """Raise ConfigError naming the layer when an entry is not finite, or when no token was seen."""
        if self.tokens == 0:
            raise ConfigError("stats hold no token; calibrate on at least one batch", "stats")
        for index, moment in self.second_moments.items():
            if not bool(torch.isfinite(moment).all() & torch.isfinite(self.abs_means[index]).all()):
                raise ConfigError(
                    f"stats of layer {index} are not finite: the model overflowed or its input did", "stats"
                )

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        from safetensors.torch import save

        tensors = {f"second_moments.{index}": tensor.cpu() for index, tensor in self.second_moments.items()}
        tensors |= {f"abs_means.{index}": tensor.cpu() for index, tensor in self.abs_means.items()}
        counts = {"schema": SCHEMA, "tokens": self.tokens, "batches": self.batches}
        write_whole(Path(path), save(tensors, metadata={"cskv": json.dumps(counts)}))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote; raises ConfigError for another file."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            counts = json.loads((file.metadata() or {}).get("cskv", "{}"))
            if counts.get("schema") != SCHEMA:
                raise ConfigError(f"{path} holds no statistics of cskv ({SCHEMA})", "stats")
            statistics = cls(tokens=int(counts["tokens"]), batches=int(counts["batches"]))
            for name in file.keys():  # noqa: SIM118 (no mapping)
                kind, index = name.split(".")
                getattr(statistics, kind)[int(index)] = file.get_tensor(name)
        return statistics


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    accelerator: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 16,
    track: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
) -> Statistics:
    """Run `model` over `batches` and sum up the inputs of every full-attention layer (section 3.2).

    A batch is a tensor of token ids (B, T), or a mapping of model inputs whose `attention_mask` leaves out padding.
    Nothing is trained and the model is left as it was. With an `accelerate.Accelerator` the batches are shared out
    among its processes and every process gets the sums over all. With `checkpoint`, sums are written there every so
    many batches, and an interrupted run given the same batches continues from them. `track` wraps the batches to show
    progress.

    Raises ConfigError for batches without tokens or statistics that are not finite, `UnsupportedAttentionError` for an
    unknown model.
    """
    view, adapters = adapters_of(model)
    chosen = [adapter for adapter in adapters if adapter.layer_type == FULL]
    place, count = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and count > 1:
        path = path.with_name(f"{path.stem}-{place}of{count}{path.suffix}")
    statistics = Statistics.load(path) if path is not None and path.is_file() else Statistics()
    seen = statistics.batches
    mask: Tensor | None = None

    def read(adapter: AttentionAdapter, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> None:
        statistics.add(adapter.index, hidden_states, mask)

    with reading(chosen, read):
        for number, batch in enumerate(track(batches)):
            if number < seen:
                continue
            if number % count == place:
                mask = batch.get("attention_mask") if not isinstance(batch, Tensor) else None
                run_batch(view, batch)
                ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
                statistics.tokens += ids.numel() if mask is None else int(mask.bool().sum())
            statistics.batches = number + 1
            if path is not None and statistics.batches % checkpoint_every == 0:
                statistics.save(path)
    if accelerator is not None and count > 1:
        _reduce(statistics, accelerator)
    statistics.check()
    if path is not None and count == 1:
        statistics.save(path)
    return statistics


def _reduce(statistics: Statistics, accelerator: Any) -> None:
    """Sum over processes, in place."""
    device = accelerator.device
    for sums in (statistics.second_moments, statistics.abs_means):
        for index, tensor in sums.items():
            sums[index] = accelerator.reduce(tensor.to(device), reduction="sum").to(tensor.device)
    tokens = torch.tensor([statistics.tokens], dtype=torch.int64, device=device)
    statistics.tokens = int(accelerator.reduce(tokens, reduction="sum"))
