"""Registers, spills and shared memory of a compiled kernel, read without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Resources:
    """Registers and spilled bytes of a thread, shared bytes of a block."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def resources(compiled: Any, backend: str) -> Resources:
    """Return what triton's compiled kernel uses on "cuda" (from ptxas) or "hip" (from the assembly's metadata)."""
    if backend == "cuda":
        registers, spill_bytes = _read_ptxas(ptxas_report(compiled.asm["ptx"]))
    else:
        registers, spill_bytes = _read_amdgcn(compiled.asm["amdgcn"])
    return Resources(registers, spill_bytes, int(compiled.metadata.shared))


def ptxas_report(ptx: str) -> str:
    """Return what the ptxas that comes with triton says of `ptx`."""
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"^\.target\s+(sm_(\d+)\w*)", ptx, re.MULTILINE)
    if architecture is None:
        raise ValueError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(int(architecture[2])).path, "-v", f"--gpu-name={architecture[1]}", str(source)]
        done = subprocess.run([*command, "-o", f"{source}.cubin"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ptxas failed: {done.stderr.strip()}")
    return done.stderr


def _read_ptxas(report: str) -> tuple[int, int]:
    spilled = int(_only(r"(\d+) bytes spill stores", report))
    return int(_only(r"Used (\d+) registers", report)), spilled


def _read_amdgcn(assembly: str) -> tuple[int, int]:
    # A spilled vector register holds four bytes of each thread.
    return int(_only(r"\.vgpr_count:\s*(\d+)", assembly)), 4 * int(_only(r"\.vgpr_spill_count:\s*(\d+)", assembly))


def _only(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in the compiler's output")
    return found[1]
