"""CUDA MPS for the time of a benchmark: kernels of several processes run on one GPU at the same time.

Without it processes take turns, and a decode step waits for the whole of another worker's prefill. All topologies get
it or none. https://docs.nvidia.com/deploy/mps
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

CONTROL: Final = "nvidia-cuda-mps-control"
PIPE_DIRECTORY: Final = "CUDA_MPS_PIPE_DIRECTORY"
LOG_DIRECTORY: Final = "CUDA_MPS_LOG_DIRECTORY"
_ANSWER_S: Final = 20.0


@contextmanager
def cuda_mps() -> Iterator[tuple[Mapping[str, str], str]]:
    """Start a control daemon of our own; yields (what workers need in their environment, one line to tell).

    Where it cannot be had, the environment is empty and the line says why. A daemon that runs already is used as it is
    and not ended.
    """
    if os.environ.get(PIPE_DIRECTORY):
        yield {}, f"CUDA MPS: the one at {PIPE_DIRECTORY}={os.environ[PIPE_DIRECTORY]}"
        return
    if shutil.which(CONTROL) is None:
        yield {}, f"without CUDA MPS: no {CONTROL} here. Processes take turns on a GPU"
        return
    with tempfile.TemporaryDirectory(prefix="prefillshare-mps-") as folder:
        environ = {PIPE_DIRECTORY: str(Path(folder) / "pipe"), LOG_DIRECTORY: str(Path(folder) / "log")}
        for path in environ.values():
            Path(path).mkdir()
        failure = _control(("-d",), "", environ)
        if failure is None:
            failure = _control((), "get_server_list\n", environ)
        if failure is not None:
            yield {}, f"without CUDA MPS: {failure}. Processes take turns on a GPU"
            return
        try:
            yield environ, "with CUDA MPS, started for this benchmark"
        finally:
            _control((), "quit -t 5\n", environ)


def _control(arguments: tuple[str, ...], commands: str, environ: Mapping[str, str]) -> str | None:
    """Run the control program; what went wrong, or None."""
    try:
        done = subprocess.run(
            (CONTROL, *arguments),
            input=commands, env={**os.environ, **environ}, capture_output=True, text=True, timeout=_ANSWER_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{CONTROL} {' '.join(arguments)}: {error}"
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        return f"{CONTROL} {' '.join(arguments)} ended with {done.returncode}: {said[-1] if said else 'no word'}"
    return None
