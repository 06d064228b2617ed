"""Waiting without spinning: what a CPU scheduler does while it has no batch to run.

SGLang's loop polls as fast as it can, which on a GPU host costs one core of many and on a two-core machine everything.
Here the loop blocks on what can give it work: the request sockets, and the event descriptor that our transfer backend
writes. Requests wake it at once. Transfers over other backends cannot wake it and are looked at every millisecond.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import zmq

from sglang_prefillshare.host.transfer import wakeup
from sglang_prefillshare.settings import BACKEND_NAME

IDLE_POLL_MS: Final = 500
"""Nothing is pending: housekeeping runs this often, requests still wake the loop at once."""

PENDING_POLL_MS: Final = 5
"""Something is pending that can wake us (our own transfers), with this as the safety net."""

FOREIGN_POLL_MS: Final = 1
"""Something is pending that cannot wake us: another transfer backend, a grammar being compiled."""

COMPUTE_SLICE_NS: Final = 100_000_000
"""The longest slice that Linux grants; a decode step over some requests takes less."""

_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
_SCHED_ATTR: Final = "=IIQiIQQQ"
"""`struct sched_attr` of sched_setattr(2): size, policy, flags, nice, priority, runtime, deadline, period."""


class IdleWaiter:
    """One scheduler's way of waiting."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._poller = zmq.Poller()
        for socket in (scheduler.ipc_channels.recv_from_tokenizer, scheduler.ipc_channels.recv_from_rpc):
            if isinstance(socket, zmq.Socket):
                self._poller.register(socket, zmq.POLLIN)
        self._poller.register(wakeup.wakeup_fd(), zmq.POLLIN)
        self._next_housekeeping = 0.0
        self._is_led = scheduler.ipc_channels.recv_from_tokenizer is None
        """Rank 0 hears the requests: this one waits for it in SGLang's broadcast, and must not keep it waiting."""

    def wait(self, housekeeping: Callable[[Any], None]) -> None:
        """Run SGLang's idle housekeeping when it is due, then block until there may be something to do."""
        scheduler = self._scheduler
        is_idle = scheduler.is_fully_idle()
        now = time.monotonic()
        if not is_idle or now >= self._next_housekeeping:
            housekeeping(scheduler)
            self._next_housekeeping = now + IDLE_POLL_MS / 1000
        if not self._is_led:
            self._poller.poll(IDLE_POLL_MS if is_idle else self._pending_poll_ms())
        wakeup.drain()

    def _pending_poll_ms(self) -> int:
        scheduler = self._scheduler
        if scheduler.grammar_manager.has_waiting_grammars():
            return FOREIGN_POLL_MS
        return PENDING_POLL_MS if scheduler.transfer_backend.value == BACKEND_NAME else FOREIGN_POLL_MS


def on_idle(original: Callable[[Any], None], self: Any) -> None:
    """Hook on `Scheduler.on_idle`."""
    waiter = getattr(self, "_prefill_share_idle_waiter", None)
    if waiter is None:
        waiter = IdleWaiter(self)
        self._prefill_share_idle_waiter = waiter
        compute_in_whole_slices()
    waiter.wait(original)


def compute_in_whole_slices() -> None:
    """Tell Linux that this thread computes: others that compute wait for its slice of the core to end, which is long.

    Where workers share cores, every change of hands costs the next one its caches. The threads beside this one, which
    take over KV and answer, stay as they are and may interrupt it.
    """
    number = _SCHED_SETATTR.get(platform.machine()) if sys.platform == "linux" else None
    if number is not None:
        attributes = struct.pack(
            _SCHED_ATTR, struct.calcsize(_SCHED_ATTR), os.SCHED_BATCH, 0, 0, 0, COMPUTE_SLICE_NS, 0, 0
        )
        # A sandbox may forbid it, a kernel before 6.12 ignores the slice, and nothing depends on either.
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)
