"""The endpoints that change who serves and what: members, draining, modules. Only with the admin key.

Without a configured key they are closed, whoever asks.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final, Protocol, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.adapters import Adapters, ModuleError
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.membership import checked_url
from sglang_prefillshare.routing.roster import Roster
from sglang_prefillshare.routing.workers import Worker, WorkerPool

MAX_BODY_BYTES: Final = 64 * 1024

_Body = TypeVar("_Body", bound=msgspec.Struct)


class _Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str


class _Drain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    is_draining: bool


class _Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    path: str
    base: str | None = None


class Administered(Protocol):
    """The router, as far as it is changed here; roster and adapters exist while it runs."""

    config: RouterConfig
    pool: WorkerPool

    @property
    def roster(self) -> Roster: ...

    @property
    def adapters(self) -> Adapters: ...


class Admin:
    """The endpoints, for one router."""

    def __init__(self, router: Administered) -> None:
        self._router = router
        self._config = router.config
        self._pool = router.pool

    def routes(self) -> list[Route]:
        return [
            Route("/admin/workers", self.guarded(self.add_worker), methods=["POST"]),
            Route("/admin/workers", self.guarded(self.remove_worker), methods=["DELETE"]),
            Route("/admin/workers/drain", self.guarded(self.drain_worker), methods=["POST"]),
            Route("/modules", self.guarded(self.load_module), methods=["POST"]),
            Route("/modules/{name:path}", self.guarded(self.unload_module), methods=["DELETE"]),
        ]

    async def add_worker(self, request: Request) -> Response:
        """A member more; it is polled at once, and serves when it fits."""
        url = _address((await self._body(request, _Address)).url)
        is_new = url not in self._pool
        worker = self._router.roster.add(url)
        return JSONResponse(worker.to_json(), status_code=HTTPStatus.CREATED if is_new else HTTPStatus.OK)

    async def remove_worker(self, request: Request) -> Response:
        """A member less: no new requests, those under way finish, then it is forgotten. With `for_good=true` a module
        of the flags goes with its last member, as others do."""
        worker = self._member(request.query_params.get("url", ""))
        for_good = request.query_params.get("for_good", "false")
        if for_good not in ("true", "false"):
            raise HTTPException(HTTPStatus.BAD_REQUEST, f"for_good is {for_good!r}, wanted true or false.")
        self._router.roster.remove(worker, for_good=for_good == "true")
        return JSONResponse(worker.to_json(), status_code=HTTPStatus.ACCEPTED)

    async def drain_worker(self, request: Request) -> Response:
        """Keep new requests away from a member that stays one, or let them come again."""
        body = await self._body(request, _Drain)
        worker = self._member(body.url)
        self._router.roster.drain(worker, is_draining=body.is_draining)
        return JSONResponse(worker.to_json())

    async def load_module(self, request: Request) -> Response:
        """An adapter for all workers that serve adapters, by name."""
        body = await self._body(request, _Module)
        try:
            workers = await self._router.adapters.load(body.name, body.path, base=body.base)
        except ModuleError as error:
            raise HTTPException(error.status, str(error)) from error
        return JSONResponse({"name": body.name, "workers": [worker.url for worker in workers]})

    async def unload_module(self, request: Request) -> Response:
        """Takes as long as the requests for it that are under way, `drain_deadline_s` at most."""
        name = request.path_params["name"]
        try:
            workers = await self._router.adapters.unload(name)
        except ModuleError as error:
            raise HTTPException(error.status, str(error)) from error
        return JSONResponse({"name": name, "workers": [worker.url for worker in workers]})

    # -- who asks, and what for

    def guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Nothing of a request is read before its key was right."""

        async def answer(request: Request) -> Response:
            self._check_key(request)
            return await endpoint(request)

        return answer

    def _check_key(self, request: Request) -> None:
        wanted = self._config.admin_api_key
        if wanted is None:
            raise HTTPException(
                HTTPStatus.FORBIDDEN,
                f"{request.url.path} is closed: the router has no admin key. Start it with --admin-api-key KEY, "
                "or with PREFILLSHARE_ADMIN_API_KEY set.",
            )
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(shown.strip().encode("latin-1", "replace"), wanted.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise HTTPException(
                HTTPStatus.UNAUTHORIZED,
                f"{request.url.path} wants the router's admin key, as Authorization: Bearer KEY.",
                headers={"www-authenticate": "Bearer"},
            )

    async def _body(self, request: Request, kind: type[_Body]) -> _Body:
        data = b""
        try:
            async with asyncio.timeout(self._config.admin_timeout_s):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > MAX_BODY_BYTES:
                        raise HTTPException(
                            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body has over {MAX_BODY_BYTES} bytes."
                        )
        except TimeoutError as error:
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, "The body did not come in time.") from error
        except ClientDisconnect as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "The body is not whole.") from error
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            wanted = ", ".join(kind.__struct_fields__)
            raise HTTPException(
                HTTPStatus.BAD_REQUEST, f"The body cannot be used: {error}. Wanted a JSON object of: {wanted}."
            ) from error

    def _member(self, url: str) -> Worker:
        found = _address(url)
        if found not in self._pool:
            known = ", ".join(self._pool.urls) or "none"
            raise HTTPException(HTTPStatus.NOT_FOUND, f"{found} is no member. The members are: {known}.")
        return self._pool[found]


def _address(url: Any) -> str:
    try:
        return checked_url(url, "url")
    except ConfigError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error
