"""A prefill and a decode process joined by a real transfer backend, with no model and no HTTP server between them.

Each is a process of its own: SGLang's plugins loaded and its configuration published as in a scheduler, a KV pool, a
KV manager, and on prefill the bootstrap server. The parent drives both over pipes. What a pool holds, which pages move
and when a handoff is given up is the caller's; the handoff itself is all SGLang's and the backend's.

    with handoff_pair("prefillshare", shape) as pair:
        pair.prefill.fill(source, seed=1)
        [ended] = pair.hand_over([Handoff(room=new_room(), source_pages=source, target_pages=target)])
        assert ended.failure is None and pair.decode.checksum(target) == pair.prefill.checksum(source)
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from sglang_prefillshare.handoff.pool import PageList
from sglang_prefillshare.host.transfer.rig import (
    HOST,
    METADATA_ROWS,
    Handoff,
    Outcome,
    PoolShape,
    Receiving,
    Rig,
    Sending,
    Side,
    become_scheduler,
    checksum_pages,
    fill_pages,
    free_port,
)
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.settings import BACKEND_NAME

T = TypeVar("T")

_PRELOADED: Final = [
    "numba.extending",
    "sglang.srt.disaggregation.decode",
    "sglang.srt.disaggregation.prefill",
    "sglang.srt.mem_cache.memory_pool",
    "sglang.srt.server_args",
]
"""What takes seconds to import, imported once, where worker processes can be forks of a server that has done so."""
START_TIMEOUT_S: Final = 90.0


class WorkerError(RuntimeError):
    """A process of the pair could not do what it was told, or has ended."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Both sides of a handoff."""

    sent: Outcome
    received: Outcome

    @property
    def failure(self) -> str | None:
        return self.received.failure or self.sent.failure

    @property
    def seconds(self) -> float:
        """From prefill's first `send` to the poll in which decode learned that all of it is there."""
        assert self.failure is None and self.sent.started_ns is not None, self
        return (self.received.ended_ns - self.sent.started_ns) / 1e9


# ---- the parent's side ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spec:
    """What a worker process is started with. Two processes with different `base` refuse each other."""

    role: Role
    backend: str
    shape: PoolShape
    base: str = "base"
    bootstrap_port: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    lease_timeout_s: float = 30.0
    reuses_pages: bool = False
    """Write over the pages of a handoff that failed at once, as the next request that gets them would: bytes that
    depend on the room."""
    copy_pause_s: float = 0.0
    """Decode pauses in the middle of every copy, so that what must not happen meanwhile has time to."""


class Pending(Generic[T]):
    """The reply to a command that is still running."""

    def __init__(self, worker: WorkerProcess, call: int) -> None:
        self._worker = worker
        self._call = call

    def result(self, timeout_s: float) -> T:
        """Raise `TimeoutError` if there is no reply by then, `WorkerError` if it failed or the process died."""
        reply = self._worker._reply(self._call, timeout_s)
        if isinstance(reply, _Raised):
            raise WorkerError(f"{self._worker.name}: {reply.error}\n{reply.traceback}")
        return reply  # type: ignore[no-any-return]


