"""Which backend runs an operator: the choice of `use`, or the best one for the tensors at hand."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .registry import Operator

BACKENDS = ("reference", "triton", "cpu")
CHOICES = (*BACKENDS, "auto")

# The key "" holds the choice for every operator that has none of its own.
_choices: ContextVar[Mapping[str, str]] = ContextVar("pared_kernels_choices", default=MappingProxyType({}))


class BackendUnavailableError(RuntimeError):
    """The backend asked for by `use` can't run this operator on these tensors."""


@contextlib.contextmanager
def use(backend: str | None = None, /, **operators: str) -> Iterator[None]:
    """Choose the backend inside the block, for all operators (`backend`) or by name (`dato_match="cpu"`).

    A choice is "reference", "triton", "cpu" or "auto"; "cpu" means the reference where an operator has no CPU path of
    its own. Blocks nest, the inner one wins, and a choice by name wins over one for all. The choice belongs to the
    current context (thread or task) and is read when an operator runs, so it also holds inside compiled graphs; the
    backward pass of a CUDA graph of autograd runs in another thread and uses "auto".

    Raises:
        ValueError: for a choice or an operator that does not exist.
    """
    from .registry import operators as known

    chosen = dict(_choices.get())
    if backend is not None:
        chosen = {"": backend}
    for name in operators:
        if name not in known():
            raise ValueError(f"operator {name!r} does not exist; there are: {', '.join(known())}")
    chosen.update(operators)
    for choice in chosen.values():
        if choice not in CHOICES:
            raise ValueError(f"backend is {choice!r}; valid: {', '.join(CHOICES)}")
    token = _choices.set(MappingProxyType(chosen))
    try:
        yield
    finally:
        _choices.reset(token)


@cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), that is on CPU tensors."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of `device`."""
    if device.type in ("cuda", "xpu"):
        return has_triton()
    return device.type == "cpu" and interprets()


def select(operator: Operator, arguments: tuple[Any, ...]) -> str:
    """Return the backend that runs `operator` on `arguments`: the chosen one, or in "auto" the fastest possible.

    Raises:
        BackendUnavailableError: when a backend was chosen that can't run here, with the reason.
    """
    choices = _choices.get()
    choice = choices.get(operator.name, choices.get("", "auto"))
    if choice == "reference":
        return "reference"
    if choice == "auto":
        device = device_of(arguments)
        # The interpreter is for checks: it runs only where it is asked for.
        if device.type != "cpu" and why_not(operator, "triton", arguments) is None:
            return "triton"
        if device.type == "cpu" and why_not(operator, "cpu", arguments) is None:
            return "cpu"
        return "reference"
    if choice == "cpu" and "cpu" not in operator.backends and device_of(arguments).type == "cpu":
        return "reference"
    reason = why_not(operator, choice, arguments)
    if reason is not None:
        raise BackendUnavailableError(f"{operator.name} can't run with backend {choice!r}: {reason}")
    return choice


def why_not(operator: Operator, backend: str, arguments: tuple[Any, ...]) -> str | None:
    """Return why `backend` can't run `operator` on `arguments`, or None when it can."""
    device = device_of(arguments)
    if backend not in operator.backends:
        return f"the operator has only {', '.join(operator.backends)}"
    if backend == "triton" and not runs_triton(device):
        if not has_triton():
            return "triton is not installed (pip install 'pared-kernels[triton]')"
        return f"the tensors are on {device.type}; Triton needs a GPU, or TRITON_INTERPRET=1 on the CPU"
    if backend == "cpu" and device.type != "cpu":
        return f"the tensors are on {device.type}"
    unsupported = operator.unsupported(backend)
    return None if unsupported is None else unsupported(*arguments)


def device_of(arguments: tuple[Any, ...]) -> torch.device:
    """Return the device of the first tensor among `arguments`."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            return argument.device
    raise TypeError("an operator needs at least one tensor argument")


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Triton launches on `device`, which may not be the current one."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return contextlib.nullcontext()
