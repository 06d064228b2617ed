"""The live page at `/ui`: the shared tree, the workers, and how the last minutes went.

The page is files of this package; what it shows comes from `/ui/state`. However many pages are open, the workers are
asked once a second at most, and while nobody looks they are not asked at all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Final

import aiohttp
import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from sglang_prefillshare import __version__
from sglang_prefillshare.errors import WorkerError
from sglang_prefillshare.protocol import TREE_PATH
from sglang_prefillshare.routing.figures import summarize
from sglang_prefillshare.routing.telemetry import CallLog
from sglang_prefillshare.routing.trees import MAX_BODY_BYTES, Tree, parse_tree
from sglang_prefillshare.routing.workers import Worker, WorkerPool
from sglang_prefillshare.tree import DEFAULT_LIMIT

STATE_VERSION: Final = 1
FRESH_S: Final = 1.0

_PAGE: Final = "index.html"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS: Final = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


class _Message(msgspec.Struct, frozen=True):
    message: str


class _WorkerError(msgspec.Struct, frozen=True):
    error: _Message


class Board:
    """What the page is served, and what it asks for. `queue` counts the requests that wait, by module."""

    def __init__(
        self,
        *,
        pool: WorkerPool,
        calls: CallLog,
        session: Callable[[], aiohttp.ClientSession],
        models: Callable[[], list[str]],
        queue: Callable[[], Mapping[str, int]],
        started_at: int,
    ) -> None:
        self._pool = pool
        self._calls = calls
        self._session = session
        self._models = models
        self._queue = queue
        self._started_at = started_at
        self._files = _read_files()
        self._asking: asyncio.Task[bytes] | None = None
        self._asked_s = float("-inf")

    def routes(self) -> list[Route]:
        return [
            Route("/ui", self._page),
            Route("/ui/", _without_slash),
            Route("/ui/state", self.state),
            Route("/ui/{name}", self._file),
        ]

    def stop(self) -> None:
        """Nobody is asked any more."""
        if self._asking is not None:
            self._asking.cancel()

    async def _page(self, request: Request) -> Response:
        return self._serve(_PAGE)

    async def _file(self, request: Request) -> Response:
        return self._serve(request.path_params["name"])

    def _serve(self, name: str) -> Response:
        found = self._files.get(name)
        if found is None:
            return Response("The page has no such file.", HTTPStatus.NOT_FOUND, _HEADERS, "text/plain")
        body, content_type = found
        return Response(body, headers={**_HEADERS, "content-type": f"{content_type}; charset=utf-8"})

    async def state(self, request: Request) -> Response:
        """What the page shows, as JSON: at most `FRESH_S` old, and the same for all who ask meanwhile."""
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked_s >= FRESH_S):
            self._asked_s = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        body = await asyncio.shield(self._asking)
        return Response(body, headers={**_HEADERS, "content-type": "application/json", "cache-control": "no-store"})

    async def _ask(self) -> bytes:
        workers = list(self._pool)
        trees = await asyncio.gather(*(self._tree_of(worker) for worker in workers))
        now_s = time.time()
        models = self._models()
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "at": now_s,
            "router": {
                "version": __version__,
                "started_at": self._started_at,
                "models": models,
                "base_fingerprint": self._pool.reference,
            },
            "workers": [
                {
                    **{name: value for name, value in worker.to_json().items() if name != "info"},
                    "tree": tree,
                    "problem": problem,
                }
                for worker, (tree, problem) in zip(workers, trees, strict=True)
            ],
            "figures": summarize(self._calls.find(), modules=models, now_s=now_s),
            "queue": dict(self._queue()),
        }
        return msgspec.json.encode(state)

    async def _tree_of(self, worker: Worker) -> tuple[Tree | None, str | None]:
        """A worker's tree, or why there is none to show."""
        if not worker.is_reachable:
            return None, worker.verdict.reason
        try:
            async with self._pool.get(worker, f"{TREE_PATH}?limit={DEFAULT_LIMIT}", self._session()) as response:
                body = await _read(response)
                if response.status == HTTPStatus.OK:
                    return parse_tree(body, source="it"), None
                if response.status == HTTPStatus.NOT_FOUND:
                    return None, f"it has no {TREE_PATH}: run the same sglang-prefillshare version everywhere"
                return None, f"it answered {response.status} at {TREE_PATH}{_reason(body)}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return None, f"it does not answer: {str(error) or type(error).__name__}"
        except WorkerError as error:
            return None, str(error)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise WorkerError(f"it answered over {MAX_BODY_BYTES} bytes at {TREE_PATH}")
    return bytes(body)


def _reason(body: bytes) -> str:
    """What a worker's error says, for its line on the page."""
    try:
        return f": {msgspec.json.decode(body, type=_WorkerError).error.message[:300]}"
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def _read_files() -> dict[str, tuple[bytes, str]]:
    """The page's own files by name, with their types; licences and notes stay where they are."""
    found = {}
    for entry in files("sglang_prefillshare.routing").joinpath("ui").iterdir():
        content_type = next((kind for suffix, kind in _TYPES.items() if entry.name.endswith(suffix)), None)
        if content_type is not None:
            found[entry.name] = (entry.read_bytes(), content_type)
    return found


async def _without_slash(request: Request) -> Response:
    """The page's links are relative to `/ui`."""
    return RedirectResponse("../ui", HTTPStatus.MOVED_PERMANENTLY)
