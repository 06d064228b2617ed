"""How many requests are under way for each decode module, and when the last of one has ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator


class UnderWay:
    """Counts requests from the moment they were accepted until they are answered, retries and waiting included."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._ended: dict[str, asyncio.Event] = {}

    def __getitem__(self, module: str) -> int:
        return self._counts[module]

    @contextlib.contextmanager
    def one(self, module: str) -> Iterator[None]:
        """A request for `module`, for as long as the context lasts."""
        self._counts[module] += 1
        try:
            yield
        finally:
            self._counts[module] -= 1
            if not self._counts[module]:
                del self._counts[module]
                if (ended := self._ended.pop(module, None)) is not None:
                    ended.set()

    async def none_left(self, module: str, *, timeout_s: float) -> bool:
        """Wait until no request for `module` is left, for `timeout_s` at most; whether none is."""
        if not self._counts[module]:
            return True
        ended = self._ended.setdefault(module, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        return ended.is_set()
