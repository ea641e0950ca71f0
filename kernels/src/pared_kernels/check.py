"""Correctness: every backend of every operator against its reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .registry import Operator, choose

Compare = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], str | None]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One set of arguments that an operator's `cases.py` yields.

    What is compared are the outputs, then the arguments that the operator writes in place. `compare(actual, expected)`
    returns what is wrong, or None; without it, floating outputs must be within `tolerance` of the float64 reference,
    relative to the largest expected magnitude, and all others equal. The default tolerance is four units of the last
    place of the output (at least 1e-6).
    """

    label: str
    arguments: tuple[Any, ...]
    compare: Compare | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of one case with one backend: `status` "passed", "failed" or "skipped", and the reason unless passed."""

    operator: str
    backend: str
    case: str
    status: str
    reason: str = ""


def run(
    ops: Iterable[str] | None = None,
    backend: str | None = None,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> list[Outcome]:
    """Check operators `ops` (None: all) with `backend` (None: each there is) on `device` (None: a GPU if present).

    Inputs are small, fresh from `seed`, of odd shapes, every dtype and non-contiguous strides.

    Raises:
        ValueError: for an operator or backend that does not exist.
    """
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"backend is {backend!r}; valid: {', '.join(dispatch.BACKENDS)}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    outcomes = []
    for operator in choose(ops):
        for name in operator.backends if backend is None else (backend,):
            outcomes += [check(operator, name, case, place) for case in operator.part("cases").cases(seed)]
    return outcomes


def check(operator: Operator, backend: str, case: Case, device: torch.device) -> Outcome:
    """Run one case with one backend on `device` and compare with the reference in float64 on the CPU."""
    arguments = tuple(_moved(value, device) for value in case.arguments)
    reason = dispatch.why_not(operator, backend, arguments)
    if reason is not None:
        return Outcome(operator.name, backend, case.label, "skipped", reason)
    expected = results(operator, operator.reference, tuple(_doubled(value) for value in fresh(case.arguments)))
    try:
        with dispatch.use(**{operator.name: backend}):
            actual = results(operator, operator, fresh(arguments))
    except Exception as error:  # a broken kernel is a finding, and the next case must still run
        return Outcome(operator.name, backend, case.label, "failed", f"{type(error).__name__}: {error}")
    actual = tuple(value.cpu() for value in actual)
    wrong = case.compare(actual, expected) if case.compare else compare(actual, expected, case.tolerance)
    return Outcome(operator.name, backend, case.label, "failed" if wrong else "passed", wrong or "")


def compare(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float | None = None) -> str | None:
    """Return what differs between outputs beyond the tolerance of `Case`, or None."""
    for place, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != theirs.shape:
            return f"output {place} has shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
        if not ours.is_floating_point():
            wrong = int((ours != theirs).sum())
            if wrong:
                return f"output {place} differs in {wrong} of {ours.numel()} elements"
            continue
        limit = max(1e-6, 4 * torch.finfo(ours.dtype).eps) if tolerance is None else tolerance
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        error = float((ours.double() - theirs).abs().max()) if theirs.numel() else 0.0
        if not error <= limit * max(scale, 1e-30):
            return f"output {place} is off by {error:.3e} where its scale is {scale:.3e} (relative limit {limit:.1e})"
    return None


def every_layout(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield `tensor` contiguous, with gaps between rows, with its last dimension strided, and stored transposed."""
    yield "contiguous", tensor.contiguous()
    wide = torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=-1)
    yield "row gaps", wide[..., : tensor.shape[-1]]
    yield "strided", torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """Return an operator's outputs as a tuple of tensors: empty for one that only writes in place."""
    if outputs is None:
        return ()
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def results(operator: Operator, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of `function`, then those of `arguments` that `operator` writes in place."""
    return as_tuple(function(*arguments)) + operator.written(arguments)


def fresh(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return copies of the tensors in `arguments`, with their strides, so that an operator may write to them."""
    return tuple(_strided_copy(value, value.device) if isinstance(value, Tensor) else value for value in arguments)


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _moved(value: Any, device: torch.device) -> Any:
    return _strided_copy(value, device) if isinstance(value, Tensor) and value.device != device else value


def _strided_copy(value: Tensor, device: torch.device) -> Tensor:
    # `.to` and `.clone` make strided slices contiguous.
    if value.numel() == 0:
        return value.to(device)
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    storage = value.as_strided((span,), (1,)).to(device, copy=True)
    return storage.as_strided(value.shape, value.stride(), 0)
