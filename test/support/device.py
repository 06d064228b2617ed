"""What the servers of the end-to-end tests run on: a CPU in float32, or a GPU in bfloat16. The tests are the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import torch

ON_GPU: Final = torch.cuda.is_available()
DTYPE: Final = torch.bfloat16 if ON_GPU else torch.float32
"""SGLang's CUDA rmsnorm takes no float32."""

ALL_OVERLAPPED: Final = ON_GPU or os.environ.get("PREFILLSHARE_CPU_OVERLAP") == "1"
"""Every worker runs SGLang's overlap loop, and not only those that a test picked for it."""

HEAD_DIM: Final = 64 if ON_GPU else 32
"""64 is the smallest that every attention backend takes."""

_OF_A_GPU: Final[Mapping[str, Any]] = {
    "mem-fraction-static": 0.9,  # of what the workers started before have left; the pool is as large as is said
    "cuda-graph-max-bs-decode": 16,
    "cuda-graph-max-bs-prefill": 512,
    "sampling-backend": "pytorch",
}
WORKER_ARGS: Final[Mapping[str, Any]] = {
    "dtype": str(DTYPE).removeprefix("torch."),
    "max-total-tokens": 32768,
    **(_OF_A_GPU if ON_GPU else {}),
}
