"""Where the kernels run: in Triton's interpreter on the CPU, compiled on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from prefillshare_kernels import rows


@contextmanager
def interpreted() -> Iterator[None]:
    """Run the kernels in Triton's interpreter.

    TRITON_INTERPRET counts only where it is set before the kernel is defined, and then for every kernel of the process.
    This exchanges ours, whoever imported triton or them before.
    """
    jitted = {name: value for name, value in vars(rows).items() if isinstance(value, triton.JITFunction)}
    for name, function in jitted.items():
        setattr(rows, name, InterpretedFunction(function.fn))
    try:
        yield
    finally:
        for name, function in jitted.items():
            setattr(rows, name, function)


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda":
        yield torch.device("cuda", torch.cuda.current_device())
        return
    with interpreted():
        yield torch.device("cpu")
