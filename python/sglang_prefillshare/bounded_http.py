"""HTTP/1.1 by httptools, whose parser is C: uvicorn's protocol, with a bound on what is no body.

The parser keeps the head of a request, and the trailers after a body, for as long as they grow; a client could fill the
memory of the process with either. The bytes of a body are bounded where they are read.
"""

from __future__ import annotations

import json
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024
"""Of a request: its first line and its headers."""
FRAMING_PER_BYTE: Final = 8
"""A body in chunks of one byte has five bytes of framing for each, and a few more are its sender's choice."""

_REFUSAL: Final = json.dumps(
    {
        "error": {
            "object": "error",
            "message": f"The request's head is larger than {MAX_HEAD_BYTES} bytes.",
            "type": "invalid_request_error",
            "param": None,
            "code": 431,
        }
    }
).encode()


class BoundedHttpProtocol(HttpToolsProtocol):
    """Ends a connection with 431 whose request has more beside its body than one is allowed."""

    _head_bytes = 0
    """Of the request that is being received: everything but its body."""
    _body_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES + FRAMING_PER_BYTE * self._body_bytes and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._body_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._head_bytes -= len(body)
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head_bytes = self._body_bytes = 0

    def _refuse(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_REFUSAL), _REFUSAL)
            )
        self.transport.close()
