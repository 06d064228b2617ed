"""`prefillshare doctor`'s proof: two processes of this machine hand pages over, through all but a model and HTTP.

Each is one end as a worker has it (`transfer/rig.py`), with the backend and on the device that a worker would choose by
default. They hand over pools of several page sizes, one after the other, and what arrived is compared bit for bit.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO, Any, Final

import numpy as np

from sglang_prefillshare.errors import HandoffError, PrefillShareError
from sglang_prefillshare.handoff.memory import CHOOSE_NIXL
from sglang_prefillshare.handoff.pool import PageList
from sglang_prefillshare.host.transfer.rig import (
    HOST,
    Handoff,
    PoolShape,
    Receiving,
    Rig,
    Sending,
    become_scheduler,
    free_port,
    new_room,
)
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.settings import BACKEND_NAME

PAGE_SIZES: Final = (1, 16, 64)
"""In tokens: SGLang's own default, and what attention backends ask for."""

PAGES_MOVED: Final = 24
_CHUNK_PAGES: Final = 10
"""Prefill sends so many at a time, as it does with a prompt that it computes in chunks."""

PAGE_COUNT: Final = 64
START_TIMEOUT_S: Final = 180.0
"""For importing SGLang, in two processes at once."""
TRIAL_TIMEOUT_S: Final = 60.0
"""For one page size; on a GPU a kernel is compiled meanwhile where none is cached."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was handed over without a difference, and how long it took once both processes were there."""

    page_sizes: tuple[int, ...]
    pages: int
    byte_count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Task:
    """One end's part of a handoff of pages of `page_size` tokens. Sides with the same `room` belong together."""

    page_size: int
    bootstrap_port: int
    room: int
    source_pages: PageList
    target_pages: PageList


@dataclass(frozen=True, slots=True)
class _Done:
    """A side has ended: why it failed, or the bytes that lie on its pages, in their order, buffer after buffer."""

    failure: str | None
    content: bytes


def default_device() -> str:
    """Where a worker of this machine keeps its KV if nobody says otherwise."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def prove(*, backend: str, device: str, page_sizes: Sequence[int] = PAGE_SIZES) -> Proof:
    """Hand pages over from one process to another. Raises `HandoffError` with the reason and the flag to choose."""
    with _End(Role.PREFILL, backend, device) as prefill, _End(Role.DECODE, backend, device) as decode:
        deadline = time.monotonic() + START_TIMEOUT_S
        for end in (prefill, decode):
            end.take(deadline)
        started = time.monotonic()
        byte_count = sum(_hand_over(prefill, decode, page_size) for page_size in page_sizes)
        return Proof(tuple(page_sizes), PAGES_MOVED * len(page_sizes), byte_count, time.monotonic() - started)


def _hand_over(prefill: _End, decode: _End, page_size: int) -> int:
    """Bytes that were handed over, all of them as they were."""
    deadline = time.monotonic() + TRIAL_TIMEOUT_S
    pages = np.arange(1, PAGE_COUNT, dtype=np.int32)
    source, target = (np.random.permutation(pages)[:PAGES_MOVED] for _ in range(2))
    task = _Task(page_size, free_port(), new_room(), source, target)
    for end in (prefill, decode):  # one after the other: decode asks a prefill worker that listens
        end.give(task)
        end.take(deadline)
    for end in (prefill, decode):
        end.give(None)
    received, sent = (end.take(deadline) for end in (decode, prefill))
    assert isinstance(received, _Done) and isinstance(sent, _Done)
    for done in (received, sent):
        if done.failure is not None:
            raise HandoffError(f"pages of {page_size} tokens were not handed over: {done.failure}")
    if received.content != sent.content:
        raise HandoffError(
            f"pages of {page_size} tokens arrived with other bytes than they were sent with. Please {CHOOSE_NIXL}, and "
            "report it."
        )
    return len(received.content)


class _End:
    """One of the two processes, seen from here; gone when the block is left."""

    def __init__(self, role: Role, backend: str, device: str) -> None:
        self._role = role
        self._backend = backend
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the process
        is_fork = _can_fork(device)
        context: Any = multiprocessing.get_context("fork" if is_fork else "spawn")
        output = self._output.fileno() if is_fork else _Inherited(self._output)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, output, role, backend, device), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _End:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(2.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._output.close()

    def give(self, task: _Task | None) -> None:
        try:
            self._connection.send(task)
        except OSError:
            raise self._ended() from None

    def take(self, deadline: float) -> Any:
        """The next answer; `HandoffError` for one that is an error, for none by `deadline`, and for an end."""
        try:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise HandoffError(f"the {self._role} process of the trial does not answer.{self._alternative()}")
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise HandoffError(f"the {self._role} process of the trial: {answer}")
        return answer

    def _ended(self) -> HandoffError:
        self._process.join(2.0)
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()[-5:]
        last = "".join(f"\n  {line}" for line in lines)
        return HandoffError(
            f"the {self._role} process of the trial ended with status {self._process.exitcode}."
            f"{self._alternative()}{' Its last lines:' + last if last else ''}"
        )

    def _alternative(self) -> str:
        return f" Mend that, or {CHOOSE_NIXL}." if self._backend == BACKEND_NAME else ""


def _can_fork(device: str) -> bool:
    """Whether the processes need not import SGLang again. No fork can use CUDA once it is initialised, and one has the
    locks of every thread, but not the threads."""
    return device == "cpu" and len(os.listdir("/proc/self/task")) == 1


class _Inherited:
    """An open file that goes to a spawned process."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        from multiprocessing.reduction import DupFd

        return _reopen, (DupFd(self._file.fileno()),)


