"""`Factors`: the matrices A and B of every compressed layer, their fingerprint, and the files they live in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pared_hooks import ConfigError
from pared_hooks.files import write_whole
from torch import Tensor

from cskv.config import CSKVConfig
from cskv.plan import LayerPlan

SCHEMA = "cskv.factors/1"
SKETCH_SIZE = 16
TOLERANCE = 0.01
"""Relative difference of fingerprints that a cast to another dtype may cause, and another model will exceed."""


@dataclass(frozen=True)
class LayerFactors:
    """A (rank, d) and B (d_kv, rank) of keys and values; None for a side that is kept exactly."""

    a_k: Tensor | None = None
    b_k: Tensor | None = None
    a_v: Tensor | None = None
    b_v: Tensor | None = None

    def side(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """(A, B) of the side "k" or "v"."""
        return (self.a_k, self.b_k) if name == "k" else (self.a_v, self.b_v)


@dataclass(frozen=True)
class Factors:
    """Factors by number of the layer. `fingerprints` tell which W_K they were made for; empty when it is not known."""

    layers: Mapping[int, LayerFactors]
    fingerprints: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> LayerFactors:
        return self.layers[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in _named(layer).values())


def fingerprint(weight: Tensor) -> tuple[float, ...]:
    """A short sketch of W_K: random sums of its entries, over their expected size.

    Unlike a checksum it survives a cast of the model to another floating-point type. `weight`: (d_kv, d).
    """
    generator = torch.Generator().manual_seed(0)
    exact = weight.detach().to("cpu", torch.float32)
    right = torch.randn(exact.shape[1], generator=generator)
    left = torch.randn(SKETCH_SIZE, exact.shape[0], generator=generator)
    return tuple((left @ (exact @ right)).tolist())


def check_factors(factors: Factors | Sequence[Any], plans: Sequence[LayerPlan]) -> Factors:
    """`factors` for `plans`: a `Factors`, or one (A_K, B_K, A_V, B_V) for each compressed layer in order.

    Raises ValueError naming layer and expected shape when the number of layers, a shape or a fingerprint does not fit,
    or an entry is not finite.
    """
    if not isinstance(factors, Factors):
        if len(factors) != len(plans):
            raise ConfigError(f"factors has {len(factors)} layers; one for each of {len(plans)} is needed", "factors")
        pairs = zip(plans, factors, strict=True)
        factors = Factors({plan.index: _layer_factors(given, plan.index) for plan, given in pairs})
    indices = [plan.index for plan in plans]
    if missing := [index for index in indices if index not in factors.layers]:
        raise ConfigError(f"factors has no layer {missing[0]}; layers {indices} are needed", "factors")
    for plan in plans:
        _check_layer(factors, plan)
    return Factors({index: factors.layers[index] for index in indices}, factors.fingerprints)


def _check_layer(factors: Factors, plan: LayerPlan) -> None:
    adapter, where = plan.adapter, f"layer {plan.index}"
    for side in ("k", "v"):
        rank = plan.rank(side)
        if rank is None:
            continue
        for name, tensor, shape in zip(
            (f"A_{side.upper()}", f"B_{side.upper()}"),
            factors[plan.index].side(side),
            ((rank, adapter.hidden_size), (adapter.width, rank)),
            strict=True,
        ):
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape:
                raise ConfigError(f"factors: {name} of {where} is {found}; {shape} is expected", "factors")
            assert tensor is not None
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"factors: {name} of {where} has entries that are not finite", "factors")
    known = factors.fingerprints.get(plan.index)
    if known is not None:
        sketch = torch.tensor(fingerprint(adapter.maps()[0][0]))
        expected = torch.tensor(known)
        if sketch.shape != expected.shape or float((sketch - expected).norm()) > TOLERANCE * float(expected.norm()):
            raise ConfigError(
                f"factors: the fingerprint of {where} is not that of this model's key projection; they were made for "
                "another model, or its weights have changed since. Run cskv.fit on this one",
                "factors",
            )


def _layer_factors(given: Any, index: int) -> LayerFactors:
    if isinstance(given, LayerFactors):
        return given
    if not isinstance(given, Sequence) or len(given) != 4:
        raise ConfigError(f"factors: layer {index} must be (A_K, B_K, A_V, B_V), got {type(given).__name__}", "factors")
    return LayerFactors(*given)


def _named(layer: LayerFactors) -> dict[str, Tensor]:
    named = {"a_k": layer.a_k, "b_k": layer.b_k, "a_v": layer.a_v, "b_v": layer.b_v}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


# Files


def save(path: str | Path, config: CSKVConfig, factors: Factors) -> None:
    """Write `factors.safetensors` and `cskv.json` (configuration and fingerprint) into the folder `path`.

    Both are written under a temporary name and renamed. Raises ConfigError when `config` is no CSKVConfig.
    """
    from safetensors.torch import save as to_bytes

    if not isinstance(config, CSKVConfig):
        raise ConfigError(f"config = {config!r} is not valid: a CSKVConfig", "config")
    folder = Path(path)
    tensors = {
        f"layers.{index}.{name}": tensor.detach().cpu().contiguous()
        for index, layer in factors.layers.items()
        for name, tensor in _named(layer).items()
    }
    document = {
        "schema": SCHEMA,
        "config": config.to_dict(),
        "layers": sorted(factors.layers),
        "fingerprints": {str(index): list(sketch) for index, sketch in factors.fingerprints.items()},
    }
    write_whole(folder / "factors.safetensors", to_bytes(tensors))
    write_whole(folder / "cskv.json", json.dumps(document, indent=2))


def load(path: str | Path) -> tuple[CSKVConfig, Factors]:
    """Read what `save` wrote. `apply` checks the fingerprint against the model it is given.

    Raises FileNotFoundError when a file is missing, and ConfigError when one is not what `save` writes.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    text = (folder / "cskv.json").read_text(encoding="utf-8")
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise ConfigError(f"{folder / 'cskv.json'} has schema {document['schema']!r}; {SCHEMA!r} is needed")
        indices = [int(index) for index in document["layers"]]
        sketches = {int(index): tuple(map(float, one)) for index, one in document["fingerprints"].items()}
        config = CSKVConfig.from_dict(document["config"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder / 'cskv.json'} is not a configuration of factors: {error!r}") from None
    tensors = load_file(folder / "factors.safetensors")
    layers = {
        index: LayerFactors(**{name: tensors.get(f"layers.{index}.{name}") for name in ("a_k", "b_k", "a_v", "b_v")})
        for index in indices
    }
    return config, Factors(layers, sketches)


def load_official(k: str | Path, v: str | Path) -> Factors:
    """Read the two checkpoints of the published code: lists over layers of ({"weight": A}, {"weight": B}).

    They are read with `torch.load(weights_only=True)`, as they exist in no other form. They carry no fingerprint.
    Raises ConfigError when a file holds something else, or the two differ in their number of layers.
    """
    sides = [_official(Path(path)) for path in (k, v)]
    if len(sides[0]) != len(sides[1]):
        raise ConfigError(
            f"{k} has {len(sides[0])} layers and {v} has {len(sides[1])}; they belong to different models"
        )
    pairs = zip(*sides, strict=True)
    return Factors({index: LayerFactors(*key, *value) for index, (key, value) in enumerate(pairs)})


def _official(path: Path) -> list[tuple[Tensor, Tensor]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    try:
        return [(_matrix(pair[0]["weight"]), _matrix(pair[1]["weight"])) for pair in content]
    except (KeyError, TypeError, IndexError):
        raise ConfigError(f"{path} is not a list over layers of ({{'weight': A}}, {{'weight': B}})") from None


def _matrix(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 2:
        raise TypeError
    return value
