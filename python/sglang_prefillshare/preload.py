"""A process that has imported a server's modules once: workers are forked from it instead of importing them again.

Importing SGLang takes most of the processor time that a worker's start takes on a CPU host. `Preloader` is the side of
whoever starts workers. The other side, `python -m sglang_prefillshare.preload MODULE...`, imports the modules and then
forks a supervisor (`process.Supervision`) for each request that comes through its standard input; the supervisor forks
the worker. The first request waits for the imports. What a module reads of the environment while it is imported, all
workers have in common: so only a worker with the same environment may come from here.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Final, Self

from setproctitle import getproctitle, setproctitle

from sglang_prefillshare.environment import has_accelerator
from sglang_prefillshare.process import StopGrace, Supervision, Supervisor

PRELOADED: Final = ("sglang.srt.entrypoints.http_server", "sglang.srt.models.registry")
"""What every worker imports. SGLang's plugins are not among it: a worker loads them when it knows what it is."""

OURS: Final = "PREFILLSHARE_"
"""How the names of our own variables begin: they are read when they are needed, and may differ between workers."""

_REQUEST_BYTES: Final = 192 * 1024
_DESCRIPTORS: Final = 3


@dataclass(frozen=True, slots=True)
class _Request:
    """What is to be run: `python -m module args`, with this environment and nothing else."""

    module: str
    args: Sequence[str]
    env: Mapping[str, str]
    interrupt_s: float
    terminate_s: float


class Preloader:
    """Starts workers of one environment from a process that has imported `modules`. Ours from construction to `close`.

    `free` names variables besides our own that none of the modules reads while it is imported. Safe to use from
    several threads.
    """

    def __init__(self, modules: Sequence[str], env: Mapping[str, str], *, free: Collection[str] = ()) -> None:
        self._free = frozenset(free)
        self._env = self._fixed(env)
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *modules],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=dict(env),
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def can_start(self, command: Sequence[str], env: Mapping[str, str]) -> bool:
        """Whether it is `python -m MODULE ...` with the environment that the modules were imported with."""
        is_ours = tuple(command[:2]) == (sys.executable, "-m") and len(command) > 2
        return is_ours and self._fixed(env) == self._env and self._process.poll() is None

    def start(self, command: Sequence[str], env: Mapping[str, str], grace: StopGrace) -> Supervisor:
        """Have `command` supervised; raises `OSError` where that cannot be asked for."""
        module, *args = command[2:]
        request = _Request(module, args, dict(env), grace.interrupt_s, grace.terminate_s)
        with Supervisor.pipes() as (supervisor, theirs), self._lock:
            socket.send_fds(self._socket, [json.dumps(asdict(request)).encode()], theirs)
        return supervisor

    def close(self) -> None:
        """End the process. What was started from it goes on."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _fixed(self, env: Mapping[str, str]) -> dict[str, str]:
        return {name: env[name] for name in env if name not in self._free and not name.startswith(OURS)}


def preloader(env: Mapping[str, str], *, free: Collection[str] = ()) -> Preloader | None:
    """What workers with this environment are forked from; `None` where there is an accelerator. `free`: see there."""
    return None if has_accelerator() else Preloader(PRELOADED, env, free=free)


# ---- the side that has imported ------------------------------------------------------------------------------------


def _receive(requests: socket.socket) -> tuple[_Request, list[int]] | None:
    packet, descriptors, _, _ = socket.recv_fds(requests, _REQUEST_BYTES, _DESCRIPTORS)
    return (_Request(**json.loads(packet)), descriptors) if packet else None


def _become_supervisor(descriptors: Sequence[int]) -> int:
    """Take over the standard streams; returns the descriptor to report on."""
    os.setsid()
    setproctitle("prefillshare::supervisor")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stdin, stdout, report = descriptors
    for source, target in ((stdin, 0), (stdout, 1), (stdout, 2)):
        os.dup2(source, target)
    os.close(stdin)
    os.close(stdout)
    return report


def _become_worker(request: _Request) -> None:
    """Be `python -m module args`: its environment, its arguments, nothing on standard input."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(request.env)
    setproctitle(shlex.join([sys.executable, "-m", request.module, *request.args]))
    sys.argv = [request.module, *request.args]
    atexit.register(gc.unfreeze)  # or what it holds would count as leaked


def _serve() -> _Request | None:
    """Fork a supervisor and a worker for each request. Returns in a worker, with what it is to run, or at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a supervisor ended: it reports
    with socket.socket(fileno=os.dup(0)) as requests:
        while received := _receive(requests):
            request, descriptors = received
            if os.fork():
                for fd in descriptors:
                    os.close(fd)
                continue
            requests.close()
            supervision = Supervision(_become_supervisor(descriptors))
            if worker := os.fork():
                supervision.watch(worker, StopGrace(request.interrupt_s, request.terminate_s))
                os._exit(0)
            supervision.leave()
            _become_worker(request)
            return request
    return None


def _main(modules: Sequence[str]) -> None:
    for module in modules:
        with suppress(Exception):  # a worker that needs it will say what is wrong with it
            importlib.import_module(module)
    assert "prometheus_client" not in sys.modules, "it must be told where to keep its counts before it is imported"
    getproctitle()  # finds the place of the title, which it could not once the environment is replaced
    gc.collect()
    gc.freeze()  # collections in a worker need not write to what it shares with the others
    if (request := _serve()) is not None:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
