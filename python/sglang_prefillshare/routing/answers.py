"""What a decode worker said, as the client may see it: the client's ids, no half answers, one form of error.

Everything else passes through as the bytes that it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

from sglang_prefillshare.routing import _json
from sglang_prefillshare.routing.request import Endpoint

_EVENT_END: Final = b"\n\n"
_PATH: Final = re.compile(r"(?<![\w:/.])/(?!(?:v1|m)/)(?:[^\s/'\",:()]+/)+([^\s/'\",:()]+)")


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """An answer that is none: what the worker says went wrong, and the status that goes with it."""

    status: int
    message: str


def error_body(status: int, message: str, *, kind: str, param: Any = None) -> dict[str, Any]:
    """An error as OpenAI clients read it, with the fields of SGLang's own."""
    return {"error": {"object": "error", "message": message, "type": kind, "param": param, "code": status}}


UNSAID: Final = "Internal server error"
"""What SGLang makes of every failure of a worker's at `/v1/messages`."""

_TOLD_CHARACTERS: Final = 500

_ANTHROPIC_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_STATUSES: Final = {kind: status for status, kind in _ANTHROPIC_KINDS.items()}


def error_for(endpoint: Endpoint, status: int, message: str, *, kind: str, param: Any = None) -> dict[str, Any]:
    """An error as the clients of an endpoint read it."""
    if endpoint is Endpoint.MESSAGES:
        known = _ANTHROPIC_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {"type": "error", "error": {"type": known, "message": message}}
    return error_body(status, message, kind=kind, param=param)


def error_for_path(path: str, status: int, message: str, *, kind: str) -> dict[str, Any]:
    """Likewise, where no endpoint was found, or is to be."""
    endpoint = Endpoint.MESSAGES if Endpoint.MESSAGES in path else Endpoint.CHAT
    return error_for(endpoint, status, message, kind=kind)


def error_event_for(endpoint: Endpoint, status: int, message: str, *, kind: str) -> bytes:
    """The event that ends a stream with an error."""
    error = error_for(endpoint, status, message, kind=kind)
    match endpoint:
        case Endpoint.MESSAGES:
            name = b"event: error\n"
        case Endpoint.RESPONSES:
            # The API has the fields at the top; its Python client raises for an `error` object alone.
            name = b"event: error\n"
            top = {"type": "error", "code": str(status), "message": message, "param": None, "sequence_number": 0}
            error = {**top, **error}
        case _:
            name = b""
    return name + b"data: " + _json.dumps(error) + _EVENT_END


class ClientIds:
    """Puts the client's ids in the place of a pair's own, which are unguessable and so occur nowhere else."""

    def __init__(self, own: Sequence[str], public: Sequence[str]) -> None:
        pairs = zip(own, public, strict=True)
        self._pairs = [(mine.encode(), _json.dumps(theirs)[1:-1]) for mine, theirs in pairs]

    def __call__(self, data: bytes) -> bytes:
        for mine, theirs in self._pairs:
            data = data.replace(mine, theirs)
        return data


class Events:
    """A stream cut into its events, each whole: nothing that is looked for in one is ever split."""

    def __init__(self) -> None:
        self._rest = b""
        self.count = 0
        """Of those that were complete: about as many as the answer has tokens."""

    def feed(self, data: bytes) -> bytes:
        """The events that are complete now, in one piece; empty where there are none."""
        whole, end, rest = (self._rest + data).rpartition(_EVENT_END)
        self._rest = rest
        events = whole + end
        self.count += events.count(_EVENT_END)
        return events

    def rest(self) -> bytes:
        """What came after the last event, once the stream has ended."""
        rest, self._rest = self._rest, b""
        return rest


def failure_in_events(events: bytes) -> tuple[bytes, WorkerFailure | None]:
    """The events before the first that says that the answer will not be whole, and what that one says."""
    if b"abort" not in events and b'"error"' not in events:
        return events, None
    passed = b""
    for event in events.split(_EVENT_END):
        data = event_data(event)
        failure = failure_in(data) if data is not None else None
        if failure is not None:
            return passed, failure
        passed += event + _EVENT_END if event else b""
    return passed, None