class WorkerProcess:
    """One process of a pair, and what can be done to it. Ready when `wait_ready` returns."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.name = f"{spec.backend} {spec.role.value}"
        context = _context(spec.shape.device)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), name=self.name, daemon=True)
        self._process.start()
        theirs.close()
        self._replies: dict[int, Any] = {}
        self._calls = itertools.count(_READY + 1)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        Pending[None](self, _READY).result(timeout_s)

    def fill(self, pages: PageList, *, seed: int, timeout_s: float = 60.0) -> None:
        """Write bytes that depend only on `seed` and on the order of `pages`."""
        self._submit(_Fill(pages, seed)).result(timeout_s)

    def checksum(self, pages: PageList, *, timeout_s: float = 60.0) -> int:
        """A digest of the bytes of `pages`, in their order, in all buffers."""
        return int(self._submit(_Checksum(pages)).result(timeout_s))

    def abort(self, room: int, *, timeout_s: float = 10.0) -> bool:
        """Give a handoff up on this side, as SGLang does for a cancelled request; False if none is in flight."""
        return bool(self._submit(_Abort(room)).result(timeout_s))

    def held(self, *, timeout_s: float = 10.0) -> dict[str, int]:
        """How much of each kind of per-room state this process holds: all zero when nothing is in flight or leaks."""
        return dict(self._submit(_Held()).result(timeout_s))

    def wait_held(self, *, timeout_s: float = 5.0, **counts: int) -> None:
        """Wait until this process holds so much of these kinds of `held`, as when it has heard of a room."""
        deadline = time.monotonic() + timeout_s
        while not counts.items() <= self.held().items():
            assert time.monotonic() < deadline, (counts, self.held())
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL: no handler runs, and nothing is said to the peer."""
        self._process.kill()
        self._process.join()

    def pause(self) -> None:
        """SIGSTOP: the peer sees a process that lives and is silent. Commands wait in the pipe, which holds 200 KB.

        Returns when all its threads have stopped: one that computes goes on for a moment, and can end a handoff in it.
        """
        os.kill(self.pid, signal.SIGSTOP)
        while any(state not in "TtZX" for state in self._thread_states()):
            time.sleep(0.001)

    def _thread_states(self) -> list[str]:
        states = []
        for stat in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            with suppress(OSError):  # it has ended
                states.append(stat.read_text().rpartition(")")[2].split()[0])
        return states

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the process; a dead or stopped one too."""
        self._connection.close()
        with suppress(ProcessLookupError):
            self.resume()
        self._process.join(5.0)
        if self._process.is_alive():
            self.kill()

    def _submit(self, command: Any) -> Pending[Any]:
        call = next(self._calls)
        try:
            self._connection.send((call, command))
        except OSError as error:
            raise WorkerError(f"{self.name} has ended: {error}") from error
        return Pending(self, call)

    def _reply(self, call: int, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while call not in self._replies:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"{self.name} did not reply within {timeout_s} s")
            try:
                answered, reply = self._connection.recv()
            except (EOFError, OSError) as error:
                raise WorkerError(f"{self.name} has ended with commands pending") from error
            self._replies[answered] = reply
        return self._replies.pop(call)


class PrefillProcess(WorkerProcess):
    def __init__(
        self,
        backend: str,
        shape: PoolShape,
        *,
        base: str = "base",
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        **more: Any,
    ) -> None:
        super().__init__(Spec(Role.PREFILL, backend, shape, base, port or free_port(), env or {}, **more))

    @property
    def bootstrap_addr(self) -> str:
        return f"{HOST}:{self.spec.bootstrap_port}"

    def send(self, handoffs: Sequence[Handoff]) -> Pending[list[Outcome]]:
        """Run prefill's side of all of them at once; replies, in their order, when the last has ended."""
        return self._submit(_Send(_checked(handoffs)))


