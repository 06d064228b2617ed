"""What a measurement ran on: the command, the commit, versions and the machine. Every result file keeps it."""

from __future__ import annotations

import glob
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

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FEATURES: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Any of them is a CPU with products of bfloat16 numbers: two of x86, one of ARM."""
INSTRUCTION_SETS: Final = (
    *("avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "sve", "bf16", "svebf16"),
)


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
    return {
        "kind": "cpu",
        "name": _cpuinfo("model name") or platform.machine(),
        "cpu_count": os.cpu_count(),
        "instruction_sets": instruction_sets(),
        "has_bfloat16": cpu_has_bfloat16(),
    }


def has_accelerator() -> bool:
    """Whether the machine has a GPU, without loading torch to ask."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg"))


def instruction_sets() -> list[str]:
    """What of this CPU decides how fast its products are, by the kernel's names for it; empty where it names none."""
    features = cpu_features()
    return [name for name in INSTRUCTION_SETS if name in features]


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself. Elsewhere float32 is several times faster.

    torch's `_is_mkldnn_bf16_supported` says yes on any AVX-512, where oneDNN only emulates it.
    """
    return not BFLOAT16_FEATURES.isdisjoint(cpu_features())


def cpu_features() -> frozenset[str]:
    """The CPU's features as Linux spells them (`flags` on x86, `Features` on ARM); none on other systems."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def _cpuinfo(key: str) -> str | None:
    """The first processor's."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)
