"""What a measurement ran on: the command, the commit, versions and the machine. Every result file keeps it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = ("sglang-prefillshare", "sglang", "torch", "transformers", "numpy")


def describe_environment(packages: Sequence[str] = PACKAGES, *, device: str = "cpu") -> dict[str, Any]:
    """`command`, `commit`, `date`, `versions` by package and `device`, all of the running process."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in packages}},
        "device": describe_device(device),
    }


def package_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with `-dirty` after changes; None where this package does not lie in a checkout."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return found.stdout.strip() or None


def describe_device(device: str = "cpu") -> dict[str, Any]:
    """Kind, name and count of cores of a device as torch calls it."""
    if not device.startswith("cpu"):
        import torch

        name = torch.cuda.get_device_name(device)
        return {"kind": device, "name": name, "cuda": torch.version.cuda, "cpu_count": os.cpu_count()}
    return {"kind": "cpu", "name": _cpu_name(), "cpu_count": os.cpu_count()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
