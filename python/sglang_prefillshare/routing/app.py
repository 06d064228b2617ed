"""The router as an ASGI app: its endpoints, and the life of what they share.

Generation requests go to `dispatch`; everything here only describes the pool or asks its workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

import aiohttp
from prometheus_client.metrics_core import Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_prefillshare import __version__
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.request_fields import whole_number
from sglang_prefillshare.routing import _json
from sglang_prefillshare.routing.adapters import Adapters
from sglang_prefillshare.routing.admin import Admin
from sglang_prefillshare.routing.answers import error_for_path
from sglang_prefillshare.routing.board import Board
from sglang_prefillshare.routing.client import ClientGoneError, read_body
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.dispatch import Dispatcher
from sglang_prefillshare.routing.event_streams import EventStreams
from sglang_prefillshare.routing.keys import CALLER_SCOPE, KeyFile, KeyGate
from sglang_prefillshare.routing.legs import Legs
from sglang_prefillshare.routing.prefix_index import PrefixIndex
from sglang_prefillshare.routing.request import REQUEST_ID_HEADER, SESSION_HEADER, Endpoint, RequestError, parse_request
from sglang_prefillshare.routing.responses import ResponseStore
from sglang_prefillshare.routing.roster import Roster
from sglang_prefillshare.routing.telemetry import CallLog, CallRecord, Metrics
from sglang_prefillshare.routing.tracing import Tracer
from sglang_prefillshare.routing.worker_metrics import parse_handoff_families, sum_families
from sglang_prefillshare.routing.workers import Worker, WorkerPool

logger = logging.getLogger(__name__)

COUNT_TOKENS_PATH: Final = f"{Endpoint.MESSAGES}/count_tokens"
KEEP_ALIVE_S: Final = 3.0
"""Idle connections to workers are closed before SGLang's server does it (5 s): a request that is sent into a closing
connection is lost."""


class Router:
    """The state that the endpoints share. `running()` must be entered before requests are served.

    `tracer` is told of every call and leg (by default the one that `config` names), `on_finished` of every call once.
    Raises `ConfigError` for keys that cannot be read, and where an extra is missing.
    """

    pool_type: type[WorkerPool] = WorkerPool
    legs_type: type[Legs] = Legs

    def __init__(
        self,
        config: RouterConfig,
        *,
        tracer: Tracer | None = None,
        on_finished: Callable[[CallRecord], None] = lambda _record: None,
    ) -> None:
        self.config = config
        self.keys = None if config.api_keys_file is None else KeyFile(config.api_keys_file)
        self.responses = ResponseStore(max_bytes=config.response_store_bytes)
        self._tracer = tracer or _tracer_for(config.otlp_endpoint)
        self._on_finished = on_finished
        self.index = PrefixIndex(capacity_blocks=config.prefix_capacity_blocks)
        self.pool = self.pool_type(config, index=self.index)
        self.metrics = Metrics()
        self.calls = CallLog(size=config.call_log_size)
        self.started_at = int(time.time())
        self.board = Board(
            pool=self.pool,
            calls=self.calls,
            session=lambda: self.session,
            models=lambda: self.pool.modules,
            queue=lambda: self.dispatcher.gate.counts(),
            started_at=self.started_at,
        )
        self._dispatcher: Dispatcher | None = None
        self._session: aiohttp.ClientSession | None = None
        self._roster: Roster | None = None
        self._adapters: Adapters | None = None
        self._streams: EventStreams | None = None

    @property
    def dispatcher(self) -> Dispatcher:
        assert self._dispatcher is not None, "the app's lifespan has not started"
        return self._dispatcher

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the app's lifespan has not started"
        return self._session

    @property
    def roster(self) -> Roster:
        assert self._roster is not None, "the app's lifespan has not started"
        return self._roster

    @property
    def adapters(self) -> Adapters:
        assert self._adapters is not None, "the app's lifespan has not started"
        return self._adapters

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Polls the workers and serves. On leaving, legs in flight are ended and told to their workers."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,  # decode's bytes pass through untouched
            headers={"accept-encoding": "identity", "user-agent": f"sglang-prefillshare-router/{__version__}"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        # Abort messages outlive the pollers, but not the session.
        async with session as self._session, asyncio.TaskGroup() as background, asyncio.TaskGroup() as pollers:
            self._dispatcher = Dispatcher(
                self.config,
                pool=self.pool,
                index=self.index,
                metrics=self.metrics,
                calls=self.calls,
                session=self._session,
                background=background,
                legs_type=self.legs_type,
                responses=self.responses,
                tracer=self._tracer,
                on_finished=self._on_finished,
            )
            self._adapters = Adapters(
                self.config,
                pool=self.pool,
                session=self._session,
                poll=self._poll_once,
                on_dropped=self._dispatcher.forget_module,
                group=pollers,
            )
            self._roster = Roster(
                self.config, pool=self.pool, poll=self._poll, on_forgotten=self._forget, group=pollers
            )
            self._streams = EventStreams(self.pool.blocks, group=pollers)
            self._roster.start()
            try:
                yield
            finally:
                self._dispatcher.stop()
                self.board.stop()
                self._roster.stop()
                self._adapters.stop()
                self._streams.stop()
        self._streams.close()
        await asyncio.to_thread(self._tracer.close)

    async def _poll(self, worker: Worker) -> None:
        await self._poll_once(worker)
        self.adapters.restore(worker)
        if self._streams is not None and worker.url in self.pool:
            self._streams.update(worker)

    async def _poll_once(self, worker: Worker) -> None:
        await self.pool.poll(worker, self.session)

    def _forget(self, worker: Worker) -> None:
        """What else is known of a member that is gone."""
        self.dispatcher.forget_sessions({worker.url})
        self.adapters.forget(worker)
        if self._streams is not None:
            self._streams.forget(worker)

    # -- generation

    async def generate(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        await self.dispatcher.serve(
            endpoint,
            headers=headers,
            receive=receive,
            send=send,
            path_module=scope.get("path_params", {}).get("model"),
            caller=scope.get(CALLER_SCOPE),
        )

    async def kept_response(self, request: Request) -> Response:
        kept = self.responses.find(request.path_params["id"], caller=request.scope.get(CALLER_SCOPE))
        if kept is None:
            raise HTTPException(404, f"The response {request.path_params['id']!r} is not known here (any more).")
        return Response(kept.response, media_type="application/json")

    async def forget_response(self, request: Request) -> Response:
        name = request.path_params["id"]
        if not self.responses.remove(name, caller=request.scope.get(CALLER_SCOPE)):
            raise HTTPException(404, f"The response {name!r} is not known here (any more).")
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    # -- what the router knows

    async def models(self, request: Request) -> Response:
        """The decode modules (under /m/<model>/: that one). The base is not among them: it answers nobody."""
        module = self._path_module(request)
        names = self.pool.modules if module is None else [module]
        return JSONResponse({"object": "list", "data": [self._model_card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._model_card(self._named_module(request.path_params["name"])))

    def _model_card(self, name: str) -> dict[str, Any]:
        infos = [worker.info for worker in self.pool.decode[name] if worker.info is not None]
        return {
            "id": name,
            "object": "model",
            "created": self.started_at,
            "owned_by": "sglang-prefillshare",
            "root": name,
            "parent": None,
            "max_model_len": min((info.context_length for info in infos), default=None),
        }

    async def live(self, request: Request) -> Response:
        """200 as long as the event loop runs."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 as soon as one decode module can be served; one that cannot takes no other out with it."""
        served = [] if self.dispatcher.is_stopping else self.pool.served_modules()
        missing = ["the router is stopping"] if self.dispatcher.is_stopping else self.pool.missing()
        body = {"status": "ok" if served else "unavailable", "modules": served, "missing": missing}
        return JSONResponse(body, status_code=200 if served else 503)

    async def health(self, request: Request) -> Response:
        """200 when every decode module (under /m/<model>/: that one) and the base can be reached through us."""
        module = self._path_module(request)
        missing = self.pool.missing(None if module is None else [module])
        body = {
            "status": "unavailable" if missing else "ok",
            "missing": missing,
            "base_fingerprint": self.pool.reference,
            "bases": self._bases(),
            "prefill_ready": sum(worker.is_ready for worker in self.pool.prefill),
            "decode_ready": {
                name: sum(worker.is_ready_for(name) for worker in self.pool.decode[name]) for name in self.pool.modules
            },
            "not_ready": [
                {"url": worker.url, "status": worker.status, "reason": worker.reason}
                for worker in self.pool
                if not worker.is_ready
            ],
        }
        return JSONResponse(body, status_code=503 if missing else 200)

    async def workers(self, request: Request) -> Response:
        return JSONResponse(
            {
                "base_fingerprint": self.pool.reference,
                "bases": self._bases(),
                "sources": self.roster.to_json(),
                "withdrawn_modules": sorted(self.pool.withdrawn),
                "workers": [
                    {
                        **worker.to_json(),
                        "sources": self.roster.sources_of(worker.url),
                        "prefix_blocks": self.index.block_count(worker.url),
                        "events": self._events(worker),
                    }
                    for worker in self.pool
                ],
            }
        )

    def _events(self, worker: Worker) -> dict[str, Any] | None:
        """Of one that publishes what its tree holds: how many blocks these are, and why they do not count."""
        known = self.pool.blocks.known(worker.url)
        if known is None:
            return None
        return {"is_current": known.is_current, "blocks": len(known.held), "problem": known.problem}

    def _bases(self) -> list[dict[str, Any]]:
        """Each base with its ready prefill workers and the modules that are bound to it; the one seen first first."""
        return [
            {
                "base_fingerprint": base,
                "prefill_ready": sum(worker.is_ready and worker.base == base for worker in self.pool.prefill),
                "modules": [name for name in self.pool.modules if self.pool.base_of(name) == base],
            }
            for base in self.pool.bases.known
        ]

    async def recent_calls(self, request: Request) -> Response:
        text = request.query_params.get("limit")
        limit = None if text is None else whole_number(text)
        if text is not None and limit is None:
            raise HTTPException(400, f"limit is {text[:40]!r}, wanted a number of at most nine digits.")
        records = self.calls.find(rid=request.query_params.get("rid"), limit=limit)
        return JSONResponse({"calls": [record.to_json() for record in records]})

    async def expose_metrics(self, request: Request) -> Response:
        """Our own, and the workers' handoff metrics in sum."""
        families = await self._handoff_families()
        self.metrics.forget_workers()
        for worker in self.pool:
            labels = (worker.role or "", worker.model or "", worker.url)
            self.metrics.worker_metrics_missing.labels(*labels).set(worker not in families)
            self.metrics.worker_ready.labels(*labels).set(worker.is_ready)
            self.metrics.worker_breaker_open.labels(*labels).set(worker.breaker.is_avoided)
            self.metrics.worker_inflight.labels(*labels).set(len(worker.legs))
            if worker.role is Role.PREFILL:
                self.metrics.worker_inflight_tokens.labels(worker.url).set(worker.inflight_tokens)
                is_followed = self.pool.blocks.current(worker.url) is not None
                self.metrics.worker_events_followed.labels(worker.url).set(is_followed)
        of_workers = sum_families((worker.served_model or "", found) for worker, found in families.items())
        body, content_type = self.metrics.exposition(of_workers)
        return Response(body, headers={"content-type": content_type})

    async def _handoff_families(self) -> dict[Worker, list[Metric]]:
        """Of the workers that show any, in the pool's order."""
        workers = [worker for worker in self.pool if worker.is_reachable]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.pool.metrics_page(worker, self.session)) for worker in workers]
        found: dict[Worker, list[Metric]] = {}
        for worker, page in zip(workers, (task.result() for task in tasks), strict=True):
            try:
                families = parse_handoff_families(page or "")
            except ValueError as error:
                logger.debug("the metrics of the %s cannot be read: %s", worker.label, error)
                continue
            if families:
                found[worker] = families
        return found

    # -- what only the workers know

    async def model_info(self, request: Request) -> Response:
        """A module's worker under /m/<model>/, or if there is one module; else the base, whose tokenizer all share."""
        module = self._path_module(request)
        if module is None and len(self.pool.modules) == 1:
            module = self.pool.modules[0]
        candidates = self.pool.prefill if module is None else self.pool.decode[module]
        return await self._ask_first_ready(candidates, "/model_info", request)

    async def server_info(self, request: Request) -> Response:
        """Under /m/<model>/ that module's worker; else {"prefill": [...], "decode": [...]} of all that answer."""
        module = self._path_module(request)
        if module is not None:
            return await self._ask_first_ready(self.pool.decode[module], "/server_info", request)
        workers = [worker for worker in self.pool if worker.is_reachable]
        answers = await self._ask_all(workers, "GET", "/server_info", request)
        body: dict[str, list[Any]] = {"prefill": [], "decode": []}
        for worker, (status, info) in zip(workers, answers, strict=True):
            entry: dict[str, Any] = {"url": worker.url, "status": status}
            if worker.role in body:
                body[worker.role].append({**entry, **info} if isinstance(info, dict) else {**entry, "error": info})
        return JSONResponse({"router": {"version": __version__, "models": self.pool.modules}, **body})

    async def flush_cache(self, request: Request) -> Response:
        """Flush the base's cache and every module's (under /m/<model>/ that one's); forget prefixes and sessions."""
        module = self._path_module(request)
        concerned = [
            *self.pool.prefill,
            *(w for w in self.pool if w.role is Role.DECODE and module in (None, *w.modules)),
        ]
        workers = [worker for worker in concerned if worker.is_reachable]
        answers = await self._ask_all(workers, "POST", "/flush_cache", request)
        for worker in concerned:
            self.index.drop(worker.url)
        for worker, (status, _) in zip(workers, answers, strict=True):
            if status == HTTPStatus.OK:
                self.pool.blocks.flushed(worker.url)
        self.dispatcher.forget_sessions({worker.url for worker in concerned})
        failed = [
            {"url": worker.url, "status": status, "message": answer}
            for worker, (status, answer) in zip(workers, answers, strict=True)
            if status != 200
        ]
        if failed or not workers:
            status = failed[0]["status"] if failed else 503
            return JSONResponse({"flushed": len(workers) - len(failed), "failed": failed}, status_code=status)
        return JSONResponse({"flushed": len(workers), "failed": []})

    async def count_tokens(self, request: Request) -> Response:
        """How long a prompt of `/v1/messages` is, by a worker of the module; checked as one that is to be served."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            raw = await read_body(
                request.receive, headers.get("content-length", ""), max_bytes=self.config.max_body_bytes
            )
            parsed = parse_request(
                Endpoint.MESSAGES,
                raw,
                headers=headers,
                modules=self.pool.modules,
                path_module=request.path_params.get("model"),
                limits_of=self.pool.limits,
            )
        except RequestError as error:
            raise HTTPException(error.status, error.message) from error
        except ClientGoneError:
            return Response(status_code=499)
        body = _json.dumps({**parsed.body, "model": parsed.module})
        return await self._ask_first_ready(self.pool.decode[parsed.module], COUNT_TOKENS_PATH, request, body=body)

    async def _ask_first_ready(
        self, workers: Iterable[Worker], path: str, request: Request, *, body: bytes | None = None
    ) -> Response:
        """`body` is posted; without one the workers are only asked."""
        workers = list(workers)
        for worker in workers:
            if worker.is_ready:
                method = "GET" if body is None else "POST"
                status, content_type, answer = await self._ask(worker, method, path, request, body=body)
                return Response(answer, status_code=status, headers={"content-type": content_type})
        names = ", ".join(f"{worker.url} is {worker.status}" for worker in workers) or "there is none"
        raise HTTPException(503, f"No worker can answer {path}: {names}.")

    async def _ask_all(self, workers: list[Worker], method: str, path: str, request: Request) -> list[tuple[int, Any]]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask(worker, method, path, request)) for worker in workers]
        return [(status, _parsed(body)) for status, _, body in (task.result() for task in tasks)]

    async def _ask(
        self, worker: Worker, method: str, path: str, request: Request, *, body: bytes | None = None
    ) -> tuple[int, str, bytes]:
        """One worker's answer; a worker that does not answer gives 502 and the reason. The client's own credentials
        are used: the router's would let anyone administer the workers. Not so where clients have keys of the router's:
        no worker knows those."""
        headers = {}
        authorization = request.headers.get("authorization")
        if self.keys is not None:
            key = self.config.worker_api_key
            authorization = None if key is None else f"Bearer {key}"
        if authorization is not None:
            headers["authorization"] = authorization
        if body is not None:
            headers["content-type"] = "application/json"
        try:
            async with self.session.request(
                method,
                worker.url + path,
                params=dict(request.query_params),
                headers=headers,
                data=body,
                timeout=aiohttp.ClientTimeout(
                    total=self.config.admin_timeout_s, sock_connect=self.config.connect_timeout_s
                ),
            ) as response:
                answer = await response.read()
                return response.status, response.headers.get("content-type", "application/json"), answer
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            message = f"The {worker.label} did not answer {path}: {str(error) or type(error).__name__}."
            return 502, "application/json", _json.dumps(error_for_path(path, 502, message, kind="worker_error"))

    # -- names in paths

    def _path_module(self, request: Request) -> str | None:
        name = request.path_params.get("model")
        return None if name is None else self._named_module(name)

    def _named_module(self, name: str) -> str:
        if name not in self.pool.modules:
            known = ", ".join(self.pool.modules) or "none yet"
            raise HTTPException(404, f"The model {name!r} is not served here. The decode modules are: {known}.")
        return name


class _Generation:
    """One generation endpoint as an ASGI app, so that nothing stands between the client and decode's bytes."""

    def __init__(self, router: Router, endpoint: Endpoint) -> None:
        self._router = router
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._router.generate(self._endpoint, scope, receive, send)


