"""Whether KV can really be handed over here: another process maps a pool and reads a page of it, or lends one.

A worker proves its own half before it is ready. What it needs for that is a peer, and a peer is another process: CUDA
IPC cannot be opened by who exported it, and what a kernel lets one process see of another shows only between two. So
this module is also a small program, without torch, that stands for the peer for a moment:

    a prefill worker's peer    maps the offered pool as a decode worker does, and says what it reads on one page
    a decode worker's peer     lends a pool of one page, for the worker to map and copy as it does with a real one

The page is the pool's first, which SGLang never gives to a request; it is as it was afterwards.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import IO, Any, Final

import msgspec
import numpy as np

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import cuda_memory
from sglang_prefillshare.handoff.geometry import KVGeometry
from sglang_prefillshare.handoff.lease_table import create_lease_region
from sglang_prefillshare.handoff.mapping import map_pool
from sglang_prefillshare.handoff.memory import (
    CHOOSE_NIXL,
    RegionHandle,
    SharedRegion,
    align,
    process_start,
    watch_process,
)
from sglang_prefillshare.handoff.messages import CudaMemory, HostMemory, Pool
from sglang_prefillshare.handoff.pool import PageList, PoolView
from sglang_prefillshare.handoff.ranks import Rank

PROOF_PAGE: Final = 0
PEER_TIMEOUT_S: Final = 30.0
"""A peer starts and answers in a fraction of a second; many that start at once on few cores take longer."""

_LENGTH_BYTES: Final = 8
_PAGE_BYTES: Final = 4096


class UntriedError(HandoffError):
    """Nothing was proved, either way: a peer could not be started, or found no room on the GPU."""


# ---- what a worker and its peer tell each other: (length, msgpack) over the peer's standard input and output --------


class Read(msgspec.Struct, tag=True, frozen=True):
    """Map `pool` and say what is on `page`. `device` is the CUDA device to map it for; None for host memory."""

    pool: Pool
    page: int
    device: int | None


class Lend(msgspec.Struct, tag=True, frozen=True):
    """Lend a pool of one page with this geometry, until standard input ends."""

    geometry: KVGeometry
    device: int | None


class Content(msgspec.Struct, tag=True, frozen=True):
    """The answer to `Read`: a page's bytes in all buffers, in their order."""

    content: bytes


class Lent(msgspec.Struct, tag=True, frozen=True):
    """The answer to `Lend`: the pool, and what is on its page 0."""

    pool: Pool
    content: bytes


class Failed(msgspec.Struct, tag=True, frozen=True):
    reason: str
    untried: bool


Question = Read | Lend
Answer = Content | Lent | Failed

_encoder = msgspec.msgpack.Encoder()
_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


# ---- the worker's side ---------------------------------------------------------------------------------------------


def prove_lending(offer: Pool, pool: PoolView, *, device: int | None) -> None:
    """Have a peer read a page of the pool that this prefill worker offers, and compare.

    `pool` is the same pool as this process addresses it. Raises `HandoffError` if a decode worker could not read it.
    """
    kept = read_page(pool, PROOF_PAGE, device=device)
    written = secrets.token_bytes(len(kept))
    write_page(pool, PROOF_PAGE, written, device=device)
    try:
        with Peer() as reader:
            answer = reader.ask(Read(offer, PROOF_PAGE, device))
            assert isinstance(answer, Content)
            _compare(answer.content, written)
    finally:
        write_page(pool, PROOF_PAGE, kept, device=device)