def _reopen(duplicate: Any) -> int:
    return int(duplicate.detach())


# ---- in the process itself -----------------------------------------------------------------------------------------


def _serve(connection: Connection, output: int, role: Role, backend: str, device: str) -> None:
    """What one of the two processes runs. Leaves without waiting for the threads of SGLang and of the backend."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        become_scheduler(role, backend=backend, page_size=PAGE_SIZES[0])
        connection.send(None)
        while True:
            task = connection.recv()
            with _told(connection):
                _take_part(connection, task, role, backend, device)
    except (EOFError, OSError):  # the parent has closed its end
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


@contextmanager
def _told(connection: Connection) -> Iterator[None]:
    try:
        yield
    except PrefillShareError as error:
        connection.send(HandoffError(str(error)))


def _take_part(connection: Connection, task: _Task, role: Role, backend: str, device: str) -> None:
    become_scheduler(role, backend=backend, page_size=task.page_size, bootstrap_port=task.bootstrap_port)
    shape = PoolShape(layers=2, kv_heads=2, head_dim=64, page_count=PAGE_COUNT, page_size=task.page_size, device=device)
    rig = Rig(role, backend, shape, bootstrap_port=task.bootstrap_port)
    own_pages = task.source_pages if role is Role.PREFILL else task.target_pages
    _write_noise(rig)
    connection.send(None)
    connection.recv()
    handoff = Handoff(task.room, task.source_pages, task.target_pages, chunk_pages=_CHUNK_PAGES)
    side = Sending(rig, handoff) if role is Role.PREFILL else Receiving(rig, handoff, f"{HOST}:{task.bootstrap_port}")
    while side.outcome is None:
        side.step()
        if not side.is_busy:
            select.select([], [], [], 0.001)
    content = b"".join(buffer[own_pages].cpu().numpy().tobytes() for buffer in rig.buffers)
    connection.send(_Done(side.outcome.failure, content))


def _write_noise(rig: Rig) -> None:
    """Other bytes in each pool and page, so that nothing is equal that was not handed over."""
    import torch

    for buffer in rig.buffers:
        noise = np.frombuffer(os.urandom(buffer.numel()), np.uint8).reshape(tuple(buffer.shape))
        buffer.copy_(torch.from_numpy(noise.copy()))