class DecodeProcess(WorkerProcess):
    def __init__(
        self,
        backend: str,
        shape: PoolShape,
        *,
        base: str = "base",
        env: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(Spec(Role.DECODE, backend, shape, base, env=env or {}, **more))

    def receive(self, handoffs: Sequence[Handoff], *, bootstrap_addr: str) -> Pending[list[Outcome]]:
        """Run decode's side of all of them at once, from the prefill worker at `bootstrap_addr`."""
        return self._submit(_Receive(_checked(handoffs), bootstrap_addr))

    def copy_seconds(self, *, timeout_s: float = 10.0) -> float:
        """Time spent in `handoff.copy.copy_pages` so far; stays 0 with a backend that does not call it."""
        return float(self._submit(_CopySeconds()).result(timeout_s))


@dataclass(frozen=True, slots=True)
class HandoffPair:
    prefill: PrefillProcess
    decode: DecodeProcess

    def hand_over(self, handoffs: Sequence[Handoff], *, timeout_s: float = 60.0) -> list[Ended]:
        """Run them all at once and wait for both sides."""
        receiving = self.decode.receive(handoffs, bootstrap_addr=self.prefill.bootstrap_addr)
        sending = self.prefill.send(handoffs)
        received = receiving.result(timeout_s)
        return [Ended(*both) for both in zip(sending.result(timeout_s), received, strict=True)]

    def pause(self) -> None:
        """Stop both processes, also the threads of a backend that spins while it is idle."""
        self.decode.pause()
        self.prefill.pause()

    def resume(self) -> None:
        self.prefill.resume()
        self.decode.resume()


@contextmanager
def handoff_pair(backend: str, shape: PoolShape, *, env: Mapping[str, str] | None = None) -> Iterator[HandoffPair]:
    """Both processes, ready; they are gone when the block is left."""
    pair = HandoffPair(PrefillProcess(backend, shape, env=env), DecodeProcess(backend, shape, env=env))
    try:
        pair.prefill.wait_ready()
        pair.decode.wait_ready()
        yield pair
    finally:
        pair.decode.close()
        pair.prefill.close()


def _context(device: str) -> Any:
    """How a worker process is started: a fork of a server with the imports done, where they initialise no CUDA.

    Importing SGLang does so on a GPU host, and CUDA cannot be used in a fork of a process that has.
    """
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _checked(handoffs: Sequence[Handoff]) -> tuple[Handoff, ...]:
    if not 0 < len(handoffs) <= METADATA_ROWS:
        raise ValueError(f"{len(handoffs)} handoffs at once, wanted 1 to {METADATA_ROWS}.")
    return tuple(handoffs)


# ---- what goes over the pipe: (call, command) one way, (call, reply) the other -------------------------------------

_READY: Final = 0
"""The call that a worker answers when it has started."""


@dataclass(frozen=True, slots=True)
class _Fill:
    pages: PageList
    seed: int


@dataclass(frozen=True, slots=True)
class _Checksum:
    pages: PageList


@dataclass(frozen=True, slots=True)
class _Send:
    handoffs: tuple[Handoff, ...]


@dataclass(frozen=True, slots=True)
class _Receive:
    handoffs: tuple[Handoff, ...]
    bootstrap_addr: str


@dataclass(frozen=True, slots=True)
class _Abort:
    room: int


@dataclass(frozen=True, slots=True)
class _Held:
    pass


@dataclass(frozen=True, slots=True)
class _CopySeconds:
    pass


@dataclass(frozen=True, slots=True)
class _Raised:
    error: str
    traceback: str

    @classmethod
    def now(cls, error: BaseException) -> _Raised:
        return cls(f"{type(error).__name__}: {' '.join(str(error).split())}", traceback.format_exc())


# ---- the worker's side ---------------------------------------------------------------------------------------------


def _serve(connection: Connection, spec: Spec) -> None:
    """The main function of a worker process. Leaves without waiting for the threads of SGLang and of the backend."""
    try:
        worker = _Worker(connection, spec)
    except BaseException as error:
        connection.send((_READY, _Raised.now(error)))
        os._exit(1)
    connection.send((_READY, None))
    try:
        worker.run()
    except (EOFError, OSError):  # the parent closed its end, or died
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class _Worker:
    """A scheduler's stead: owns the pool and the KV manager, and polls what is in flight."""

    def __init__(self, connection: Connection, spec: Spec) -> None:
        self._connection = connection
        self.spec = spec
        os.environ.update(spec.env)
        become_scheduler(
            spec.role,
            backend=spec.backend,
            page_size=spec.shape.page_size,
            bootstrap_port=spec.bootstrap_port,
            base=spec.base,
            lease_timeout_s=spec.lease_timeout_s,
        )

        from sglang_prefillshare.host.cpu import idle
        from sglang_prefillshare.host.transfer import wakeup

        self._copy_ns = _time_copies(pause_s=spec.copy_pause_s)
        self._rig = Rig(spec.role, spec.backend, spec.shape, bootstrap_port=spec.bootstrap_port)
        self._poll_ms = idle.PENDING_POLL_MS if spec.backend == BACKEND_NAME else idle.FOREIGN_POLL_MS
        self._drain = wakeup.drain
        self._poller = select.poll()
        self._poller.register(connection.fileno(), select.POLLIN)
        self._poller.register(wakeup.wakeup_fd(), select.POLLIN)
        self._batches: dict[int, list[Sending] | list[Receiving]] = {}

    def run(self) -> None:
        """Wait for commands and for news of handoffs as SGLang's loop does on a CPU, until the parent is gone."""
        while True:
            self._poller.poll(self._patience_ms())
            self._drain()
            while self._connection.poll():
                call, command = self._connection.recv()
                try:
                    self._begin(call, command)
                except Exception as error:
                    self._connection.send((call, _Raised.now(error)))
            for call, batch in list(self._batches.items()):
                for side in batch:
                    self._step(side)
                if all(side.outcome is not None for side in batch):
                    del self._batches[call]
                    self._connection.send((call, [side.outcome for side in batch]))

    def _step(self, side: Side) -> None:
        has_ended = side.outcome is not None
        side.step()
        failed = not has_ended and side.outcome is not None and side.outcome.failure is not None
        if failed and self.spec.reuses_pages and len(side.moving):
            fill_pages(self._rig.buffers, side.moving, seed=side.room)

    def _patience_ms(self) -> int | None:
        if not self._batches:
            return None
        return 0 if any(side.is_busy for batch in self._batches.values() for side in batch) else self._poll_ms

    def _begin(self, call: int, command: Any) -> None:
        """Do what is done at once and reply; a batch replies when it has ended."""
        if isinstance(command, _Send):
            self._batches[call] = [Sending(self._rig, handoff) for handoff in command.handoffs]
        elif isinstance(command, _Receive):
            self._batches[call] = [Receiving(self._rig, one, command.bootstrap_addr) for one in command.handoffs]
        else:
            self._connection.send((call, self._do(command)))

    def _do(self, command: Any) -> Any:
        if isinstance(command, _Fill):
            return fill_pages(self._rig.buffers, command.pages, seed=command.seed)
        if isinstance(command, _Checksum):
            return checksum_pages(self._rig.buffers, command.pages)
        if isinstance(command, _Abort):
            sides = [side for batch in self._batches.values() for side in batch if side.room == command.room]
            return any([side.abort() for side in sides])
        if isinstance(command, _Held):
            return self._held()
        if isinstance(command, _CopySeconds):
            return sum(self._copy_ns) / 1e9
        raise TypeError(f"unknown command {command!r}")

    def _held(self) -> dict[str, int]:
        names = {
            Role.PREFILL: ("request_status", "transfer_infos", "req_to_decode_prefix_len"),
            Role.DECODE: ("request_status", "required_prefill_response_num_table", "prefill_response_tracker"),
        }
        found = {name: len(getattr(self._rig.manager, name)) for name in (*names[self.spec.role], "failure_records")}
        if self.spec.role is Role.DECODE:
            found["addr_to_rooms_tracker"] = sum(map(len, self._rig.manager.addr_to_rooms_tracker.values()))
        if self.spec.backend == BACKEND_NAME and self.spec.role is Role.PREFILL:
            found |= {
                "rooms": self._rig.manager.leases.room_count,
                "pages_on_loan": self._rig.manager.leases.pages_on_loan,
            }
        elif self.spec.backend == BACKEND_NAME:
            found |= {"claims": len(self._rig.manager.claims.targets())}
        return {**found, "metadata_rows": METADATA_ROWS - self._rig.metadata_rows.available_size()}


def _time_copies(*, pause_s: float) -> list[int]:
    """Have the time of every `copy_pages` of this process noted, in ns; before the backend imports the function."""
    from sglang_prefillshare.handoff import copy

    durations: list[int] = []
    original: Callable[..., Any] = copy.copy_pages

    def timed(source: Any, target: Any, source_pages: PageList, target_pages: PageList, heads: Any = None) -> None:
        started = time.monotonic_ns()
        half = len(source_pages) // 2 if pause_s else 0
        try:
            if half:
                original(source, target, source_pages[:half], target_pages[:half], heads)
                time.sleep(pause_s)
            original(source, target, source_pages[half:], target_pages[half:], heads)
        finally:
            durations.append(time.monotonic_ns() - started)

    copy.copy_pages = timed
    return durations