def prove_pulling(
    geometry: KVGeometry,
    pool: PoolView,
    pull: Callable[[Pool, PageList, PageList], AbstractContextManager[None]],
    *,
    device: int | None,
) -> None:
    """Have a peer lend a page, pull it into this decode worker's pool, and compare.

    `pull(lent, source_pages, target_pages)` maps what the peer lends, copies, and on leaving unmaps it. Raises
    `HandoffError` if this worker could not pull from a prefill worker.
    """
    kept = read_page(pool, PROOF_PAGE, device=device)
    try:
        with Peer() as lender:
            answer = lender.ask(Lend(geometry, device))
            assert isinstance(answer, Lent)
            with pull(answer.pool, np.zeros(1, np.int32), np.full(1, PROOF_PAGE, np.int32)):
                _compare(read_page(pool, PROOF_PAGE, device=device), answer.content)
    finally:
        write_page(pool, PROOF_PAGE, kept, device=device)


def prove_between(lender: Mapping[str, str], reader: Mapping[str, str]) -> None:
    """Hand a page over between the first GPUs that processes with these environments see.

    Raises `HandoffError` if a decode worker started as `reader` could not read from a prefill worker started as
    `lender`.
    """
    geometry = KVGeometry(page_size=1, kv_dtype="uint8", page_bytes=(_PAGE_BYTES, _PAGE_BYTES))
    with Peer(env=lender) as prefill, Peer(env=reader) as decode:
        lent = prefill.ask(Lend(geometry, 0))
        assert isinstance(lent, Lent)
        answer = decode.ask(Read(lent.pool, 0, 0))
        assert isinstance(answer, Content)
        _compare(answer.content, lent.content)


def _compare(found: bytes, wanted: bytes) -> None:
    if found == wanted:
        return
    differing = next((at for at, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(found))
    raise HandoffError(
        f"a page of the KV pool came over with other bytes than were written, from byte {differing} of {len(wanted)} "
        f"on: what one process shares here another does not see as it is. Please {CHOOSE_NIXL}, and report it."
    )


class Peer(AbstractContextManager["Peer"]):
    """The other process: started when this is made, gone when the block is left."""

    def __init__(self, *, env: Mapping[str, str] | None = None) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sglang_prefillshare.handoff.proof"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=env,
            )
        except OSError as error:
            raise UntriedError(f"no process could be started to try a handoff with: {error}") from error

    def ask(self, question: Question) -> Content | Lent:
        """The answer. Raises `HandoffError` with the peer's reason, `UntriedError` if nothing was proved."""
        answer = self._exchange(question)
        if isinstance(answer, Failed):
            raise UntriedError(answer.reason) if answer.untried else HandoffError(answer.reason)
        return answer

    def _exchange(self, question: Question) -> Answer:
        assert self._process.stdin is not None and self._process.stdout is not None
        deadline = time.monotonic() + PEER_TIMEOUT_S
        try:
            _put(self._process.stdin, _encoder.encode(question))
            return _answers.decode(_take(self._process.stdout, deadline=deadline))
        except TimeoutError as error:
            raise UntriedError(f"the process that tries the handoff says nothing for {PEER_TIMEOUT_S:g} s") from error
        except (OSError, EOFError, msgspec.DecodeError) as error:
            raise UntriedError(f"the process that tries the handoff has ended: {error}") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


# ---- a page's bytes ------------------------------------------------------------------------------------------------


def read_page(pool: PoolView, page: int, *, device: int | None) -> bytes:
    """The bytes of `page` in all buffers of a pool, in host memory or on a CUDA device."""
    addresses, sizes = _ranges(pool, page)
    if device is not None:
        return cuda_memory.read(addresses, sizes, device=device)
    return b"".join(ctypes.string_at(address, size) for address, size in zip(addresses, sizes, strict=True))


def write_page(pool: PoolView, page: int, content: bytes, *, device: int | None) -> None:
    """The reverse of `read_page`."""
    addresses, sizes = _ranges(pool, page)
    if device is not None:
        cuda_memory.write(content, addresses, sizes, device=device)
        return
    at = 0
    for address, size in zip(addresses, sizes, strict=True):
        ctypes.memmove(address, content[at : at + size], size)
        at += size


def _ranges(pool: PoolView, page: int) -> tuple[list[int], list[int]]:
    return (pool.addresses + page * pool.page_bytes).tolist(), pool.page_bytes.tolist()


