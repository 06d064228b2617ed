"""One supervised process: started in a session of its own, its output read line by line, ended with all it started.

Between us and a worker stands a small supervisor, `python -m sglang_prefillshare.process`. Its standard input is a
pipe that only we hold open. When that closes, because we ask for an end or because we were killed, the supervisor ends
the worker and everything that the worker started: SIGINT, twice, to the worker's main process, then SIGTERM and SIGKILL
to its process group. As the subreaper of its descendants it also finds those that left the group.

What a worker is, and when it is ready, is `deployment.py`'s to know.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NewType

if TYPE_CHECKING:
    import psutil

ExitStatus = NewType("ExitStatus", int)
"""As `subprocess` gives it: the exit code, or the negative number of the signal that ended the process."""

TAIL_LINES: Final = 200
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


@dataclass(frozen=True, slots=True)
class StopGrace:
    """How long a process may take to end by itself, after SIGINT and after SIGTERM, before SIGKILL."""

    interrupt_s: float = 8.0
    terminate_s: float = 4.0

    @property
    def total_s(self) -> float:
        return self.interrupt_s + self.terminate_s


def describe_exit(status: ExitStatus) -> str:
    """`exit status 3`, or `killed by SIGKILL`."""
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"killed by {name}" + (" (out of memory?)" if status == -signal.SIGKILL else "")


class SupervisedProcess:
    """A running process and the supervisor that ends it. Ours from construction until `wait` returns True.

    `on_line` gets every line of its output, `on_exit` its exit status once nothing of it runs any more; both are called
    from threads of this object.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        on_line: Callable[[str], None],
        on_exit: Callable[[ExitStatus], None],
        grace: StopGrace,
    ) -> None:
        self.name = name
        self._on_line = on_line
        self._on_exit = on_exit
        self._grace = grace
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._pid: int | None = None
        self._status: ExitStatus | None = None
        self._has_pid = threading.Event()
        self._has_ended = threading.Event()
        report_read, report_write = os.pipe()
        try:
            self._supervisor = subprocess.Popen(
                [
                    *(sys.executable, "-m", __name__),
                    *(str(report_write), str(grace.interrupt_s), str(grace.terminate_s)),
                    *command,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=(report_write,),
                start_new_session=True,
            )
        except BaseException:
            os.close(report_read)
            raise
        finally:
            os.close(report_write)
        self._reader = threading.Thread(target=self._read_output, name=f"{name}-output", daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, args=(report_read,), name=f"{name}-exit", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """Of the process itself, not of its supervisor. `None` if it could not be started."""
        self._has_pid.wait(10.0)
        return self._pid

    @property
    def status(self) -> ExitStatus | None:
        """`None` while it runs."""
        return self._status if self._has_ended.is_set() else None

    def tail(self, line_count: int) -> list[str]:
        """Its last lines of output."""
        return list(self._tail)[-line_count:]

    def stop(self) -> None:
        """Ask it to end. Returns at once; asking again changes nothing."""
        assert self._supervisor.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._supervisor.stdin.close()

    def kill(self) -> None:
        """Skip what is left of the grace."""
        self.stop()
        self._supervisor.terminate()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, with everything it started, within `timeout_s`."""
        return self._has_ended.wait(timeout_s)

    def destroy(self) -> None:
        """The last resort, when the supervisor itself does not answer: SIGKILL to the whole session."""
        _kill_session(self._supervisor.pid)

    def _read_output(self) -> None:
        assert self._supervisor.stdout is not None
        with self._supervisor.stdout as output:
            for raw in output:
                # A progress bar redraws its line with carriage returns; only its last state is worth a line.
                line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]
                self._tail.append(line)
                with contextlib.suppress(OSError, ValueError):  # a full disk must not make the worker's pipe fill up
                    self._on_line(line)

    def _watch(self, report_fd: int) -> None:
        status: ExitStatus | None = None
        with open(report_fd, encoding="ascii") as report:
            for line in report:
                kind, _, number = line.partition(" ")
                if kind == "pid":
                    self._pid = int(number)
                    self._has_pid.set()
                else:
                    status = ExitStatus(int(number))
        code = self._supervisor.wait()
        if status is None:
            # The supervisor was killed from outside, and so nobody ended what it watched over.
            status = ExitStatus(code)
            _kill_session(self._supervisor.pid)
            _wait_session_gone(self._supervisor.pid, timeout_s=5.0)
        self._reader.join(timeout=2.0)
        self._status = status
        self._has_pid.set()
        self._has_ended.set()
        self._on_exit(status)


def _session(session: int) -> list[psutil.Process]:
    """The processes of a session that run; one that is a zombie holds neither memory nor ports."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _kill_session(session: int) -> None:
    import psutil

    for process in _session(session):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _wait_session_gone(session: int, *, timeout_s: float) -> None:
    """Their ports are free then, for whoever is started in their place."""
    deadline = time.monotonic() + timeout_s
    while _session(session) and time.monotonic() < deadline:
        time.sleep(0.02)


# ---- the supervisor's side -----------------------------------------------------------------------------------------


def supervise(command: Sequence[str], *, report_fd: int, grace: StopGrace) -> int:
    """Run `command` until it ends or our standard input does. Nothing of it is left when this returns.

    Reports `pid N` and `exit STATUS` on `report_fd`. SIGTERM to us skips the grace.
    """
    os.set_inheritable(report_fd, False)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)

    try:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_die_with(os.getpid(), libc),  # safe: we have one thread
        )
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        os.write(report_fd, b"exit 127\n")
        return 127
    os.write(report_fd, f"pid {child.pid}\n".encode())

    # What is still to be sent: how, which signal, and how long to wait after it. The main process is asked first and
    # alone: SGLang's ends its own children, and takes one that ends by itself for a crash, which it examines for 5 s.
    # HTTP servers answer what is in flight after the first SIGINT, and do not wait for it after the second.
    ladder = [
        (os.kill, signal.SIGINT, 0.75 * grace.interrupt_s),
        (os.kill, signal.SIGINT, 0.25 * grace.interrupt_s),
        (os.killpg, signal.SIGTERM, grace.terminate_s),
        (os.killpg, signal.SIGKILL, 5.0),
    ]
    next_step_at: float | None = None
    watched: list[int] = [sys.stdin.fileno(), wake_read]
    while (status := _reap(child.pid)) is None:
        timeout_s = None if next_step_at is None else max(0.0, next_step_at - time.monotonic())
        readable, _, _ = select.select(watched, [], [], timeout_s)
        if wake_read in readable and signal.SIGTERM in os.read(wake_read, 4096):
            ladder = ladder[-1:]
            next_step_at = time.monotonic()
        if sys.stdin.fileno() in readable and not os.read(sys.stdin.fileno(), 4096):
            watched.remove(sys.stdin.fileno())
            next_step_at = time.monotonic() if next_step_at is None else next_step_at
        if next_step_at is not None and time.monotonic() >= next_step_at:
            send, number, wait_s = ladder[0]
            ladder = ladder[1:] or ladder
            with contextlib.suppress(ProcessLookupError):
                send(child.pid, number)
            next_step_at = time.monotonic() + wait_s
    child.returncode = status  # reaped above; spares Popen a complaint
    _kill_descendants(timeout_s=5.0)
    os.write(report_fd, f"exit {status}\n".encode())
    return 0


def _die_with(parent: int, libc: ctypes.CDLL) -> Callable[[], None]:
    """For the case that even the supervisor is killed: at least the worker's main process goes too."""

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call above took effect
            os._exit(1)

    return prepare


def _reap(worker: int) -> ExitStatus | None:
    """Collect every ended descendant that is ours to collect; the worker's status if it is among them."""
    status: ExitStatus | None = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                status = ExitStatus(os.waitstatus_to_exitcode(ended[1]))
    return status


def _kill_descendants(*, timeout_s: float) -> None:
    """SIGKILL whatever the worker left behind. Orphans become our children, so none can hide."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return  # no child is left, and so no descendant
        import psutil

        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)


def _main(argv: Sequence[str]) -> int:
    report_fd, interrupt_s, terminate_s, *command = argv
    grace = StopGrace(interrupt_s=float(interrupt_s), terminate_s=float(terminate_s))
    return supervise(command, report_fd=int(report_fd), grace=grace)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
