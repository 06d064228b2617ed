"""The router before stock workers: each model's own pair, what both legs are sent, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.app import create_app
from sglang_prefillshare.routing.pairs import PairRouter, PairsConfig, describe_stock
from test.unit.routing.routing_harness import QuickServer, run, until

GENERATED = {"output_ids": [1, 2], "meta_info": {"prompt_tokens": 40, "cached_tokens": 30, "completion_tokens": 2}}
CHAT = {"choices": [], "usage": {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 30}}}


@dataclass
class StockWorker:
    model: str
    mode: str
    seen: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    url: str = ""
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        for path in ("/server_info", "/model_info"):
            app.router.add_get(path, self._describe)
        for path in ("/generate", "/v1/chat/completions"):
            app.router.add_post(path, self._generate)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _describe(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        return web.json_response(server_info(self.model, self.mode))

    async def _generate(self, request: web.Request) -> web.Response:
        self.seen.append({"path": request.path, **(await request.json())})
        return web.json_response(CHAT if request.path.startswith("/v1") else GENERATED)


def server_info(model: str, mode: str) -> dict[str, Any]:
    return {
        "served_model_name": model,
        "disaggregation_mode": mode,
        "disaggregation_transfer_backend": "nixl",
        "disaggregation_bootstrap_port": 9001,
        "page_size": 1,
        "kv_cache_dtype": "auto",
        "max_total_num_tokens": 4096,
        "max_running_requests": 8,
        "context_length": None,
        "version": "0.5.23",
    }


@contextlib.asynccontextmanager
async def pairs(
    *models: str, wrong: str | None = None
) -> AsyncIterator[tuple[str, PairRouter, dict[tuple[str, str], StockWorker]]]:
    workers = {
        (model, mode): StockWorker(wrong if wrong and mode == "prefill" else model, mode)
        for model in models
        for mode in ("prefill", "decode")
    }
    for worker in workers.values():
        await worker.start()
    config = PairsConfig(
        prefill=[workers[model, "prefill"].url for model in models],
        prefill_of={model: [workers[model, "prefill"].url] for model in models},
        decode={model: [workers[model, "decode"].url] for model in models},
        port=0,
        poll_interval_s=0.03,
        stop_grace_s=0.0,
    )
    import socket

    router = PairRouter(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = QuickServer(create_app(config, router=router), config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", router, workers
    finally:
        server.should_exit = True
        await task
        for worker in workers.values():
            await worker.stop()


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_a_model_is_prefilled_by_its_own_worker_with_all_that_was_sent(path: str):
    async def scenario() -> None:
        async with pairs("planner", "coder") as (url, router, workers), aiohttp.ClientSession() as http:
            await until(lambda: not router.pool.missing())
            body: dict[str, Any] = {"model": "coder", "stream": False, "marker": 5}
            body |= {"input_ids": [1] * 40} if path == "/generate" else {"messages": [{"role": "user", "content": "x"}]}
            async with http.post(url + path, data=json.dumps(body)) as response:
                assert response.status == 200
                assert await response.json() == (GENERATED if path == "/generate" else CHAT)
            assert not workers["planner", "prefill"].seen and not workers["planner", "decode"].seen
            (p,), (d,) = workers["coder", "prefill"].seen, workers["coder", "decode"].seen
            for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid"):
                assert p[name] == d[name]
            assert p["bootstrap_port"] == 9001
            for leg in (p, d):
                assert leg["marker"] == 5 and leg["model"] == "coder" and leg["path"] == path
            async with http.get(f"{url}/calls") as response:
                [call] = (await response.json())["calls"]
            assert (call["prefill_tokens"], call["cached_tokens"], call["cross_model_cached_tokens"]) == (40, 30, 0)
            assert call["prefill_worker"] == workers["coder", "prefill"].url

    run(scenario())


def test_a_worker_is_described_once_and_then_only_looked_at():
    async def scenario() -> None:
        async with pairs("coder") as (_, router, workers):
            asked = workers["coder", "decode"].asked
            await until(lambda: len(asked) > 3)
            assert asked[0] == "/server_info" and set(asked[1:]) == {"/model_info"}
            assert not router.pool.missing()

    run(scenario())


def test_a_worker_of_another_model_is_refused():
    async def scenario() -> None:
        async with pairs("coder", wrong="planner") as (url, router, _), aiohttp.ClientSession() as http:
            await until(lambda: any(worker.verdict.status == "refused" for worker in router.pool))
            async with http.post(f"{url}/generate", json={"model": "coder", "input_ids": [1, 2]}) as response:
                assert response.status == 503
                assert "it is prefill of 'planner'" in await response.text()

    run(scenario())


def test_what_sglang_says_is_read():
    info = describe_stock(server_info("coder", "decode"))
    assert (info.role, info.model, info.bootstrap_port, info.max_total_tokens) == ("decode", "coder", None, 4096)
    assert describe_stock(server_info("coder", "prefill")).bootstrap_port == 9001
    with pytest.raises(ValueError, match="null"):
        describe_stock(server_info("coder", "null"))


def test_every_model_needs_both_workers():
    with pytest.raises(ConfigError, match="Each model needs both"):
        PairsConfig(prefill=["http://a:1"], prefill_of={"coder": ["http://a:1"]}, decode={"planner": ["http://b:1"]})
