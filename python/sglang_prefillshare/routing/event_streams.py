"""The event streams of workers that publish what their radix trees hold, from their sockets into the block index.

A worker numbers its batches without gaps: what is missing is asked for again, from a second socket. Numbers that begin
anew are another process, whose tree was empty. What comes from a socket may be anything; it can cost a worker its place
in the index, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.asyncio

from sglang_prefillshare.protocol import EventStream, Role
from sglang_prefillshare.routing.block_index import BlockIndex, BoundExceededError, Follow, Space
from sglang_prefillshare.routing.workers import Worker

logger = logging.getLogger(__name__)

_GPU: Final = "GPU"
_END: Final = (-1).to_bytes(8, "big", signed=True)
_MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
_LOOK_MS: Final = 250
"""How often a follower looks for what no message tells it."""
_LATE_S: Final = 1.0
"""A block that an answer named comes sooner than this, or was missed."""


class StreamError(Exception):
    """A stream that cannot be used; the message says why."""


_Hash = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Stored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    block_size: int
    medium: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[_Hash]
    medium: str | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Stored | _Removed | _Cleared]


_decoder = msgspec.msgpack.Decoder(_Batch)


class Reader:
    """A worker's batches in their order, put into `follow`. No I/O."""

    def __init__(self, follow: Follow) -> None:
        self._follow = follow
        self.next = 0
        """The number of the batch that is missing."""
        self._ts = 0.0

    def begin_anew(self) -> None:
        self._follow.held.clear()
        self.next, self._ts = 0, 0.0

    def take(self, number: bytes, payload: bytes) -> bool:
        """Put a batch in; False if others are missing before it, or if it begins the stream of another process (then
        `next` is 0). One that came before changes nothing. Raises `StreamError` for what is no batch."""
        if len(number) != 8:
            raise StreamError(f"a batch has a number of {len(number)} bytes, wanted 8")
        found = int.from_bytes(number, "big")
        if found > self.next:
            return False
        batch = _decoded(payload)
        if found < self.next:
            if batch.ts <= self._ts:
                return True
            self.begin_anew()
            return found == 0 and self.take(number, payload)
        self._apply(batch)
        self.next, self._ts = found + 1, batch.ts
        return True

    def skip_to(self, number: int) -> None:
        """The batches before `number` cannot be had any more: nothing that was known counts."""
        self._follow.held.clear()
        self.next = number

    def _apply(self, batch: _Batch) -> None:
        held, block_tokens = self._follow.held, self._follow.space[1]
        for event in batch.events:
            if isinstance(event, _Cleared):
                held.clear()
            elif event.medium not in (None, _GPU):
                continue
            elif isinstance(event, _Removed):
                held.remove(event.block_hashes)
            elif event.block_size != block_tokens:
                raise StreamError(f"its blocks have {event.block_size} tokens, wanted its page of {block_tokens}")
            else:
                try:
                    held.store(event.parent_block_hash, event.block_hashes)
                except BoundExceededError as error:
                    raise StreamError(str(error)) from error


def _decoded(payload: bytes) -> _Batch:
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise StreamError(f"a batch cannot be read: {error}") from error


