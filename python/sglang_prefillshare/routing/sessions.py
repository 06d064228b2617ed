"""Which worker each session was last sent to, and how many live ones each has; the policy says what follows."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping


class SessionMap:
    """From session key to worker URL, for one pool of workers; the session used least recently is forgotten first.

    A session is live for `live_s` seconds after its last call began.
    """

    def __init__(self, *, capacity: int, live_s: float, now: Callable[[], float] = time.monotonic) -> None:
        assert capacity > 0
        self._capacity = capacity
        self._live_s = live_s
        self._now = now
        self._workers: OrderedDict[str, tuple[str, float]] = OrderedDict()  # and when; in the order of that

    def __len__(self) -> int:
        return len(self._workers)

    def worker_of(self, session_key: str | None) -> str | None:
        found = None if session_key is None else self._workers.get(session_key)
        return None if found is None else found[0]

    def is_new(self, session_key: str | None) -> bool:
        """Whether a session is named that was never placed, or was forgotten."""
        return session_key is not None and session_key not in self._workers

    def forget(self, workers: Collection[str]) -> None:
        """Forget the sessions of workers that lost their KV."""
        for key in [key for key, (worker, _) in self._workers.items() if worker in workers]:
            del self._workers[key]

    def live_counts(self) -> Mapping[str, int]:
        """Live sessions by worker; 0 for one that is not there."""
        oldest = self._now() - self._live_s
        counts: Counter[str] = Counter()
        for worker, used_at in reversed(self._workers.values()):
            if used_at < oldest:
                break
            counts[worker] += 1
        return counts

    def assign(self, session_key: str | None, worker: str) -> None:
        if session_key is None:
            return
        self._workers[session_key] = (worker, self._now())
        self._workers.move_to_end(session_key)
        if len(self._workers) > self._capacity:
            self._workers.popitem(last=False)
