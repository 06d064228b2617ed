"""A small real worker with scripted behaviour, and the real router in front of it, both on loopback ports."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from sglang_prefillshare.protocol import (
    BLOCKS_HEADER,
    BOUNDARY_RULE,
    CACHED_TOKENS_HEADER,
    CROSS_MODEL_HEADER,
    PROMPT_TOKENS_HEADER,
    TREE_PATH,
    WORKER_INFO_PATH,
    Role,
    WorkerInfo,
)
from sglang_prefillshare.routing.app import Router, create_app
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.server import RouterServer

STREAM = (
    b'data: {"choices": [{"delta":  {"content": "\xc3\xa9"}}]}\n\n',
    b"data: {odd but ours}\n\n",
    b"data: [DONE]\n\n",
)
TRANSFER_FAILED = (
    b'{"error":{"message":"Decode transfer failed for request rank=0 with exception KVTransferError(bootstrap_room=5): '
    b'Lost connection with prefill instance","code":500}}'
)
"""As SGLang's decode worker words it."""


def described_tree(nodes: Sequence[Mapping[str, Any]] = (), **changes: Any) -> dict[str, Any]:
    """What a worker says of its radix tree; of each of `nodes` only what is said of it differs from a plain one."""
    plain = {"parent": None, "computed_for": 0, "read_by": [], "leased": False, "locked": False, "idle_s": 1.0}
    held = sum(node["tokens"] for node in nodes)
    return {
        "version": 1,
        "modules": ["planner", "coder"],
        "nodes": [{**plain, **node} for node in nodes],
        "other": {"nodes": 0, "tokens": 0, "computed_for": []},
        "pool_tokens": 65536,
        "free_tokens": 65536 - held,
        "tree_tokens": held,
        "evictable_tokens": held,
        "unseen_tokens": 0,
        "page_size": 16,
        "cost_ms": 0.5,
        "failure": None,
    } | changes


WHOLE = b'{ "id":"x",  "choices":[{"message":{"content":"\xc3\xa9"}}] }'


def info(role: Role, model: str, **changes: Any) -> WorkerInfo:
    values: dict[str, Any] = {
        "role": role,
        "model": model,
        "base_fingerprint": "base-1",
        "boundary": BOUNDARY_RULE,
        "trained": True,
        "transfer_backend": "fake",
        "page_size": 16,
        "kv_dtype": "bfloat16",
        "max_total_tokens": 65536,
        "max_running_requests": 32,
        "context_length": 8192,
        "bootstrap_port": 8998 if role is Role.PREFILL else None,
        "version": "0",
    }
    return WorkerInfo(**(values | changes))


@dataclass
class Seen:
    path: str
    headers: dict[str, str]
    raw: bytes
    body: dict[str, Any]


