"""Waking a scheduler that waits: one event descriptor per process, written by whoever has news for its loop."""

from __future__ import annotations

import contextlib
import os

_fd: int | None = None


def wakeup_fd() -> int:
    """The descriptor that a waiting scheduler polls; created at first use."""
    global _fd
    if _fd is None:
        _fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    return _fd


def wake() -> None:
    """Tell this process's scheduler to look again; cheap, callable from any thread."""
    os.eventfd_write(wakeup_fd(), 1)


def drain() -> None:
    """Forget earlier wake-ups; called by the scheduler when it is about to look."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(wakeup_fd())
