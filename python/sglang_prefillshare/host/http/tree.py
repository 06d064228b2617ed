"""`GET /prefill_share/tree` of a worker: its radix tree in numbers, as its scheduler describes it.

However many ask, the scheduler is asked once at a time and, but for more nodes, once in `FRESH_S`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from sglang_prefillshare.host.roles.tree import DESCRIBE
from sglang_prefillshare.request_fields import whole_number
from sglang_prefillshare.tree import DEFAULT_LIMIT, MAX_LIMIT, readable

FRESH_S: Final = 0.5
_TIMEOUT_S: Final = 5.0


class SilentSchedulerError(Exception):
    """The scheduler did not answer; the message says so to the client."""


class TreeDescriptions:
    """The last description, and how to get a newer one."""

    def __init__(self, tokenizer_manager: Any, identity: dict[str, Any]) -> None:
        self._manager = tokenizer_manager
        self._identity = identity
        self._asking: asyncio.Task[dict[str, Any]] | None = None
        self._last: dict[str, Any] | None = None
        self._last_limit = 0
        self._last_at = 0.0

    async def latest(self, limit: int) -> dict[str, Any]:
        """A description of at least `limit` nodes, where the tree has as many. Raises `SilentSchedulerError`."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                while not self._serves(limit):
                    if self._asking is None or self._asking.done():
                        self._asking = asyncio.create_task(self._ask(limit))
                    await asyncio.shield(self._asking)
        except TimeoutError:
            raise SilentSchedulerError(f"The scheduler did not answer within {_TIMEOUT_S:g} s. Ask later.") from None
        assert self._last is not None
        return self._last

    def _serves(self, limit: int) -> bool:
        return self._last is not None and self._last_limit >= limit and time.monotonic() - self._last_at < FRESH_S

    async def _ask(self, limit: int) -> dict[str, Any]:
        from sglang.srt.managers.io_struct import DumperControlReqInput

        answers = await self._manager.dumper_control(DumperControlReqInput(method=DESCRIBE, body={"limit": limit}))
        if not answers[0].response:
            raise SilentSchedulerError(f"There is no picture of the radix tree: {answers[0].error}.")
        described = answers[0].response[0]
        self._last = {**self._identity, **described["pool"], **readable(described["tree"])}
        self._last_limit, self._last_at = limit, time.monotonic()
        return self._last


def parse_limit(text: str | None) -> int:
    """The query's `limit`. Raises `ValueError` with what was wanted."""
    if text is None:
        return DEFAULT_LIMIT
    limit = whole_number(text)
    if limit is None or not 1 <= limit <= MAX_LIMIT:
        raise ValueError(f"limit is {text[:40]!r}, wanted a number of nodes from 1 to {MAX_LIMIT}.")
    return limit