@dataclass
class FakeWorker:
    """`behave` scripts the generation endpoints: ok, bad, broken, hang, hang_after_first, die, die_mid_stream,
    die_mid_body, broken_then_silent (to polls), transfer_failed, "full:<status>", "slow:<seconds>", "tokens:<count>"
    (so many events, and the rest once `goes_on` is set), or
    "said:<status>" and "said_late:<status>" with what the test has put into `said`; `script` goes first, one word a
    call. What it saw is in `seen`, `aborted` and `dropped`; `active` calls are being answered.
    `metrics` is the page it shows, `tree` the tree that it describes; `None` is 404."""

    info: WorkerInfo
    behave: str = "ok"
    script: list[str] = field(default_factory=list)
    info_behave: str = "ok"
    metrics: str | None = None
    metrics_behave: str = "ok"
    tree: Any = None
    tree_behave: str = "ok"
    tree_asked: list[str] = field(default_factory=list)
    metrics_headers: list[dict[str, str]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    said: bytes = b""
    finish_reason: Any = field(default_factory=lambda: {"type": "length", "length": 1})
    adapters_refused: str | None = None
    adapters_behave: str = "ok"
    adapter_calls: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0
    counts: tuple[int, int, int] = (40, 32, 16)
    told: str | None = None
    active: int = 0
    most_active: int = 0
    flushed: list[str] = field(default_factory=list)
    poll_headers: list[dict[str, str]] = field(default_factory=list)
    port: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get(WORKER_INFO_PATH, self._info)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get(TREE_PATH, self._tree)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/flush_cache", self._flush)
        app.router.add_post("/load_lora_adapter", self._load_adapter)
        app.router.add_post("/unload_lora_adapter", self._unload_adapter)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_post("/v1/messages/count_tokens", self._count_tokens)
        for path in ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"):
            app.router.add_post(path, self._generate)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05, access_log=None)
        await self._runner.setup()
        # The socket that found a free port is the one that is served: another process could take it in between.
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        await web.SockSite(self._runner, listener).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _info(self, request: web.Request) -> web.StreamResponse:
        self.poll_headers.append(dict(request.headers))
        match self.info_behave:
            case "hang":
                await asyncio.sleep(60)
            case "404":
                raise web.HTTPNotFound
            case "503":
                raise web.HTTPServiceUnavailable
            case "garbage":
                return web.Response(text="hello")
        return web.json_response(self.info.to_json())

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        self.metrics_headers.append(dict(request.headers))
        if self.metrics_behave == "hang":
            await asyncio.sleep(60)
        if self.metrics is None:
            raise web.HTTPNotFound
        status = 500 if self.metrics_behave == "broken" else 200
        return web.Response(status=status, text=self.metrics, content_type="text/plain")

    async def _tree(self, request: web.Request) -> web.StreamResponse:
        self.tree_asked.append(request.query_string)
        match self.tree_behave:
            case "hang":
                await asyncio.sleep(60)
            case "huge":
                return web.Response(body=b" " * 2**23, content_type="application/json")
            case "broken":
                return web.json_response({"error": {"message": "No picture."}}, status=503)
        if self.tree is None:
            raise web.HTTPNotFound
        if isinstance(self.tree, bytes):
            return web.Response(body=self.tree, content_type="application/json")
        return web.json_response(self.tree)

    async def _abort(self, request: web.Request) -> web.StreamResponse:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def _flush(self, request: web.Request) -> web.StreamResponse:
        self.flushed.append(request.query_string)
        return web.Response(text="Cache flushed.", status=400 if self.behave == "bad" else 200)

    async def _load_adapter(self, request: web.Request) -> web.StreamResponse:
        """As SGLang answers, with our checks; `adapters_refused` is what the worker says instead of taking it."""
        body = {**(await request.json()), "key": request.headers.get("authorization")}
        self.adapter_calls.append({"load": body})
        if self.adapters_behave == "hang":
            await asyncio.sleep(60)
        names = self.info.modules or []
        reason = self.adapters_refused
        if body["lora_name"] in names:
            reason = f"LoRA with name {body['lora_name']} already loaded."
        if reason is not None:
            return web.json_response({"success": False, "error_message": reason}, status=400)
        self.info = dataclasses.replace(self.info, modules=[*names, body["lora_name"]])
        return web.json_response({"success": True, "error_message": None})

    async def _unload_adapter(self, request: web.Request) -> web.StreamResponse:
        name = (await request.json())["lora_name"]
        self.adapter_calls.append({"unload": name})
        names = self.info.modules or []
        if name not in names:
            return web.json_response({"success": False, "error_message": f"there is no module {name!r}"}, status=400)
        self.info = dataclasses.replace(self.info, modules=[known for known in names if known != name])
        return web.json_response({"success": True, "error_message": None})

    async def _model_info(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"model_path": f"/models/{self.info.model}", "tokenizer_path": "/models/base"})

    async def _count_tokens(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return web.json_response({"input_tokens": len(str(body["messages"])), "model": body["model"]})

    async def _server_info(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"served_model_name": self.info.model, "internal_states": [{}]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw)
        self.seen.append(Seen(request.path, {k.lower(): v for k, v in request.headers.items()}, raw, body))
        self.arrived.set()
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        finally:
            self.active -= 1

    async def _echo(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Answers of /generate as SGLang has them, with the rids it was given; streams in pieces of seven bytes."""
        rids = body["rid"] if isinstance(body["rid"], list) else [body["rid"]]
        items = [{"text": "x", "meta_info": {"id": rid, "finish_reason": self.finish_reason}} for rid in rids]
        if not body.get("stream"):
            return web.json_response(items if isinstance(body["rid"], list) else items[0])
        begun = [{"text": "", "meta_info": {"id": rid, "finish_reason": None}} for rid in rids]
        events = b"".join(b"data: " + json.dumps(item).encode() + b"\n\n" for item in [*begun, *items])
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for start in range(0, len(events), 7):
            await response.write(events[start : start + 7])
            await asyncio.sleep(0)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _respond(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Answers of /v1/responses as SGLang has them, cut to the parts that matter."""
        output = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi"}]}]
        answer = {"id": body["request_id"], "object": "response", "output": output, "error": None}
        if not body.get("stream"):
            return web.json_response(answer)
        begun = {"type": "response.created", "response": {**answer, "output": []}}
        events = [("response.created", begun), ("response.completed", {"response": answer})]
        text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
        return web.Response(text=text, content_type="text/event-stream")

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        kind, _, argument = (self.script.pop(0) if self.script else self.behave).partition(":")
        transport = request.transport
        assert transport is not None
        match kind:
            case "bad":
                return web.Response(
                    status=400, body=b'{"object":"error","message":"no"}', content_type="application/json"
                )
            case "broken":
                return web.Response(status=500, text="ouch")
            case "full":
                return web.Response(status=int(argument), text="full")
            case "broken_then_silent":
                self.info_behave = "503"
                return web.Response(status=500, text="ouch")
            case "transfer_failed" if not body.get("stream"):
                return web.Response(status=500, body=TRANSFER_FAILED, content_type="application/json")
            case "transfer_failed":
                events = b"data: " + TRANSFER_FAILED + b"\n\ndata: [DONE]\n\n"
                return web.Response(body=events, content_type="text/event-stream")
            case "said":  # whatever the test says, as a stream's events if one is asked for
                kind_of = "text/event-stream" if body.get("stream") else "application/json"
                return web.Response(status=int(argument or 200), body=self.said, content_type=kind_of)
            case "said_late":
                await asyncio.sleep(0.2)
                return web.Response(status=int(argument), body=self.said, content_type="application/json")
            case "respond":
                return await self._respond(request, body)
            case "echo":
                return await self._echo(request, body)
            case "hang":
                await asyncio.sleep(60)
            case "die":
                transport.abort()
                await asyncio.sleep(60)
            case "slow":
                await asyncio.sleep(float(argument))
            case "die_mid_body":
                response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "100"})
                await response.prepare(request)
                await response.write(b'{"half":')
                await asyncio.sleep(0.05)
                transport.abort()
                return response
        if self.info.role is Role.PREFILL:
            names = (PROMPT_TOKENS_HEADER, CACHED_TOKENS_HEADER, CROSS_MODEL_HEADER)
            headers = {name: str(count) for name, count in zip(names, self.counts, strict=True)}
            if self.told is not None:
                headers[BLOCKS_HEADER] = self.told
            return web.Response(body=b'{"ignored": true}', headers=headers)
        if not body.get("stream"):
            return web.Response(body=WHOLE, headers={"content-type": "application/json", "x-worker": "yes"})
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", "x-worker": "yes"})
        await response.prepare(request)
        if kind == "tokens":
            await response.write(STREAM[1] * int(argument))
            await self.goes_on.wait()
        for part in STREAM:
            await response.write(part)
            await asyncio.sleep(0.01)
            if kind == "die_mid_stream":
                await response.write(b'data: {"cut')
                await asyncio.sleep(0.05)
                transport.abort()
                break
            if kind == "hang_after_first":
                await asyncio.sleep(60)
        return response


