"""Where a number was measured: device, versions, commit, date, seed."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared_bench.errors import DeviceError
from pared_bench.registry import workspace_root

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "triton", "transformers", "diffusers", "numpy")
ROOMS = ("pared-hooks", "pared-kernels", "pared-zoo", "pared-bench")


@dataclass(frozen=True)
class Environment:
    """The surroundings of a measurement, as stored beside each record.

    `device` is the full name of the processor or accelerator, `slug` the same as a folder name, `commit` the checkout's
    commit with "+changes" when tracked files differ from it (None outside a checkout), `date` UTC in ISO 8601.
    """

    device: str
    slug: str
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""
    seed: int = 0

    @classmethod
    def here(
        cls, device: torch.device | str, *, seed: int = 0, packages: tuple[str, ...] = (), commit: str | None = None
    ) -> Environment:
        """Describe this machine for a run on `device`; `packages` are the distributions under measurement."""
        import torch

        name = device_name(torch.device(device))
        return cls(
            device=name,
            slug=slug(name),
            versions={"python": platform.python_version(), **versions((*LIBRARIES, *ROOMS, *packages))},
            commit=commit or checkout_commit(),
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            seed=seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the environment as JSON values."""
        return {**asdict(self), "versions": dict(self.versions)}


def resolve_device(name: str) -> torch.device:
    """Return the torch device that `name` means: "auto" is the first GPU, else the processor.

    Raises DeviceError when torch does not know the name or this machine lacks the device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(f"device {name!r} is not here: torch sees {count} GPU(s). `pared doctor` says more.")
    elif device.type in ("mps", "xpu"):
        if not getattr(torch, device.type).is_available():
            raise DeviceError(f"device {name!r} is not here. `pared doctor` says more.")
    elif device.type != "cpu":
        raise DeviceError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def device_name(device: torch.device) -> str:
    """Return the maker's name of an accelerator, or "CPU" with the processor's model."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type.upper()
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the platform module's word stands
    return f"CPU {model}"


def slug(name: str) -> str:
    """Return a device name as a folder name: "NVIDIA H200" becomes "nvidia-h200"."""
    plain = re.sub(r"\((r|tm|c)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Return the installed version of each distribution that is installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def checkout_commit() -> str | None:
    """Return the commit of the workspace this file lies in, with "+changes" when tracked source differs from it."""
    root = workspace_root()
    if root is None:
        return None
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return None
    # results written by an earlier bench are no change to what is measured
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks")
    return f"{commit[:12]}+changes" if changed else commit[:12]


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
