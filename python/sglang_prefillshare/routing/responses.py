"""The responses that clients go on from: SGLang keeps none with separate prefill and decode, so the router does.

Kept in memory, as JSON, up to a number of bytes; the one used least recently is forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sglang_prefillshare.routing import _json
from sglang_prefillshare.routing.answers import event_data
from sglang_prefillshare.routing.request import ClientRequest, Continued, Endpoint, input_items

_ENDS: Final = (b"event: response.completed\n", b"event: response.incomplete\n")


@dataclass(frozen=True, slots=True)
class Kept:
    """A response and what led to it. `caller` is whose key asked for it, where keys are asked for."""

    response: bytes
    items: bytes
    module: str
    session_key: str
    workers: tuple[str, str]
    caller: str | None

    @property
    def size(self) -> int:
        return len(self.response) + len(self.items)


class ResponseStore:
    """Responses by id, each for its own caller; of nobody else's is it told that they exist."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    @property
    def byte_count(self) -> int:
        return self._bytes

    def find(self, response_id: str, *, caller: str | None) -> Kept | None:
        kept = self._kept.get(response_id)
        if kept is None or kept.caller != caller:
            return None
        self._kept.move_to_end(response_id)
        return kept

    def remove(self, response_id: str, *, caller: str | None) -> bool:
        kept = self.find(response_id, caller=caller)
        if kept is None:
            return False
        del self._kept[response_id]
        self._bytes -= kept.size
        return True

    def continued(self, response_id: str, *, caller: str | None) -> Continued | None:
        """What a request that names the response goes on from."""
        kept = self.find(response_id, caller=caller)
        return None if kept is None else Continued(_json.loads(kept.items), kept.module, kept.session_key, kept.workers)

    def listener(
        self, request: ClientRequest, *, caller: str | None, workers: Callable[[], tuple[str, str]]
    ) -> Callable[[bytes], None] | None:
        """For what a client is told: keeps the response once it is whole. None for one that is not to be kept.

        `workers` says then which (prefill, decode) workers it came from.
        """
        if request.endpoint is not Endpoint.RESPONSES or not self._max_bytes or request.body.get("store") is False:
            return None

        def listen(said: bytes) -> None:
            response = whole_response(said, is_stream=request.is_stream)
            if response is not None:
                self._keep(request, response, workers(), caller)

        return listen

    def _keep(
        self, request: ClientRequest, response: dict[str, Any], workers: tuple[str, str], caller: str | None
    ) -> None:
        name, output = response.get("id"), response.get("output")
        if not isinstance(name, str) or not isinstance(output, list):
            return
        items = [*input_items(request.body["input"]), *output]
        kept = Kept(
            _json.dumps(response), _json.dumps(items), request.module, request.session_key or name, workers, caller
        )
        if kept.size > self._max_bytes:
            return
        self._kept[name] = kept
        self._bytes += kept.size
        while self._bytes > self._max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].size


def whole_response(said: bytes, *, is_stream: bool) -> dict[str, Any] | None:
    """The response in a whole answer, or in the event among `said` that ends a stream well; else None."""
    data: bytes | None = said
    if is_stream:
        at = next((place for end in _ENDS if (place := said.find(end)) >= 0), -1)
        data = event_data(said[at:].partition(b"\n\n")[0]) if at >= 0 else None
    if data is None:
        return None
    try:
        told = _json.loads(data)
    except (ValueError, RecursionError):
        return None
    response = told.get("response") if is_stream and isinstance(told, dict) else told
    return response if isinstance(response, dict) else None
