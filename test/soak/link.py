"""A link between the router and a worker that breaks where a request asks for it: the one fake of the storm.

Bytes pass through as they are. A request that bears `FAULT_HEADER` names what its link is to do to it, and when: the
router passes clients' headers on to both legs, so a fault reaches the leg that it is meant for and no other.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

FAULT_HEADER: Final = "x-soak-fault"
_BYTES: Final = 65_536
_LINGER_NOT: Final = struct.pack("ii", 1, 0)
_REQUEST: Final = re.compile(rb"\A(?:GET|POST) /")
_FAULT: Final = re.compile(rb"\r\n" + FAULT_HEADER.encode() + rb": *([^\r\n]+)\r\n", re.IGNORECASE)


class Breaks(StrEnum):
    """What a link does to an exchange."""

    RESET = "reset"  # both sides see their connection reset
    CLOSE = "close"  # both sides see it closed
    STALL = "stall"  # it stops for `stall_s`, and goes on
    DEAD = "dead"  # nothing passes any more, and neither side is told


class Way(StrEnum):
    REQUEST = "request"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class LinkFault:
    """What happens to a leg on a worker of `role`, when `after_bytes` of its request or answer have passed.

    It happens once, to the first leg of that `role` that bears this `number`; with `is_lasting` to every one, so that
    another try meets it again.
    """

    number: int
    role: str
    breaks: Breaks
    way: Way
    after_bytes: int
    stall_s: float = 0.0
    is_lasting: bool = False

    def header(self) -> str:
        fields = (self.number, self.role, self.breaks, self.way, self.after_bytes, self.stall_s, int(self.is_lasting))
        return ",".join(map(str, fields))

    @classmethod
    def parse(cls, header: str) -> LinkFault:
        number, role, breaks, way, after_bytes, stall_s, is_lasting = header.split(",")
        return cls(int(number), role, Breaks(breaks), Way(way), int(after_bytes), float(stall_s), bool(int(is_lasting)))


class Links:
    """All links of a run: they share which faults happened."""

    def __init__(self) -> None:
        self.happened: Counter[str] = Counter()
        """By role and kind."""
        self._spent: set[int] = set()
        self.open_count = 0

    @asynccontextmanager
    async def to(self, worker_url: str, role: str) -> AsyncIterator[str]:
        """A link to a worker of `role`; yields the URL at which the worker is found behind it."""
        parts = urlsplit(worker_url)
        assert parts.hostname is not None and parts.port is not None
        target = (parts.hostname, parts.port)
        tasks: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            self.open_count += 1
            try:
                await self._pass(reader, writer, target, role)
            finally:
                self.open_count -= 1
                tasks.discard(task)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        try:
            yield f"http://{host}:{port}"
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def take(self, fault: LinkFault, role: str) -> bool:
        """Whether `fault` is to happen to a leg on a worker of `role`; marks it as spent."""
        if fault.role != role or (fault.number in self._spent and not fault.is_lasting):
            return False
        self._spent.add(fault.number)
        return True

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: tuple[str, int], role: str
    ) -> None:
        try:
            worker_reader, worker_writer = await asyncio.open_connection(*target)
        except OSError:
            _end(writer, is_reset=True)  # nobody listens there
            return
        link = _Link(self, role, (writer, worker_writer))
        pumps = [
            asyncio.create_task(link.pump(reader, worker_writer, Way.REQUEST)),
            asyncio.create_task(link.pump(worker_reader, writer, Way.ANSWER)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, worker_writer):
                _end(end, is_reset=link.is_reset)


class _Link:
    """One connection through a link."""

    def __init__(self, links: Links, role: str, ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        self._links = links
        self._role = role
        self._ends = ends
        self._fault: LinkFault | None = None
        self._left_bytes = 0
        self.is_reset = False

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        """Pass bytes on until either side closes, or a fault ends the connection."""
        is_dead = False
        with suppress(OSError):
            while data := await reader.read(_BYTES):
                if way is Way.REQUEST and _REQUEST.match(data):
                    self._arm(data)
                if is_dead:
                    continue  # read on, to see the other side leave
                fault = self._fault
                if fault is None or fault.way is not way:
                    writer.write(data)
                    await writer.drain()
                    continue
                passed, rest = data[: self._left_bytes], data[self._left_bytes :]
                self._left_bytes -= len(passed)
                writer.write(passed)
                if not rest:
                    await writer.drain()
                    continue
                self._fault = None
                self._links.happened[f"{self._role} {way} {fault.breaks}"] += 1
                match fault.breaks:
                    case Breaks.RESET | Breaks.CLOSE:
                        self.is_reset = fault.breaks is Breaks.RESET
                        return
                    case Breaks.STALL:
                        await asyncio.sleep(fault.stall_s)
                        writer.write(rest)
                        await writer.drain()
                    case Breaks.DEAD:
                        is_dead = True

    def _arm(self, head: bytes) -> None:
        """A request begins: what is to happen to it, if anything."""
        self._fault = None
        if (found := _FAULT.search(head)) is not None:
            fault = LinkFault.parse(found[1].decode())
            if self._links.take(fault, self._role):
                self._fault, self._left_bytes = fault, fault.after_bytes


def _end(writer: asyncio.StreamWriter, *, is_reset: bool) -> None:
    if is_reset:
        with suppress(OSError):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        writer.transport.abort()
    else:
        writer.close()
