"""A worker's publisher of KV events, in small: what SGLang's sends, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio

END = (-1).to_bytes(8, "big", signed=True)
_clock = itertools.count(1_000)


def stored(parent: int | None, *blocks: int, size: int = 1, **more: Any) -> dict[str, Any]:
    """As SGLang writes it, with fields that the router does not read."""
    event = {"type": "BlockStored", "block_hashes": list(blocks), "parent_block_hash": parent, "block_size": size}
    return event | {"token_ids": [7] * len(blocks), "lora_id": None, "medium": "GPU"} | more


def removed(*blocks: int, **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(blocks), "medium": "GPU"} | more


CLEARED = {"type": "AllBlocksCleared"}


@dataclass
class Publisher:
    """SGLang's publisher in small: a PUB socket, and a ROUTER that repeats the last `buffer` batches. Its ports stay
    the same when it restarts."""

    context: zmq.asyncio.Context
    buffer: int = 1000
    ports: tuple[int, int] = (0, 0)
    kept: list[tuple[int, bytes]] = field(default_factory=list)
    next: int = 0
    asked: list[int] = field(default_factory=list)
    drops_after: int | None = None
    """A replay ends without a word after so many batches, as where a socket's queue was full."""
    is_mute: bool = False

    async def start(self) -> None:
        self.pub, self.router = self.context.socket(zmq.PUB), self.context.socket(zmq.ROUTER)
        found = []
        for socket, port in zip((self.pub, self.router), self.ports, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            found.append(port or socket.bind_to_random_port("tcp://127.0.0.1"))
            if port:
                await bound(socket, port)
        self.ports = found[0], found[1]
        self.task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self.pub.close()
        self.router.close()

    async def restart(self) -> None:
        await self.stop()
        self.kept, self.next = [], 0
        await self.start()

    async def publish(self, *events: Any, is_missed: bool = False) -> None:
        payload = msgspec.msgpack.encode([float(next(_clock)), list(events), 0])
        self.kept = [*self.kept, (self.next, payload)][-self.buffer :]
        number, self.next = self.next, self.next + 1
        if not is_missed:
            await self.pub.send_multipart([b"", number.to_bytes(8, "big"), payload])

    async def _serve(self) -> None:
        while True:
            client, _, start = await self.router.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            if self.is_mute:
                continue
            wanted = [(number, payload) for number, payload in self.kept if number >= self.asked[-1]]
            for number, payload in wanted[: self.drops_after]:
                await self.router.send_multipart([client, b"", b"", number.to_bytes(8, "big"), payload])
            if self.drops_after is None or len(wanted) <= self.drops_after:
                await self.router.send_multipart([client, b"", b"", END, b""])


async def bound(socket: zmq.asyncio.Socket, port: int) -> None:
    """A port that was just closed is free a moment later."""
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(zmq.ZMQError):
                socket.bind(f"tcp://127.0.0.1:{port}")
                return
            await asyncio.sleep(0.01)