@dataclass
class System:
    """A running router with its fake workers; `http` talks to the router."""

    url: str
    router: Router
    http: aiohttp.ClientSession
    prefill: list[FakeWorker]
    decode: dict[str, list[FakeWorker]]
    server: RouterServer
    server_task: asyncio.Task[None]

    @property
    def workers(self) -> list[FakeWorker]:
        return [*self.prefill, *(worker for workers in self.decode.values() for worker in workers)]

    async def chat(self, model: str = "planner", *, headers: dict[str, str] | None = None, **body: Any) -> Answer:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}]} | body
        return await self.post("/v1/chat/completions", body, headers=headers)

    async def post(self, path: str, body: Any, *, headers: dict[str, str] | None = None) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body)
        async with self.http.post(self.url + path, data=data, headers=headers) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str) -> Answer:
        async with self.http.get(self.url + path) as response:
            return Answer(response.status, response.headers, await response.read())

    async def admin(self, method: str, path: str, body: Any = None, *, key: str | None = "k") -> Answer:
        """Ask as an administrator; `key` is the one shown."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body)
        async with self.http.request(method, self.url + path, data=data, headers=headers) as response:
            return Answer(response.status, response.headers, await response.read())

    async def ready(self) -> None:
        """Every module can be served, and nobody is left who was not heard of once and may join in later."""
        pool = self.router.pool
        await until(
            lambda: not pool.missing() and all(worker.observation(withdrawn=pool.withdrawn).is_asked for worker in pool)
        )

    async def last_call(self) -> dict[str, Any]:
        calls = (await self.get("/calls")).json()["calls"]
        assert calls, "no call was recorded"
        return calls[-1]

    async def metric(self, sample: str) -> float:
        """The value of one sample, such as `retries_total{role="prefill"}`; 0 if it does not exist."""
        for line in (await self.get("/metrics")).body.decode().splitlines():
            if line.startswith(f"prefillshare_router_{sample} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def assert_idle(self) -> None:
        """Nothing is held: no leg counted anywhere, no tokens in flight."""
        for worker in self.router.pool:
            assert not worker.legs, worker.url
            assert worker.inflight_tokens == 0, worker.url
            assert worker.holdings.tokens == 0, worker.url
        assert not self.router.dispatcher.gate


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]  # case-insensitive
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        message = self.json()["error"]["message"]
        assert isinstance(message, str)
        return message


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for is plain state, without an event
            await asyncio.sleep(0.005)


class QuickServer(RouterServer):
    """Notices `should_exit` sooner, for the sake of many short tests."""

    longest_s: float = 30.0

    async def main_loop(self) -> None:
        await until(lambda: self.should_exit, timeout_s=self.longest_s)


@contextlib.asynccontextmanager
async def running_system(
    *,
    prefill: int = 1,
    decode: dict[str, int] | None = None,
    wait: bool = True,
    longest_s: float = 30.0,
    configured: bool = True,
    router: Callable[[RouterConfig], Router] = Router,
    prepare: Callable[[list[FakeWorker], dict[str, list[FakeWorker]]], Awaitable[None] | None] | None = None,
    **config: Any,
) -> AsyncIterator[System]:
    prefill_workers = [FakeWorker(info(Role.PREFILL, "base")) for _ in range(prefill)]
    decode_workers = {
        name: [FakeWorker(info(Role.DECODE, name)) for _ in range(count)]
        for name, count in (decode or {"planner": 1, "coder": 1}).items()
    }
    workers = [*prefill_workers, *(worker for group in decode_workers.values() for worker in group)]
    for worker in workers:
        await worker.start()
    if prepare is not None:
        prepare(prefill_workers, decode_workers)
    settings: dict[str, Any] = {
        "poll_interval_s": 0.03,
        "poll_timeout_s": 1.0,
        "connect_timeout_s": 0.5,
        "request_timeout_s": 10.0,
        "loss_wait_s": 0.2,
        "abort_timeout_s": 0.5,
        "stop_grace_s": 0.0,
    }
    if configured:
        settings["prefill"] = [worker.url for worker in prefill_workers]
        settings["decode"] = {name: [worker.url for worker in group] for name, group in decode_workers.items()}
    router_config = RouterConfig(**(settings | config))
    try:
        async with _routing(
            router_config, prefill_workers, decode_workers, longest_s=longest_s, router=router
        ) as system:
            if wait:
                await system.ready()
            yield system
    finally:
        for worker in workers:
            await worker.stop()


@contextlib.asynccontextmanager
async def another_router(system: System) -> AsyncIterator[System]:
    """A router that knows nothing yet, before the same workers."""
    async with _routing(system.router.config, system.prefill, system.decode) as other:
        await other.ready()
        yield other


@contextlib.asynccontextmanager
async def _routing(
    config: RouterConfig,
    prefill: list[FakeWorker],
    decode: dict[str, list[FakeWorker]],
    *,
    longest_s: float = 30.0,
    router: Callable[[RouterConfig], Router] = Router,
) -> AsyncIterator[System]:
    app = create_app(config, router=router(config))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = QuickServer(app, config)
    server.longest_s = longest_s
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as http:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield System(url, app.state.router, http, prefill, decode, server, task)
    finally:
        server.should_exit = True
        await task


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run one scenario on the loop that the router uses in production, with a limit so that a hang is a failure."""

    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(limited())
