"""One supervised process: started in a session of its own, its output read line by line, ended with all it started.

Between us and a worker stands a small supervisor: `python -m sglang_prefillshare.process`, or a fork of a process that
has imported what the worker needs (`preload.py`). Its standard input is a pipe that only we hold open. When that
closes, because we ask for an end or because we were killed, the supervisor ends the worker and everything that the
worker started: SIGINT, twice, to the worker's main process, then SIGTERM and SIGKILL to its process group. As the
subreaper of its descendants it also finds those that left the group.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final, NewType, Protocol, TextIO

if TYPE_CHECKING:
    import psutil

ExitStatus = NewType("ExitStatus", int)
"""As `subprocess` gives it: the exit code, or the negative number of the signal that ended the process."""

TAIL_LINES: Final = 200
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_STDIN: Final = 0
_WAKING: Final = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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


class Preloader(Protocol):
    """Starts some commands quicker than as a new process; `preload.py` has the one there is."""

    def can_start(self, command: Sequence[str], env: Mapping[str, str]) -> bool: ...

    def start(self, command: Sequence[str], env: Mapping[str, str], grace: StopGrace) -> Supervisor:
        """Raises `OSError` where that cannot be."""


@dataclass(slots=True)
class Supervisor:
    """A running supervisor as whoever started it knows it: closing `stop` asks it to end what it watches over."""

    stop: BinaryIO
    output: BinaryIO
    report: TextIO
    process: subprocess.Popen[bytes] | None = None
    """Where it is our own child."""

    @classmethod
    @contextlib.contextmanager
    def pipes(cls) -> Iterator[tuple[Supervisor, tuple[int, int, int]]]:
        """Its three pipes: our ends, and the supervisor's (standard input, output, report), which are ours inside only.

        An error inside closes ours too.
        """
        stdin, stop = os.pipe()
        output, stdout = os.pipe()
        report, reporting = os.pipe()
        ours = cls(os.fdopen(stop, "wb", 0), os.fdopen(output, "rb"), os.fdopen(report, encoding="ascii"))
        try:
            yield ours, (stdin, stdout, reporting)
        except BaseException:
            for end in (ours.stop, ours.output, ours.report):
                end.close()
            raise
        finally:
            for fd in (stdin, stdout, reporting):
                os.close(fd)


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
        preloader: Preloader | None = None,
    ) -> None:
        """With a `preloader`, `command` is forked from it if it can be, and started anew otherwise."""
        self.name = name
        self._on_line = on_line
        self._on_exit = on_exit
        self._grace = grace
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._pid: int | None = None
        self._status: ExitStatus | None = None
        self._has_pid = threading.Event()
        self._has_ended = threading.Event()
        self._is_hurried = False
        self._supervisor = _start(command, env, grace, preloader)
        self._supervisor_pid = None if self._supervisor.process is None else self._supervisor.process.pid
        self._reader = threading.Thread(target=self._read_output, name=f"{name}-output", daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, name=f"{name}-exit", daemon=True).start()

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
        self._supervisor.stop.close()

    def kill(self) -> None:
        """Skip what is left of the grace."""
        self.stop()
        self._is_hurried = True
        self._hurry()

    def _hurry(self) -> None:
        if self._supervisor_pid is not None and not self._has_ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._supervisor_pid, signal.SIGTERM)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, with everything it started, within `timeout_s`."""
        return self._has_ended.wait(timeout_s)

    def destroy(self) -> None:
        """The last resort, when the supervisor itself does not answer: SIGKILL to the whole session."""
        if self._supervisor_pid is not None:
            _kill_session(self._supervisor_pid)

    def _read_output(self) -> None:
        with self._supervisor.output as output:
            for raw in output:
                # A progress bar redraws its line with carriage returns; only its last state is worth a line.
                line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]
                self._tail.append(line)
                with contextlib.suppress(OSError, ValueError):  # a full disk must not make the worker's pipe fill up
                    self._on_line(line)

    def _watch(self) -> None:
        status: ExitStatus | None = None
        with self._supervisor.report as report:
            for line in report:
                kind, _, number = line.partition(" ")
                if kind == "supervisor":
                    self._supervisor_pid = int(number)
                    if self._is_hurried:
                        self._hurry()
                elif kind == "pid":
                    self._pid = int(number)
                    self._has_pid.set()
                else:
                    status = ExitStatus(int(number))
        code = -signal.SIGKILL if self._supervisor.process is None else self._supervisor.process.wait()
        if status is None:
            # The supervisor was killed from outside, and so nobody ended what it watched over.
            status = ExitStatus(code)
            if self._supervisor_pid is not None:
                _kill_session(self._supervisor_pid)
                _wait_session_gone(self._supervisor_pid, timeout_s=5.0)
        self._reader.join(timeout=2.0)
        self._status = status
        self._has_pid.set()
        self._has_ended.set()
        self._on_exit(status)