class Follower:
    """Keeps one worker's blocks as its events say, until it is cancelled."""

    def __init__(
        self,
        follow: Follow,
        stream: EventStream,
        *,
        url: str,
        context: zmq.asyncio.Context,
        replay_timeout_s: float = 2.0,
        retry_s: float = 2.0,
    ) -> None:
        host = urlsplit(url).hostname
        assert host is not None
        host = f"[{host}]" if ":" in host else host
        self._follow = follow
        self._url = url
        self._topic = stream.topic.encode()
        self._address = f"tcp://{host}:{stream.port}"
        self._replay_address = f"tcp://{host}:{stream.replay_port}"
        self._context = context
        self._replay_timeout_s = replay_timeout_s
        self._retry_s = retry_s
        self._reader = Reader(follow)
        self._is_ending = False

    def end(self) -> None:
        """With a cancellation, which alone can get lost in a wait that runs out of time at that moment."""
        self._is_ending = True

    async def run(self) -> None:
        while not self._is_ending:
            try:
                with self._socket(zmq.SUB) as events:
                    events.subscribe(self._topic)
                    events.connect(self._address)
                    await self._follow_stream(events)
            except (StreamError, zmq.ZMQError) as error:
                self._lost(str(error))
            except Exception as error:  # a bug of ours must not end the router
                logger.exception("following the events of %s failed", self._url)
                self._lost(repr(error))
            self._reader.begin_anew()
            await asyncio.sleep(self._retry_s)

    def _lost(self, why: str) -> None:
        if self._follow.problem != why:
            logger.warning("worker %s: what it holds is guessed: %s", self._url, why)
        self._follow.fell_behind(why)

    async def _follow_stream(self, events: zmq.asyncio.Socket) -> None:
        await self._catch_up()
        while not self._is_ending:
            if self._follow.is_lost:
                self._reader.begin_anew()
                await self._catch_up()
            if await events.poll(_LOOK_MS):
                frames = await events.recv_multipart()
                if len(frames) != 3:
                    raise StreamError(f"a batch has {len(frames)} parts, wanted 3")
                if self._follow.is_lost:
                    continue
                if not self._reader.take(frames[1], frames[2]):
                    await self._catch_up()
                self._follow.settle()
                await asyncio.sleep(0)  # a flood leaves the others their turn
            awaited_s = self._follow.oldest_awaited_s()
            if awaited_s is not None and time.monotonic() - awaited_s > _LATE_S:
                await self._catch_up()

    async def _catch_up(self) -> None:
        """Have all that is missing repeated. Raises `StreamError` where it cannot be had."""
        self._follow.is_lost = False
        while not await self._replay():
            pass
        if self._follow.is_lost:
            return
        if not self._follow.is_current:
            blocks = len(self._follow.held)
            logger.info("worker %s: its events say what it holds (%d blocks now)", self._url, blocks)
        self._follow.up_to_date()

    async def _replay(self) -> bool:
        """Ask once, and take what comes; False if it was a part (a socket drops what its peer is slow to read)."""
        reader, wanted = self._reader, self._reader.next
        with self._socket(zmq.DEALER) as socket:
            socket.connect(self._replay_address)
            await socket.send_multipart([b"", wanted.to_bytes(8, "big")])
            while True:
                try:
                    async with asyncio.timeout(self._replay_timeout_s):
                        frames = await socket.recv_multipart()
                except TimeoutError:
                    if reader.next > wanted:
                        return False
                    raise StreamError(f"{self._replay_address} does not repeat what was missed") from None
                if len(frames) != 4 or len(frames[2]) != 8:
                    raise StreamError(f"{self._replay_address} answers with {len(frames)} parts, wanted 4")
                _, _, number, payload = frames
                if number == _END:
                    return True
                found = int.from_bytes(number, "big")
                if found > reader.next and reader.next == wanted:
                    reader.skip_to(found)
                    wanted = found
                if not reader.take(number, payload):
                    return False
                await asyncio.sleep(0)

    @contextlib.contextmanager
    def _socket(self, kind: int) -> Iterator[zmq.asyncio.Socket]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        try:
            yield socket
        finally:
            socket.close()


class EventStreams:
    """A follower for each member that publishes. Their tasks run in `group`, until `stop`."""

    def __init__(self, index: BlockIndex, *, group: asyncio.TaskGroup) -> None:
        self._index = index
        self._group = group
        self._context: zmq.asyncio.Context | None = None
        self._tasks: dict[str, tuple[EventStream, Space, Follower, asyncio.Task[None]]] = {}

    def update(self, worker: Worker) -> None:
        """After a poll: follow what the worker says of itself. One that was not reached is followed on."""
        info = worker.info
        if info is None:
            return
        stream = info.events if info.role is Role.PREFILL and worker.role is Role.PREFILL else None
        space = (info.base_fingerprint, info.page_size)
        if worker.url in self._tasks:
            if (stream, space) == self._tasks[worker.url][:2]:
                return
            self.forget(worker)
        if stream is None:
            return
        if self._context is None:
            self._context = zmq.asyncio.Context()
        follower = Follower(self._index.follow(worker.url, space), stream, url=worker.url, context=self._context)
        self._tasks[worker.url] = stream, space, follower, self._group.create_task(follower.run())

    def forget(self, worker: Worker) -> None:
        if worker.url in self._tasks:
            _, _, follower, task = self._tasks.pop(worker.url)
            follower.end()
            task.cancel()
            self._index.leave(worker.url)

    def stop(self) -> None:
        for _, _, follower, task in self._tasks.values():
            follower.end()
            task.cancel()

    def close(self) -> None:
        """When the tasks have ended."""
        if self._context is not None:
            self._context.destroy(linger=0)
