"""What this machine can run."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from pared_bench import registry
from pared_bench.environment import device_name

#: The oldest versions that are tested.
MINIMUM = {"torch": (2, 11), "transformers": (5, 17), "diffusers": (0, 40), "triton": (3, 6)}


@dataclass(frozen=True)
class Finding:
    """One line of the examination: `state` "good", "note" (works, with a limit) or "bad" (does not work)."""

    topic: str
    state: Literal["good", "note", "bad"]
    text: str


def examine(folder: Path | None = None) -> list[Finding]:
    """Look at this machine; `folder` (default: the current one) is where reports would be written."""
    findings = [_python(), *_libraries()]
    if util.find_spec("torch") is not None:
        findings += [_processor(), *_accelerators(), _kernels(), *_energy()]
    return [*findings, *_methods(), _disk(folder or Path.cwd())]


def _python() -> Finding:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] <= (3, 14)
    return Finding("python", "good" if fits else "note", version if fits else f"{version}; tested are 3.11 to 3.14")


def _libraries() -> Iterator[Finding]:
    for name, least in MINIMUM.items():
        wanted = ".".join(map(str, least))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, *_absence(name))
            continue
        if _leading(version) < least:
            yield Finding(name, "bad", f"{version} is older than {wanted}; type: pip install -U {name}")
        else:
            yield Finding(name, "good", version)


def _absence(name: str) -> tuple[Literal["good", "note", "bad"], str]:
    if name == "torch":
        return "bad", "not installed, and nothing runs without it; type: pip install torch"
    if name == "triton":
        return "note", "not installed: kernels run as plain torch"
    return "note", f"not installed: methods for its models cannot run; type: pip install {name}"


def _leading(version: str) -> tuple[int, int]:
    numbers = ["".join(c for c in piece if c.isdigit()) for piece in version.split(".")[:2]]
    return int(numbers[0] or 0), int(numbers[1] or 0) if len(numbers) > 1 else 0


def _processor() -> Finding:
    import torch

    # sysconf counts the machine's memory, sched_getaffinity what this process may use of its cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB of memory"
    capability = torch.backends.cpu.get_cpu_capability()
    name = device_name(torch.device("cpu"))
    return Finding("processor", "good", f"{name}, {cores} cores, {capability}{memory}")


def _accelerators() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        text = "none that torch sees" if built else "this torch is built for the processor alone"
        yield Finding("gpu", "note", f"{text}: everything runs on the processor; full-size speed cannot be measured")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        platform_name = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        capability = getattr(device, "gcnArchName", "") or f"compute {device.major}.{device.minor}"
        text = f"cuda:{index} {device.name}, {capability}, {device.total_memory / 2**30:.0f} GiB, {platform_name}"
        yield Finding("gpu", "good", text)


def _kernels() -> Finding:
    import torch

    if util.find_spec("triton") is None:
        return Finding("kernels", "note", "plain torch (triton is not installed)")
    if not torch.cuda.is_available():
        return Finding("kernels", "note", "plain torch; Triton's interpreter and ahead-of-time compilation for checks")
    return Finding("kernels", "good", "Triton")


def _energy() -> Iterator[Finding]:
    import torch

    from pared_bench.measure.meters import energy_source

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        source, reason = energy_source(device)
        yield Finding(
            f"energy ({device})", "note" if reason else "good", reason or f"measured through {source.upper()}"
        )


def _methods() -> Iterator[Finding]:
    found = registry.methods()
    if not found:
        yield Finding("methods", "note", "none installed")
    for method in found.values():
        absent = registry.absent_requirements(method)
        if absent:
            line = registry.install_line(method, absent[0])
            yield Finding(method.name, "note", f"without {', '.join(absent)}; for the demo type: {line}")
        else:
            yield Finding(method.name, "good", f"{method.version}: {', '.join(method.parts()) or 'library only'}")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    if not os.access(folder, os.W_OK):
        return Finding("disk", "note", f"{folder} cannot be written to; reports need --out DIR")
    return Finding("disk", "good" if free > 1 else "note", f"{free:.1f} GiB free in {folder}")
