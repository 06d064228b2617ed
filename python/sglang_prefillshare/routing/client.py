"""The client's end of a call, over ASGI: its body in, its answer out, and whether it is still there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final

from sglang_prefillshare.request_fields import whole_number
from sglang_prefillshare.routing import _json
from sglang_prefillshare.routing.answers import error_event_for, error_for
from sglang_prefillshare.routing.endings import Said
from sglang_prefillshare.routing.request import REQUEST_ID_HEADER, Endpoint, RequestError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

QUEUE_HEADER: Final = b"x-prefillshare-queue-ms"
"""On an answer: how many milliseconds the request waited in the router for a worker with room."""

_RETRY_AFTER_S: Final = 1


class ClientGoneError(Exception):
    """The client left before its answer was complete."""


async def read_body(receive: Receive, announced: str, *, max_bytes: int) -> bytes:
    """The whole body; 413 as soon as it is known to be too large. `announced`: its content-length header, or empty."""
    parts: list[bytes] = []
    size = whole_number(announced, digits=19) or 0
    if size > max_bytes:
        raise RequestError(413, f"The request body is larger than {max_bytes} bytes.")
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise RequestError(413, f"The request body is larger than {max_bytes} bytes.")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def wait_until_gone(receive: Receive) -> None:
    """Returns when the client leaves. Only after its whole body was read."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


class Reply:
    """The answer to the client, whole or streamed, over ASGI's `send`; errors are in the form of `endpoint`."""

    def __init__(self, send: Send, endpoint: Endpoint) -> None:
        self._send = send
        self._endpoint = endpoint
        self.request_id: str | None = None
        self.queue_ms: float | None = None
        """How long the request waited for room; None as long as it has not got that far."""
        self.status: int | None = None
        self._is_finished = False
        self._ends_event = True

    @property
    def is_started(self) -> bool:
        return self.status is not None

    @property
    def said(self) -> Said:
        if self._is_finished:
            return Said.ALL
        return Said.PART if self.is_started else Said.NOTHING

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.status = status
        raw = list(headers)
        if self.request_id is not None:
            raw.append((REQUEST_ID_HEADER.encode(), self.request_id.encode("latin-1")))
        if self.queue_ms is not None:
            raw.append((QUEUE_HEADER, b"%.0f" % self.queue_ms))
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def chunk(self, data: bytes) -> None:
        self._ends_event = data.endswith(b"\n\n")
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        self._is_finished = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def whole(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        await self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self.finish(body)

    async def error(self, status: int, message: str, *, kind: str, retry_after_s: int | None = None) -> None:
        """Answer with an error and nothing else."""
        headers = [(b"content-type", b"application/json")]
        if status in (429, 503):
            headers.append((b"retry-after", b"%d" % (_RETRY_AFTER_S if retry_after_s is None else retry_after_s)))
        await self.whole(status, headers, _json.dumps(error_for(self._endpoint, status, message, kind=kind)))

    async def error_event(self, status: int, message: str, *, kind: str) -> None:
        """End a stream that has begun with an error as its last event, and without [DONE]."""
        event = error_event_for(self._endpoint, status, message, kind=kind)
        await self.finish((b"" if self._ends_event else b"\n\n") + event)