class _Fork:
    """An ASGI app that has a request generated at once, by path, and leaves all others to `rest`."""

    def __init__(self, generating: Mapping[str, ASGIApp], rest: ASGIApp) -> None:
        self._generating = generating
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._rest
        if scope["type"] == "http" and scope["method"] == "POST":
            app = self._generating.get(scope["path"], app)
        await app(scope, receive, send)


class _App(Starlette):
    """Starlette's, with a shorter way to the endpoints that generate: its routing and its two layers for errors do
    nothing for them, and see each piece of an answer. What stands in front of all endpoints does so here, too."""

    def build_middleware_stack(self) -> ASGIApp:
        generating: dict[str, ASGIApp] = {}
        for route in self.routes:
            if isinstance(route, Route) and isinstance(route.app, _Generation) and not route.param_convertors:
                app: ASGIApp = route.app
                for cls, args, kwargs in reversed(self.user_middleware):
                    app = cls(app, *args, **kwargs)
                generating[route.path] = app
        return _Fork(generating, super().build_middleware_stack())


def create_app(config: RouterConfig, *, router: Router | None = None) -> Starlette:
    """The router for `config`, as an ASGI app; its `state.router` is the `Router`."""
    router = router or Router(config)
    admin = Admin(router)
    # Where clients have keys of the router's, the workers' own cannot tell who may empty their caches.
    flush_cache = router.flush_cache if router.keys is None else admin.guarded(router.flush_cache)

    def routes(prefix: str) -> list[Route]:
        return [
            Route(f"{prefix}{Endpoint.CHAT}", _Generation(router, Endpoint.CHAT), methods=["POST"]),
            Route(f"{prefix}{Endpoint.COMPLETIONS}", _Generation(router, Endpoint.COMPLETIONS), methods=["POST"]),
            Route(f"{prefix}{Endpoint.GENERATE}", _Generation(router, Endpoint.GENERATE), methods=["POST", "PUT"]),
            Route(f"{prefix}{Endpoint.MESSAGES}", _Generation(router, Endpoint.MESSAGES), methods=["POST"]),
            Route(f"{prefix}{COUNT_TOKENS_PATH}", router.count_tokens, methods=["POST"]),
            Route(f"{prefix}{Endpoint.RESPONSES}", _Generation(router, Endpoint.RESPONSES), methods=["POST"]),
            Route(f"{prefix}{Endpoint.RESPONSES}/{{id}}", router.kept_response, methods=["GET"]),
            Route(f"{prefix}{Endpoint.RESPONSES}/{{id}}", router.forget_response, methods=["DELETE"]),
            Route(f"{prefix}/v1/models", router.models),
            Route(f"{prefix}/health", router.health),
            Route(f"{prefix}/model_info", router.model_info),
            Route(f"{prefix}/get_model_info", router.model_info),
            Route(f"{prefix}/server_info", router.server_info),
            Route(f"{prefix}/get_server_info", router.server_info),
            Route(f"{prefix}/flush_cache", flush_cache, methods=["GET", "POST"]),
        ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with router.running():
            yield

    app = _App(
        routes=[
            *routes(""),
            Route("/v1/models/{name:path}", router.model),
            Route("/workers", router.workers),
            Route("/calls", router.recent_calls),
            Route("/metrics", router.expose_metrics),
            *router.board.routes(),
            Route("/livez", router.live),
            Route("/readyz", router.ready),
            *admin.routes(),
            *routes("/m/{model:path}"),
        ],
        middleware=_in_front(router),
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.state.router = router
    return app


_KINDS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    502: "worker_error",
    503: "worker_error",
}


def _in_front(router: Router) -> list[Middleware]:
    """What stands before the endpoints, if it is asked for: it sees the head of an answer, and passes its bytes on."""
    found = []
    if router.config.cors_origins:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=router.config.cors_origins,
                allow_methods=("GET", "POST", "PUT", "DELETE"),
                allow_headers=("*",),
                expose_headers=(REQUEST_ID_HEADER, SESSION_HEADER, "retry-after"),
            )
        )
    if router.keys is not None:  # behind the other: a browser asks whether it may ask without a key
        found.append(Middleware(KeyGate, keys=router.keys))
    return found


def _tracer_for(endpoint: str | None) -> Tracer:
    if endpoint is None:
        return Tracer()
    from sglang_prefillshare.routing.otel import otlp_tracer

    return otlp_tracer(endpoint)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and request.method == "OPTIONS" and error.headers is not None:
        return Response(status_code=204, headers={"allow": f"{error.headers['Allow']}, OPTIONS"})
    kind = _KINDS.get(error.status_code, "invalid_request_error")
    message = error.detail
    path = request.url.path
    if error.status_code == 404 and message == "Not Found":
        message = f"The router has no {path}."
    elif error.status_code == 405 and error.headers is not None:
        message = f"{request.method} does not go with {path}. It takes {error.headers['Allow']}."
    return JSONResponse(
        error_for_path(path, error.status_code, message, kind=kind),
        status_code=error.status_code,
        headers=error.headers,
    )


def _parsed(body: bytes) -> Any:
    try:
        return _json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip()