# ---- the peer's side -----------------------------------------------------------------------------------------------


def main() -> None:
    """Answer one question on standard input, and end with it."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    try:
        question = _questions.decode(_take(stdin, deadline=None))
    except EOFError:
        return
    answer, _kept = serve(question)
    _put(stdout, _encoder.encode(answer))
    stdin.read()  # what is lent stays until the worker is done with it


def serve(question: Question) -> tuple[Answer, Any]:
    """The answer to a question, and what has to live for as long as it is of use."""
    try:
        return _lend(question) if isinstance(question, Lend) else _read(question)
    except HandoffError as error:
        refused = explain(error)
        return Failed(str(refused), untried=isinstance(refused, UntriedError)), None


def explain(error: Exception) -> HandoffError:
    """What a failed trial says: whether anything was proved, and the setting to change."""
    if isinstance(error, cuda_memory.DriverError) and error.is_for_want_of_room:
        return UntriedError(f"the GPU has no room for another process now: {error}")
    if isinstance(error, HandoffError) and not isinstance(error, cuda_memory.DriverError):
        return error
    return HandoffError(f"a page of the KV pool cannot be copied: {error}. Mend that, or {CHOOSE_NIXL}.")


def _read(question: Read) -> tuple[Content, Any]:
    offer = question.pool
    os.close(watch_process(offer.pid, offer.started))
    leases = SharedRegion.attach(RegionHandle(offer.pid, offer.started, offer.lease_fd, offer.lease_bytes))
    view = map_pool(offer, device=question.device)
    return Content(read_page(view, question.page, device=question.device)), (view, leases)


def _lend(question: Lend) -> tuple[Lent, Any]:
    geometry, device = question.geometry, question.device
    offsets = np.concatenate([[0], np.cumsum([align(size) for size in geometry.page_bytes])]).tolist()
    leases = create_lease_region()
    memory: HostMemory | CudaMemory
    kept: tuple[Any, ...]
    if device is None:
        region = SharedRegion.create(offsets[-1], name="prefillshare-proof")
        base, kept = region.address, (region, leases)
        memory = HostMemory(region.handle.fd, region.handle.size, tuple(offsets[:-1]))
    else:
        buffer = cuda_memory.CudaBuffer(offsets[-1], device=device)
        base, kept = buffer.address, (buffer, leases)
        exported = cuda_memory.CudaAllocations([base + offset for offset in offsets[:-1]], device=device)
        memory = CudaMemory(cuda_memory.device_uuid(device), tuple(exported.handles), tuple(exported.places))
    view = PoolView.at([base + offset for offset in offsets[:-1]], geometry.page_bytes, 1, owner=kept)
    content = secrets.token_bytes(view.bytes_per_page)
    write_page(view, 0, content, device=device)
    pool = Pool(
        bootstrap_addr="",
        pid=os.getpid(),
        started=process_start("self"),
        lease_fd=leases.handle.fd,
        lease_bytes=leases.handle.size,
        page_count=1,
        geometry=geometry,
        memory=memory,
        rank=Rank(),
    )
    return Lent(pool, content), view


def _put(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)
    pipe.flush()


def _take(pipe: IO[bytes], *, deadline: float | None) -> bytes:
    """One message. Raises `EOFError` if the pipe ends before, `TimeoutError` after `deadline` (monotonic seconds)."""
    length = int.from_bytes(_take_bytes(pipe, _LENGTH_BYTES, deadline=deadline), "little")
    return _take_bytes(pipe, length, deadline=deadline)


def _take_bytes(pipe: IO[bytes], count: int, *, deadline: float | None) -> bytes:
    taken = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(taken) < count:
            if not selector.select(None if deadline is None else max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(pipe.fileno(), count - len(taken))
            if not part:
                raise EOFError("its output ended")
            taken += part
    return bytes(taken)


if __name__ == "__main__":
    main()