def event_data(event: bytes) -> bytes | None:
    """The data of an event, with or without a name before it; None where it has none."""
    if event.startswith(b"event:"):
        event = event.partition(b"\n")[2]
    return event.removeprefix(b"data:").strip() if event.startswith(b"data:") else None


def failure_in(answer: bytes) -> WorkerFailure | None:
    """What a JSON answer with status 200 says against itself: an abort in one of its parts, or an error."""
    if b"abort" not in answer and b'"error"' not in answer:
        return None
    try:
        parsed = _json.loads(answer)
    except (ValueError, RecursionError):
        return None
    for part in _parts(parsed):
        if isinstance(part.get("error"), dict) and "choices" not in part and "meta_info" not in part:
            status, message, _kind, _param = _read_error(part, 500)
            return WorkerFailure(status, message)
        reason = part.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "abort":
            code = reason.get("status_code")
            told = without_paths(str(reason.get("message") or "it was aborted"))
            return WorkerFailure(code if _is_error_status(code) else 503, told)
        if reason == "abort":
            return WorkerFailure(503, "it was aborted")
    return None


def _parts(parsed: Any) -> Iterator[dict[str, Any]]:
    """Everything of an answer that can carry a finish reason, of any endpoint, and the answer itself."""
    for item in parsed if isinstance(parsed, list) else [parsed]:
        if not isinstance(item, dict):
            continue
        yield item
        if item.get("type") == "response.failed" and isinstance(item.get("response"), dict):
            yield item["response"]
        choices = item.get("choices")
        yield from (choice for choice in (choices if isinstance(choices, list) else []) if isinstance(choice, dict))
        if isinstance(item.get("meta_info"), dict):
            yield item["meta_info"]


def _is_error_status(status: Any) -> TypeGuard[int]:
    return isinstance(status, int) and not isinstance(status, bool) and 400 <= status < 600


def client_error(endpoint: Endpoint, status: int, content_type: bytes, body: bytes) -> tuple[bytes, bytes]:
    """A worker's error as (content type, body) for the client: in the endpoint's form, and no file paths.

    SGLang has several of its own, flat, nested, Anthropic's and FastAPI's; `/generate` keeps what it says.
    """
    parsed = _parsed_error(body, status)
    if endpoint is Endpoint.GENERATE and isinstance(parsed, dict) and isinstance(parsed.get("error"), dict):
        error = parsed["error"]
        parsed["error"] = {**error, "message": without_paths(str(error.get("message", "")))}
        return b"application/json", _json.dumps(parsed)
    code, message, kind, param = _read_error(parsed, status)
    return b"application/json", _json.dumps(error_for(endpoint, code, message, kind=kind, param=param))


def failure_told(source: str, status: int, body: bytes) -> str:
    """What we say of a worker, `source`, that answered with an error: its words, if any, and no file paths."""
    _code, message, _kind, _param = _read_error(_parsed_error(body, status), status)
    if message == UNSAID:
        return f"The {source} answered {status} and does not say why; its log does."
    return f"The {source} answered {status}: {message[:_TOLD_CHARACTERS]}"


def _parsed_error(body: bytes, status: int) -> Any:
    try:
        return _json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace").strip() or f"The worker answered {status}."


def _read_error(parsed: Any, status: int) -> tuple[int, str, str, Any]:
    """(status, message, type, param) of an error in whichever form."""
    error = parsed
    if isinstance(parsed, dict):
        error = parsed.get("error", parsed.get("detail", parsed))
    if not isinstance(error, dict):
        text = error if isinstance(error, str) else _json.dumps(error).decode()
        return status, without_paths(text), "worker_error" if status >= 500 else "invalid_request_error", None
    code = error.get("code")
    if code is None and isinstance(parsed, dict) and parsed.get("type") == "error":
        code = _ANTHROPIC_STATUSES.get(str(error.get("type")))
    kind = str(error.get("type") or ("worker_error" if status >= 500 else "invalid_request_error"))
    return (
        code if _is_error_status(code) else status,
        without_paths(str(error.get("message", ""))),
        kind,
        error.get("param"),
    )


def without_paths(text: str) -> str:
    """`text` with every absolute file path cut to its last name: where things lie is no client's business."""
    return _PATH.sub(r"\1", text.partition("Traceback (most recent call last)")[0].strip() or "The worker failed.")