def _start(command: Sequence[str], env: Mapping[str, str], grace: StopGrace, preloader: Preloader | None) -> Supervisor:
    if preloader is not None and preloader.can_start(command, env):
        with contextlib.suppress(OSError):  # it has died: then as without it
            return preloader.start(command, env, grace)
    return _start_anew(command, env, grace)


def _start_anew(command: Sequence[str], env: Mapping[str, str], grace: StopGrace) -> Supervisor:
    with Supervisor.pipes() as (supervisor, (stdin, stdout, report)):
        words = (str(report), str(grace.interrupt_s), str(grace.terminate_s), *command)
        supervisor.process = subprocess.Popen(
            [sys.executable, "-m", __name__, *words],
            stdin=stdin,
            stdout=stdout,
            stderr=stdout,
            env=dict(env),
            pass_fds=(report,),
            start_new_session=True,
        )
    return supervisor


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


class Supervision:
    """What a supervisor does. Reports `supervisor PID`, `pid WORKER` and `exit STATUS` on `report_fd`.

    Its standard input is the pipe whose end it waits for; SIGTERM to it skips the grace. Made before the worker is
    started, with one thread in the process.
    """

    def __init__(self, report_fd: int) -> None:
        self._report_fd = report_fd
        self._pid = os.getpid()
        os.set_inheritable(report_fd, False)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in _WAKING:
            signal.signal(number, lambda *_: None)
        self._report(f"supervisor {self._pid}")

    def cannot_start(self, command: Sequence[str], error: OSError) -> None:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        self._report("exit 127")

    def die_with_us(self) -> None:
        """In the worker: for the case that even the supervisor is killed, at least its main process goes too."""
        self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._pid:  # it died before the call above took effect
            os._exit(1)

    def leave(self) -> None:
        """In a worker that was forked and runs on in Python: be nothing of a supervisor."""
        self.die_with_us()
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in _WAKING:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for fd in (self._report_fd, self._wake_read, self._wake_write):
            os.close(fd)

    def watch(self, worker: int, grace: StopGrace) -> None:
        """Until the worker ends, or our standard input does. Nothing of it is left when this returns."""
        self._report(f"pid {worker}")
        # What is still to be sent: how, which signal, and how long to wait after it. The main process is asked first
        # and alone: SGLang's ends its own children, and takes one that ends by itself for a crash, which it examines
        # for 5 s. HTTP servers answer what is in flight after the first SIGINT, and wait for it no longer after the
        # second.
        ladder = [
            (os.kill, signal.SIGINT, 0.75 * grace.interrupt_s),
            (os.kill, signal.SIGINT, 0.25 * grace.interrupt_s),
            (os.killpg, signal.SIGTERM, grace.terminate_s),
            (os.killpg, signal.SIGKILL, 5.0),
        ]
        next_step_at: float | None = None
        watched: list[int] = [_STDIN, self._wake_read]
        while (status := _reap(worker)) is None:
            timeout_s = None if next_step_at is None else max(0.0, next_step_at - time.monotonic())
            readable, _, _ = select.select(watched, [], [], timeout_s)
            if self._wake_read in readable and signal.SIGTERM in os.read(self._wake_read, 4096):
                ladder = ladder[-1:]
                next_step_at = time.monotonic()
            if _STDIN in readable and not os.read(_STDIN, 4096):
                watched.remove(_STDIN)
                next_step_at = time.monotonic() if next_step_at is None else next_step_at
            if next_step_at is not None and time.monotonic() >= next_step_at:
                send, number, wait_s = ladder[0]
                ladder = ladder[1:] or ladder
                with contextlib.suppress(ProcessLookupError):
                    send(worker, number)
                next_step_at = time.monotonic() + wait_s
        _kill_descendants(timeout_s=5.0)
        self._report(f"exit {status}")

    def _report(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # whoever wanted to know is gone
            os.write(self._report_fd, f"{line}\n".encode())


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
    supervision = Supervision(int(report_fd))
    try:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=supervision.die_with_us,  # safe: we have one thread
        )
    except OSError as error:
        supervision.cannot_start(command, error)
        return 127
    supervision.watch(child.pid, StopGrace(interrupt_s=float(interrupt_s), terminate_s=float(terminate_s)))
    child.returncode = 0  # `watch` has reaped it; spares Popen a complaint
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
