"""`MBQResult`: what calibration found, layer by layer, and the file it lives in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pared_hooks.files import write_whole
from torch import Tensor

from mbq.config import MBQConfig
from mbq.errors import ResultMismatchError
from mbq.fold import LayerScales
from mbq.functional import QuantizedWeight
from mbq.layers import Kind, LayerPlan

SCHEMA = "mbq.result/1"


@dataclass(frozen=True)
class ScaleGroup:
    """Linear layers that share a scale, by their full names."""

    prev: str
    """The operation before, which takes the inverse."""
    linears: tuple[str, ...]
    scale: Tensor
    """(K,), multiplies the input channels of the linear layers."""
    ratio: float
    """Exponent that was chosen."""
    losses: tuple[float, ...]
    """The objective of each candidate, exponent 0 first."""
    kind: Kind
    layer: int
    site: int
    errors: dict[str, float] = field(default_factory=dict)
    """Mean error over "answer" and "vision" tokens with this scale, and with plain rounding ("rtn answer" ...)."""


@dataclass
class MBQResult:
    """Scales of a model, with what they were found from. `quantize` turns them into weights."""

    config: MBQConfig
    architecture: str
    """Hash of the quantised layers' names and shapes."""
    num_layers: int
    groups: list[ScaleGroup] = field(default_factory=list)
    weights: list[dict[str, float | None]] = field(default_factory=list)
    """For each layer, lambda of "attn" and "mlp"; None: the plain mean."""
    sensitivity: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Mean |gradient| by "vision" and "answer", by kind and layer; NaN for a modality that did not occur."""
    clips: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, QuantizedWeight] = field(default_factory=dict)
    done: int = 0
    """Layers that are finished."""
    data: str = ""
    """Hash of the calibration tokens."""

    def layer(self, plan: LayerPlan) -> LayerScales:
        """What was found for one layer."""
        prefix = f"{plan.name}."
        return LayerScales(
            {group.site: group.scale for group in self.groups if group.layer == plan.index},
            {name.removeprefix(prefix): clip for name, clip in self.clips.items() if name.startswith(prefix)},
            {name.removeprefix(prefix): code for name, code in self.codes.items() if name.startswith(prefix)},
        )

    def errors(self) -> list[dict[str, Any]]:
        """For each group that was searched: layer, kind, names and errors by modality."""
        return [
            {"layer": group.layer, "kind": group.kind, "linears": group.linears, "ratio": group.ratio, **group.errors}
            for group in self.groups
            if group.errors
        ]

    def check(self, plans: Sequence[LayerPlan], config: MBQConfig) -> None:
        """Raise ResultMismatchError unless the result is whole and belongs to this architecture and configuration."""
        if architecture_of(plans) != self.architecture:
            raise ResultMismatchError("this result was calibrated on a model with other layers or other skip_modules")
        ours, theirs = config.calibration_fields, self.config.calibration_fields
        for name, value in ours.items():
            if theirs[name] != value:
                raise ResultMismatchError(f"this result was calibrated with {name} = {theirs[name]!r}, not {value!r}")
        if self.done < self.num_layers:
            raise ResultMismatchError(
                f"this result holds {self.done} of {self.num_layers} layers; calibrate again with the same checkpoint"
            )

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file with JSON in its header, whole or not at all."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {f"scale.{i}": group.scale for i, group in enumerate(self.groups)}
        tensors |= {f"clip.{name}": clip for name, clip in self.clips.items()}
        for name, code in self.codes.items():
            tensors |= {f"codes.{name}": code.codes, f"scales.{name}": code.scales}
            if code.zeros is not None:
                tensors[f"zeros.{name}"] = code.zeros
        groups = [{**asdict(group), "scale": None} for group in self.groups]
        header = {
            "schema": SCHEMA,
            "config": self.config.to_dict(),
            "architecture": self.architecture,
            "num_layers": self.num_layers,
            "groups": groups,
            "weights": self.weights,
            "sensitivity": self.sensitivity,
            "done": self.done,
            "data": self.data,
        }
        content = save(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, {"mbq": json.dumps(header)}
        )
        write_whole(Path(path), content)

    @classmethod
    def load(cls, path: str | Path) -> MBQResult:
        """Read what `save` wrote; raises ResultMismatchError for another file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("mbq", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ResultMismatchError(f"{path} holds no result of mbq: {error}") from None
        if header.get("schema") != SCHEMA:
            raise ResultMismatchError(f"{path} holds no result of mbq ({SCHEMA})")
        config = MBQConfig.from_dict(header["config"])
        groups = [
            ScaleGroup(**{**group, "scale": tensors[f"scale.{i}"]} | _tuples(group))
            for i, group in enumerate(header["groups"])
        ]
        named = {kind: _named(tensors, kind) for kind in ("clip", "codes", "scales", "zeros")}
        codes = {
            name: QuantizedWeight(
                found,
                named["scales"][name],
                named["zeros"].get(name),
                config.w_bits,
                config.group_size,
                config.is_symmetric,
            )
            for name, found in named["codes"].items()
        }
        kept = {name: header[name] for name in ("architecture", "num_layers", "weights", "sensitivity", "done", "data")}
        return cls(config, groups=groups, clips=named["clip"], codes=codes, **kept)


def _tuples(group: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(group[name]) for name in ("linears", "losses")}


def _named(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{kind}.")}


def architecture_of(plans: Sequence[LayerPlan]) -> str:
    """Hash of the names and shapes of the linear layers that are quantised, and of where scales are folded."""
    facts = [
        [plan.name, [[name, *plan.linear(name).weight.shape] for name in plan.linears], [s.prev for s in plan.sites]]
        for plan in plans
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def digest(tensors: Sequence[Tensor]) -> str:
    """Hash of shapes and contents of tensors."""
    sink = hashlib.sha256()
    for tensor in tensors:
        sink.update(str(tuple(tensor.shape)).encode())
        sink.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sink.hexdigest()[:16]
