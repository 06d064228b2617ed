"""Blocks of ports for the workers of deployments on this machine.

A worker owns a block, because SGLang also takes ports near its --port.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, Protocol

from sglang_prefillshare.errors import WorkerError

FIRST_PORT: Final = 11000
LAST_PORT: Final = 21999
PORTS_PER_WORKER: Final = 300
"""SGLang takes ports 233 to 239 above --port, and one more for each rank, when attention is data parallel. Blocks end
below 22000, where SGLang draws ports of its own at random, and thus below the range from which the kernel serves
connections."""

_GUARD: Final = PORTS_PER_WORKER - 1


class Port(IntEnum):
    """What a worker uses a port of its block for, by the port's place in it."""

    HTTP = 0
    BOOTSTRAP = 1
    NCCL = 2
    EVENTS = 3
    REPLAY = 4


class Ports(Protocol):
    """Where workers and the router may listen."""

    def take(self) -> int:
        """The first port of a block that is its taker's now."""


class GivenPorts:
    """Blocks that are known already, or that do not matter."""

    def __init__(self, first_ports: Iterator[int]) -> None:
        self._first_ports = first_ports

    def take(self) -> int:
        return next(self._first_ports)


class PortBlocks:
    """Blocks of ports for workers of this and of other deployments on the machine.

    The last port of a block is bound for as long as we own the block, so that another deployment passes over it; the
    kernel gives it back even if we are killed. The others are only seen to be free, for their worker to bind.
    """

    def __init__(self, *, avoid: int = 0) -> None:
        self._avoid = avoid
        self._guards: dict[int, socket.socket] = {}

    def take(self) -> int:
        """The first port of a free block. Raises `WorkerError` when there is none."""
        for first in range(FIRST_PORT, LAST_PORT - PORTS_PER_WORKER + 2, PORTS_PER_WORKER):
            if first in self._guards or first <= self._avoid < first + PORTS_PER_WORKER:
                continue
            guard = socket.socket()
            try:
                guard.bind(("", first + _GUARD))
            except OSError:
                guard.close()
                continue
            if not all(is_free("", first + offset) for offset in Port):
                guard.close()
                continue
            self._guards[first] = guard
            return first
        raise WorkerError(
            f"no free block of {PORTS_PER_WORKER} ports is left between {FIRST_PORT} and {LAST_PORT}. "
            "End other deployments on this machine, or name fewer workers."
        )

    @property
    def taken(self) -> list[int]:
        """The first ports of the blocks that are ours."""
        return list(self._guards)

    def give_back(self, first: int) -> None:
        """The block may be taken again, by anybody."""
        self._guards.pop(first).close()

    def release(self) -> None:
        for first in self.taken:
            self.give_back(first)


def is_free(host: str, port: int) -> bool:
    """Whether a server of this machine could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as bound:
        # As the server will bind it: a port whose last connections are still closing is free.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except OSError:
            return False
    return True
