"""Entry point of the CPU platform: decides, without heavy imports, whether this machine needs it."""

from __future__ import annotations

import gc
import os
from typing import Final

from sglang_prefillshare.host.cpu import torchvision_standin

_PYTHONS_GC_THRESHOLD: Final = (700, 10, 10)
_GC_THRESHOLD: Final = (50_000, 20, 100)
"""A worker's three processes import some 6,000 modules each, and at Python's own threshold the collector looks at them
again and again: a quarter of the import's processor time, and workers that start together are bound by that."""


def activate() -> str | None:
    """Return the dotted path of the CPU platform, or None where SGLang has a platform of its own.

    SGLang calls this while it imports itself, in every process, before it touches torchvision; so this is also
    where the missing torchvision is stood in for.
    """

    if _has_accelerator() or os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    torchvision_standin.install_if_absent()
    # SGLang's loop over several OpenMP threads stalls at barriers when processes share cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if gc.get_threshold() == _PYTHONS_GC_THRESHOLD:  # --gc-threshold comes later, and wins
        gc.set_threshold(*_GC_THRESHOLD)
    return "sglang_prefillshare.host.cpu.platform.CpuPlatform"


def _has_accelerator() -> bool:
    import torch

    candidates = ("cuda", "npu", "xpu", "musa", "mps")
    return any(getattr(torch, name, None) is not None and getattr(torch, name).is_available() for name in candidates)
