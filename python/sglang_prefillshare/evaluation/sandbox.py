"""Runs Python that a model wrote, so that it can do nothing but compute.

Every program gets a process and session of its own: none of our environment, no open file but /dev/null and a pipe for
one line, limits on time and memory, and a seccomp filter under which it opens no socket, starts no process or thread,
signals nobody, and creates, changes or removes no file (`sandbox_child.py`). It may read files, as importing does;
nothing that it read gets out but the name of one of Python's exceptions. No privilege is needed. Where the filter
cannot be installed nothing is run: `SandboxError`.

A program is judged in the process in which it runs. Ending early, or printing what success looks like, does not pass;
a program that searches this very harness for its token could, as one could whose answers equal everything.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sglang_prefillshare.errors import SandboxError
from sglang_prefillshare.evaluation.verdict import Verdict

_CHILD: Final = Path(__file__).with_name("sandbox_child.py")
_LONGEST_LINE: Final = 400
_ENVIRONMENT: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # numpy ends where it may not start threads


@dataclass(frozen=True, slots=True)
class Limits:
    """`cpu_s` is rounded up to whole seconds by the kernel. `wall_s` counts starting Python too, and waiting for a
    core: let it be some times as long."""

    cpu_s: int = 3
    wall_s: float = 15.0
    memory_bytes: int = 1 << 30


def check_sandbox() -> None:
    """Raise `SandboxError` unless this machine confines a program."""
    verdict = run_python("pass")
    if not verdict.is_right:
        raise SandboxError(
            f"the sandbox does not run an empty program here ({verdict.error}), so nothing that a model wrote is run. "
            "Leave HumanEval out with --task."
        )


def run_python(program: str, limits: Limits | None = None) -> Verdict:
    """Right if `program` comes to its end without raising.

    Else the error is `raised:` and a name of Python's own, `timed_out`, `killed:` and a signal's name (memory, mostly),
    or `ended_early`. Raises `SandboxError` where the program cannot be confined; it has not been run then.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    request = {
        "token": token,
        "program": program,
        "cpu_s": limits.cpu_s,
        "memory_bytes": limits.memory_bytes,
        "path": sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")}),
    }
    deadline = time.monotonic() + limits.wall_s
    reader, writer = os.pipe()
    with contextlib.closing(os.fdopen(reader, "rb", buffering=0)) as channel:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_CHILD), str(writer)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[writer],
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"cannot start {sys.executable} for the sandbox: {error.strerror or error}.") from error
        finally:
            os.close(writer)
        with process:
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.communicate(json.dumps(request).encode(), timeout=max(0.0, deadline - time.monotonic()))
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except BaseException as error:
                if process.returncode is None:  # not waited for yet, so the number is still its own
                    os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                return Verdict(False, "timed_out")
        # All writers are gone, but a program may have left nothing: never wait for it.
        line = channel.read(_LONGEST_LINE) if select.select([channel], [], [], 0)[0] else b""
    return _verdict(line.decode("utf-8", "replace"), status, token)


def _verdict(line: str, status: int, token: str) -> Verdict:
    said, _, word = line.strip().partition(" ")
    if said == token:
        if word == "passed":
            return Verdict(True)
        if word.startswith("refused "):
            raise SandboxError(
                f"this machine cannot confine a program ({word.removeprefix('refused ')}), so nothing that a model "
                "wrote is run. Sandboxing needs Linux on x86_64 or aarch64 with seccomp filters."
            )
        if word.startswith("raised "):
            return Verdict(False, f"raised:{word.removeprefix('raised ')}")
    if status in (-signal.SIGKILL, -signal.SIGXCPU):
        return Verdict(False, "timed_out")
    if status < 0:
        return Verdict(False, f"killed:{signal.Signals(-status).name}")
    return Verdict(False, "ended_early")
