"""Ahead-of-time compilation of every operator for every hardware target, without that hardware.

`python -m pared_kernels.aot cuda-90 hip-gfx942 --out records.json`
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import dispatch
from .registry import Operator, choose

SCHEMA = "pared.kernels.aot/1"


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: triton's backend and architecture, threads of a warp, shared memory of a block in bytes."""

    backend: str
    architecture: int | str
    warp: int
    shared_limit: int

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.architecture}"


# Shared memory: CUDA programming guide, table of compute capabilities (per block, opt-in); LDS of a workgroup for AMD.
TARGETS = {
    target.name: target
    for target in (
        Target("cuda", 80, 32, 163 * 1024),
        Target("cuda", 86, 32, 99 * 1024),
        Target("cuda", 89, 32, 99 * 1024),
        Target("cuda", 90, 32, 227 * 1024),
        Target("cuda", 100, 32, 227 * 1024),
        Target("cuda", 120, 32, 99 * 1024),
        Target("hip", "gfx942", 64, 64 * 1024),
        Target("hip", "gfx1100", 32, 64 * 1024),
    )
}


@dataclass(frozen=True)
class Specialization:
    """One kernel with the types and constants it is compiled for; an operator's `aot.py` yields them from `kernels()`.

    `types` gives the Triton type of every argument that is not in `constants` ("*fp16", "i32", "fp32"); `constants`
    holds the constexprs and the arguments that Triton turns into constants, such as a stride of 1. `aligned` names the
    arguments that are multiples of 16, as pointers of torch tensors are. `backend` is "cuda" or "hip" where the two are
    launched differently, `warp` the threads of a warp that it is for, None: it is compiled for all; `shared` the bytes
    of shared memory that a target must have, `shared_below` those that it must not have, where a kernel is launched
    differently with more.
    """

    kernel: Any
    label: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    backend: str | None = None
    warp: int | None = None
    shared: int = 0
    shared_below: int | None = None

    def is_for(self, place: Target) -> bool:
        """Whether it is compiled for this target."""
        fits = self.backend in (None, place.backend) and self.warp in (None, place.warp)
        return fits and self.shared <= place.shared_limit < (self.shared_below or math.inf)


@dataclass(frozen=True)
class CompileRecord:
    """What one compilation gave: registers and spilled bytes of a thread, shared bytes of a block, or the error."""

    operator: str
    kernel: str
    specialization: str
    target: str
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    seconds: float = 0.0
    error: str | None = None


def compile_all(targets: Iterable[str] | None = None, ops: Iterable[str] | None = None) -> list[CompileRecord]:
    """Compile every specialisation of operators `ops` for `targets` (None: all); failures are in the records.

    Raises:
        ValueError: for a target or an operator that does not exist.
        RuntimeError: when triton is missing or runs as interpreter.
    """
    chosen = [target(name) for name in (TARGETS if targets is None else targets)]
    if not dispatch.has_triton():
        raise RuntimeError("triton is not installed (pip install 'pared-kernels[triton]')")
    if dispatch.interprets():
        raise RuntimeError("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    return [
        compile_one(operator, specialization, place)
        for operator in choose(ops)
        if operator.has_part("aot")
        for specialization in operator.part("aot").kernels()
        for place in chosen
        if specialization.is_for(place)
    ]


def compile_one(operator: Operator, specialization: Specialization, place: Target) -> CompileRecord:
    """Compile one specialisation for one target and read its resources."""
    from .resources import resources

    names = (operator.name, specialization.kernel.fn.__name__, specialization.label, place.name)
    start = time.perf_counter()
    try:
        used = resources(compile_kernel(specialization, place), place.backend)
    except Exception as error:  # whatever the compiler raises is this record's finding
        reason = f"{type(error).__name__}: {str(error).strip()}"
        return CompileRecord(*names, seconds=round(time.perf_counter() - start, 2), error=reason)
    over = used.shared_bytes > place.shared_limit
    return CompileRecord(
        *names,
        registers=used.registers,
        spill_bytes=used.spill_bytes,
        shared_bytes=used.shared_bytes,
        seconds=round(time.perf_counter() - start, 2),
        error=f"{used.shared_bytes} bytes of shared memory; the target has {place.shared_limit}" if over else None,
    )


def compile_kernel(specialization: Specialization, place: Target) -> Any:
    """Return triton's compiled kernel, whose `asm` holds every stage of the code ("ttgir", "ptx", "amdgcn" ...)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = specialization.kernel.arg_names
    known = {**specialization.types, **specialization.constants}
    if set(arguments) != set(known):
        raise ValueError(f"arguments {sorted(set(arguments) ^ set(known))} are missing or unknown")
    constants = dict(specialization.constants)
    source = ASTSource(
        fn=specialization.kernel,
        signature={name: "constexpr" if name in constants else specialization.types[name] for name in arguments},
        constexprs=constants,
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in specialization.aligned},
    )
    gpu = GPUTarget(place.backend, place.architecture, place.warp)
    return triton.compile(source, target=gpu, options=dict(specialization.options))


def target(name: str) -> Target:
    """Return the target called `name`, written cuda-90 or cuda:90.

    Raises:
        ValueError: for an unknown target, with those there are.
    """
    found = TARGETS.get(name.replace(":", "-"))
    if found is None:
        raise ValueError(f"target {name!r} does not exist; there are: {', '.join(TARGETS)}")
    return found


def write(records: Iterable[CompileRecord], path: Path | str) -> None:
    """Write `records` as JSON to `path`, under a temporary name first."""
    import torch
    import triton

    document = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "records": [asdict(record) for record in records],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Compile as the command line says, print one line per kernel, and return the exit status: 1 if any failed."""
    parser = argparse.ArgumentParser("python -m pared_kernels.aot", description="Compile kernels without a GPU.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; none: all")
    parser.add_argument("--target", action="append", default=[], metavar="TARGET", help="the same, repeatable")
    parser.add_argument("--op", action="append", metavar="OPERATOR", help="compile only this operator, repeatable")
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    options = parser.parse_args(arguments)
    try:
        records = compile_all([*options.targets, *options.target] or None, options.op)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    for record in records:
        print(line(record))
    if options.out is not None:
        write(records, options.out)
    failed = sum(record.error is not None for record in records)
    print(f"{len(records) - failed} compiled, {failed} failed")
    return 1 if failed or not records else 0


def line(record: CompileRecord) -> str:
    """Return a record as one line of text."""
    name = f"{record.target:12} {record.operator}.{record.kernel} [{record.specialization}]"
    if record.error is not None:
        return f"{name}: FAILED: {record.error}"
    return f"{name}: {record.registers} registers, {record.spill_bytes} B spilled, {record.shared_bytes} B shared"


if __name__ == "__main__":
    # The operators import this module by its name, which is not the one it runs under.
    from pared_kernels.aot import main as run

    sys.exit(run())
