"""Running a method's demo or bench and keeping what came of it."""

from __future__ import annotations

import inspect
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pared_bench.contexts import BenchContext, DemoContext
from pared_bench.errors import BenchError, explain_os_error
from pared_bench.options import parse_options
from pared_bench.registry import Method
from pared_bench.results import DemoResult, Record


@dataclass(frozen=True)
class DemoOutcome:
    """What came of one demo: a result, or an error in words; `seconds` of wall time either way."""

    method: Method
    seconds: float
    result: DemoResult | None = None
    error: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def demo_options(method: Method, tokens: Sequence[str]) -> dict[str, Any]:
    """Load the method's demo and convert its command-line options; raises OptionError or what `Method.load` raises."""
    return parse_options(_entry_point(method, "demo"), tokens, f"{method.name}'s demo")


def bench_options(method: Method, tokens: Sequence[str]) -> dict[str, Any]:
    """Load the method's bench and convert its command-line options; raises OptionError or what `Method.load` raises."""
    return parse_options(_entry_point(method, "bench"), tokens, f"{method.name}'s bench")


def run_demo(method: Method, context: DemoContext, options: dict[str, Any]) -> DemoOutcome:
    """Run the method's demo; what goes wrong inside becomes the outcome's error, so that other demos can go on."""
    start = time.perf_counter()
    result, error = None, ""
    try:
        result = _entry_point(method, "demo")(context, **options)
        if not isinstance(result, DemoResult):
            raise BenchError(f"{method.name}'s demo returned {type(result).__name__}, not a DemoResult")
    except Exception as raised:
        result, error = None, explain(raised, method, "demo")
    return DemoOutcome(method, time.perf_counter() - start, result, error, options)


def run_bench(method: Method, context: BenchContext, options: dict[str, Any]) -> list[Record]:
    """Run the method's bench and return its records; raises BenchError when it returns none, or anything else."""
    try:
        records = list(_entry_point(method, "bench")(context, **options))
    except ModuleNotFoundError as error:
        raise method.missing(error, "bench") from error
    strangers = [type(item).__name__ for item in records if not isinstance(item, Record)]
    if strangers:
        raise BenchError(f"{method.name}'s bench returned {strangers[0]} among its records; only Record is stored")
    if not records:
        raise BenchError(f"{method.name}'s bench measured nothing with these options")
    return records


def explain(error: Exception, method: Method | None = None, part: str = "") -> str:
    """Say in words what an exception means to the user; with PARED_DEBUG set, the traceback goes to standard error."""
    if os.environ.get("PARED_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, BenchError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and method is not None:
        return str(method.missing(error, part))
    if isinstance(error, OSError):
        # without a number it is not the system's refusal but a message of a library, such as "train it with ..."
        return str(error) if error.errno is None else explain_os_error(error)
    if _is_out_of_memory(error):
        return "the accelerator's memory is full: close other programs, or run with --device cpu"
    if _speaks_to_the_user(error):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({place[0].filename}, line {place[0].lineno})" if place else ""
    return f"{type(error).__name__}: {error}{where}. Set PARED_DEBUG=1 to see the traceback."


def _speaks_to_the_user(error: Exception) -> bool:
    """Whether a class of pared_hooks raised it: those messages name the argument and the remedy."""
    hooks = sys.modules.get("pared_hooks")
    base = getattr(hooks, "ParedError", None)
    return inspect.isclass(base) and isinstance(error, base)


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    kind = getattr(torch, "OutOfMemoryError", None)
    return inspect.isclass(kind) and isinstance(error, kind)


def _entry_point(method: Method, part: str) -> Any:
    run = getattr(method.load(part), "run", None)
    if not callable(run):
        raise BenchError(f"{method.name}'s {part} has no function run(context, ...)")
    return run
