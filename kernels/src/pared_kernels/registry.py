"""Operators: how a folder becomes a `torch.library` custom op, and how the folders are found."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from . import ops
from .dispatch import BACKENDS, device_guard, device_of, select

_operators: dict[str, Operator] = {}
_folders: dict[str, ModuleType] = {}


class Operator:
    """One custom op, `torch.ops.pared.<name>`, and the functions that can run it.

    The function `reference` fixes name and arguments; `triton.py` and `cpu.py` of the same folder, where they exist,
    hold a function of that name with those arguments. Either may also hold `unsupported(*arguments) -> str | None`,
    the reason why it can't take these arguments. Backends are imported when they first run.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        backward: Callable[..., Any] | None,
        setup_context: Callable[..., Any] | None,
        mutates: Iterable[str],
        package: str,
    ) -> None:
        self.name = name
        self.package = package
        self.reference = reference
        self._implementations: dict[str, Callable[..., Any]] = {"reference": reference}
        self._unsupported: dict[str, Callable[..., str | None] | None] = {"reference": None}
        self.mutates = tuple(mutates)
        parameters = inspect.signature(reference).parameters
        names = [found.name for found in parameters.values() if found.kind is not found.KEYWORD_ONLY]
        if len(names) < len(parameters):
            raise ValueError(f"{reference.__name__} has keyword-only arguments; valid: arguments that are positional")
        if unknown := [argument for argument in self.mutates if argument not in names]:
            raise ValueError(f"mutates is {self.mutates}; {unknown[0]!r} is no argument of {reference.__name__}")
        self._mutated = tuple(names.index(argument) for argument in self.mutates)
        schema = torch.library.infer_schema(reference, mutates_args=self.mutates)
        # `torch.library.custom_op` would do the same, but its first call imports all of torch._dynamo.
        self._library = torch.library.Library("pared", "FRAGMENT")
        self._library.define(name + schema)
        self._library.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pared::{name}", fake, lib=self._library)
        if backward is not None:
            torch.library.register_autograd(f"pared::{name}", backward, setup_context=setup_context, lib=self._library)
        self.op = getattr(torch.ops.pared, name).default

    def __call__(self, *arguments: Any) -> Any:
        return self.op(*arguments)

    def __repr__(self) -> str:
        return f"Operator({self.name!r}, backends={self.backends})"

    @cached_property
    def backends(self) -> tuple[str, ...]:
        """The backends this operator has, in the order reference, triton, cpu."""
        return tuple(name for name in BACKENDS if importlib.util.find_spec(f"{self.package}.{name}") is not None)

    def implementation(self, backend: str) -> Callable[..., Any]:
        """Return the function that runs this operator with `backend`."""
        if backend not in self._implementations:
            self._implementations[backend] = getattr(self.part(backend), self.reference.__name__)
        return self._implementations[backend]

    def unsupported(self, backend: str) -> Callable[..., str | None] | None:
        """Return the backend's own test of its arguments, or None when it takes all."""
        if backend not in self._unsupported:
            self._unsupported[backend] = getattr(self.part(backend), "unsupported", None)
        return self._unsupported[backend]

    def part(self, name: str) -> ModuleType:
        """Return the module `name` of the operator's folder, for example "triton", "cases", "bench" or "aot"."""
        return importlib.import_module(f"{self.package}.{name}")

    def has_part(self, name: str) -> bool:
        """Whether the operator's folder has the module `name`."""
        return importlib.util.find_spec(f"{self.package}.{name}") is not None

    def written(self, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """Return the tensors among `arguments` that the operator writes in place."""
        # The dispatcher leaves out trailing arguments that have their default value.
        given = [arguments[position] for position in self._mutated if position < len(arguments)]
        return tuple(value for value in given if isinstance(value, torch.Tensor))

    def _run(self, *arguments: Any) -> Any:
        backend = select(self, arguments)
        function = self.implementation(backend)
        if backend == "triton":
            with device_guard(device_of(arguments)):
                outputs = function(*arguments)
        else:
            outputs = function(*arguments)
        if self._mutated:
            # Autograd learns that a tensor it may have saved has changed.
            torch.autograd.graph.increment_version(self.written(arguments))
        return outputs


@dataclass(frozen=True)
class OperatorInfo:
    """What `ls` tells of one operator: its name, public functions, backends and first line of documentation."""

    name: str
    functions: tuple[str, ...]
    backends: tuple[str, ...]
    summary: str


def define(
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    mutates: Iterable[str] = (),
) -> Operator:
    """Register the operator of a folder, under the folder's name; called in its `__init__.py`.

    `reference` is the function of `reference.py`; its annotations give the schema. `fake` takes the same arguments and
    returns empty tensors of the right shape, dtype, device and strides. `backward` and `setup_context` are those of
    `torch.library.register_autograd`. `mutates` names the arguments written in place.

    Raises:
        ValueError: for a folder that already has an operator, keyword-only arguments, or a wrong name in `mutates`.
    """
    package = reference.__module__.rpartition(".")[0]
    if (present := _operators.get(package.rpartition(".")[2])) is not None:
        raise ValueError(f"{package}: there is an operator {present.name!r} already, in {present.package}")
    operator = Operator(
        package.rpartition(".")[2],
        reference,
        fake,
        backward=backward,
        setup_context=setup_context,
        mutates=mutates,
        package=package,
    )
    _operators[operator.name] = operator
    return operator


def discover() -> dict[str, ModuleType]:
    """Import every operator folder on `pared_kernels.ops.__path__` and return them by name."""
    for found in pkgutil.iter_modules(ops.__path__):
        if found.ispkg and found.name not in _folders:
            _folders[found.name] = importlib.import_module(f"{ops.__name__}.{found.name}")
    return dict(sorted(_folders.items()))


def operators() -> dict[str, Operator]:
    """Return every operator by name."""
    discover()
    return dict(sorted(_operators.items()))


def choose(names: Iterable[str] | None) -> list[Operator]:
    """Return the operators called `names`, or all for None.

    Raises:
        ValueError: for a name that no operator has, with those there are.
    """
    known = operators()
    wanted = list(known if names is None else names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"operator {name!r} does not exist; there are: {', '.join(known)}")
    return [known[name] for name in wanted]


def public_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that the operator folders publish in `__all__`, by name."""
    functions: dict[str, Callable[..., Any]] = {}
    for folder, module in discover().items():
        for name in module.__all__:
            if name in functions:
                raise ValueError(f"function {name!r} is published by two operator folders, one of them {folder!r}")
            functions[name] = getattr(module, name)
    return functions


def ls() -> list[OperatorInfo]:
    """Return one line of facts for every operator, sorted by name."""
    folders = discover()
    infos = []
    for operator in operators().values():
        module = folders.get(operator.package.rpartition(".")[2]) or importlib.import_module(operator.package)
        summary = (module.__doc__ or "").strip().partition("\n")[0]
        infos.append(OperatorInfo(operator.name, tuple(module.__all__), operator.backends, summary))
    return infos
