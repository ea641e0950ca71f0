"""GPU tests and benches of every package on a bare machine: `python -m pared_bench.gpu`, nothing installed.

Only PYTHONPATH=shared/bench/src is needed; the other source folders of the checkout are found from there. Needs torch
and what the packages themselves need; pytest where tests are wanted.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pared_bench import doctor, registry, runner
from pared_bench.contexts import BenchContext
from pared_bench.environment import Environment, resolve_device
from pared_bench.errors import BenchError
from pared_bench.files import own_folder, writable_folder
from pared_bench.operators import PACKAGE, operator_records
from pared_bench.options import parse_options
from pared_bench.progress import PlainProgress
from pared_bench.registry import Method
from pared_bench.results import Record
from pared_bench.store import ResultStore

STEPS = ("tests", "kernels", "bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen steps, each to its end whatever happens to the others, and return 1 when any failed."""
    options = _parser().parse_args(arguments)
    try:
        failed = run_steps(options)
    except KeyboardInterrupt:
        print("\nstopped; what was measured before is stored", file=sys.stderr)
        return 130
    except (BenchError, OSError) as error:
        print(f"pared_bench.gpu: {runner.explain(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, BenchError) else 1
    print("failed: " + "; ".join(failed) if failed else "everything passed", flush=True)
    return 1 if failed else 0


def run_steps(options: argparse.Namespace) -> list[str]:
    """Run the steps that the options choose and return what failed; raises BenchError, OSError before the first."""
    root = source_folders()
    device = resolve_device(options.device)
    methods = _methods(root, options.names)
    out = writable_folder(options.out)
    for finding in doctor.examine(out):
        print(f"{finding.state:>4}  {finding.topic}: {finding.text}")
    failed: list[str] = []
    if "tests" in options.steps:
        failed += run_tests(root, methods)
    if "kernels" in options.steps:
        failed += run_kernels(out, device, options)
    if "bench" in options.steps:
        for method in methods:
            if "bench" in method.parts():
                failed += run_one(method, device, out, options)
    return failed


def source_folders() -> Path:
    """Put the checkout's source folders on the import path and return the checkout; raises BenchError outside one."""
    root = registry.workspace_root()
    if root is None:
        raise BenchError("run this from a checkout: PYTHONPATH=shared/bench/src python -m pared_bench.gpu")
    folders = [*root.glob("packages/*/src"), *root.glob("shared/*/src"), root / "kernels" / "src"]
    for folder in sorted(folders):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return root


def run_tests(root: Path, methods: Sequence[Method]) -> list[str]:
    """Run the tests marked gpu of the kernels, the shared rooms and the packages; return what failed."""
    if importlib.util.find_spec("pytest") is None:
        return ["tests (pytest is not installed)"]
    folders = [root / "kernels" / "tests", *sorted(root.glob("shared/*/tests"))]
    folders += [root / "packages" / method.name / "tests" for method in methods]
    failed = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryDirectory() as scratch:
        # the checkout's own configuration asks for plugins that a bare machine does not have
        settings = Path(scratch, "pytest.ini")
        settings.write_text("[pytest]\nmarkers =\n  slow\n  gpu\n  proof\n  network\n")
        for folder in folders:
            # other files may need what a bare machine lacks
            files = [
                path for path in sorted(folder.glob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")
            ]
            if not files:
                continue
            name = folder.parent.name
            command = [sys.executable, "-m", "pytest", "-c", str(settings), "--rootdir", str(root), "-q", "-m", "gpu"]
            command += ["--import-mode=importlib", "-p", "no:cacheprovider", *map(str, files)]
            print(f"== tests of {name}", flush=True)
            # 5: none of these tests is marked gpu after all
            if subprocess.run(command, cwd=root, env=environment).returncode not in (0, 5):
                failed.append(f"tests of {name}")
    return failed


def run_kernels(out: Path, device: Any, options: argparse.Namespace) -> list[str]:
    """Check and time the shared operators, store what was timed under `out`, and return what failed."""
    print("== kernels", flush=True)
    try:
        check = importlib.import_module("pared_kernels.check")
        bench = importlib.import_module("pared_kernels.bench")
        outcomes = check.run(device=device, seed=options.seed)
        broken = [item for item in outcomes if item.status == "failed"]
        print(f"{len(outcomes)} checks, {len(broken)} failed", flush=True)
        records = operator_records(bench.run(device=device))
        print_records(records)
        environment = Environment.here(device, seed=options.seed, commit=options.commit)
        print(ResultStore(out).add(PACKAGE, records, environment), flush=True)
    except Exception as error:
        print(f"kernels: {runner.explain(error)}", flush=True)
        return ["kernels"]
    return [f"kernel {item.operator} ({item.backend}, {item.case}): {item.reason}" for item in broken]


def run_one(method: Method, device: Any, out: Path, options: argparse.Namespace) -> list[str]:
    """Run one method's bench and store its records under `out`; return what failed."""
    print(f"== bench {method.name}", flush=True)
    start = time.perf_counter()
    try:
        settings = parse_options(method.load("bench").run, options.option, f"{method.name}'s bench")
        # below a folder of its own, where the store does not look for results
        with own_folder(out / "files") as files, own_folder(files / method.name) as place:
            progress = PlainProgress(sys.stdout)
            context = BenchContext(device, seed=options.seed, full=options.full, out=place, progress=progress)
            records = runner.run_bench(method, context, settings)
        packages = (method.distribution,) if method.distribution else ()
        environment = Environment.here(device, seed=options.seed, packages=packages, commit=options.commit)
        path = ResultStore(out).add(method.name, records, environment)
    except Exception as error:
        print(f"{method.name}: {runner.explain(error, method, 'bench')}", flush=True)
        return [f"bench {method.name}"]
    print_records(records)
    print(f"{len(records)} records in {time.perf_counter() - start:.0f} s: {path}", flush=True)
    return []


def print_records(records: Sequence[Record]) -> None:
    """Print one line per record."""
    for record in records:
        value = record.note if record.value is None else f"{record.value:.5g} {record.unit}"
        print(f"{record.method}, {record.variant}, {record.metric}: {value}  {record.settings}")


def _methods(root: Path, names: Sequence[str]) -> list[Method]:
    """Return the methods of the checkout's folders: a bare machine has no entry points to read."""
    found = {method.name: method for method in registry.folder_methods(root)}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise registry.UnknownMethodError(unknown[0], found)
    return [found[name] for name in names] or list(found.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pared_bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="methods (folders of packages/); none: all")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="what to do (default: all)")
    parser.add_argument("--device", default="cuda", help="auto, cpu, cuda or cuda:N (default: cuda)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--full", action="store_true", help="full-size configurations")
    parser.add_argument("--commit", help="the commit to note in the results, where git is not at hand")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="--NAME=VALUE",
        help="option for the benches: --option=--name=value",
    )
    out = Path(os.environ.get("OUT") or Path("benchmarks", "results"))
    parser.add_argument(
        "--out", type=Path, default=out, help="folder of the results (default: $OUT, benchmarks/results)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
