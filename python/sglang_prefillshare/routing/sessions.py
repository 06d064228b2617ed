"""Which worker each session was last sent to; the policy says when it stays there."""

from __future__ import annotations

from collections import OrderedDict


class SessionMap:
    """From session key to worker URL, for one pool of workers; the session used least recently is forgotten first."""

    def __init__(self, *, capacity: int) -> None:
        assert capacity > 0
        self._capacity = capacity
        self._workers: OrderedDict[str, str] = OrderedDict()

    def worker_of(self, session_key: str | None) -> str | None:
        return None if session_key is None else self._workers.get(session_key)

    def assign(self, session_key: str | None, worker: str) -> None:
        if session_key is None:
            return
        self._workers[session_key] = worker
        self._workers.move_to_end(session_key)
        if len(self._workers) > self._capacity:
            self._workers.popitem(last=False)
