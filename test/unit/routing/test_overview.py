"""What `prefillshare workers` shows of a router."""

import asyncio
import dataclasses
import io
import json
from contextlib import redirect_stdout

import pytest
from rich.console import Console

from sglang_prefillshare import cli
from sglang_prefillshare.routing.membership import FileSource
from sglang_prefillshare.routing.overview import show
from test.unit.routing.routing_harness import run, running_system, until


def shown(told) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(told, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def called(*argv: str) -> tuple[int, str]:
    out = io.StringIO()
    with redirect_stdout(out):
        return cli.run(["workers", *argv]), out.getvalue()


def test_members_are_shown_with_who_is_refused_and_why(tmp_path):
    path = tmp_path / "w.yaml"

    def prepare(prefill, decode):
        decode["coder"][0].info = dataclasses.replace(decode["coder"][0].info, transfer_backend="nixl")
        path.write_text("workers: []")

    async def scenario():
        async with running_system(wait=False, prepare=prepare, sources=[FileSource(str(path))]) as system:
            pool, coder = system.router.pool, system.decode["coder"][0]
            await until(lambda: pool[coder.url].status == "refused" and pool.served_modules() == ["planner"])
            await until(lambda: "names no worker" in str(system.router.roster.to_json()))
            status, table = await asyncio.to_thread(called, "--router", system.url)
            assert status == 0
            for part in (coder.url, "refused", "its transfer backend", "prefill", "planner", "base-1", "static"):
                assert part in table.replace("\n", " "), part
            assert "names no worker" in " ".join(table.split())
            status, told = await asyncio.to_thread(called, "--router", system.url + "/", "--json")
            assert status == 0 and [w["url"] for w in json.loads(told)["workers"]] == [w.url for w in system.workers]

    run(scenario())


def test_a_router_without_workers_is_shown():
    assert shown({"workers": []}).strip() == "no workers"


def test_what_a_worker_says_does_not_steer_the_terminal():
    worker = {"url": "http://a\x1b[2J", "reason": "\x1b]0;title\x07 bad\nline", "modules": ["\x1b[31m"], "role": None}
    text = shown({"workers": [worker]})
    assert "\x1b" not in text and "\x07" not in text and "bad" in text


@pytest.mark.parametrize(("url", "status"), [("http://127.0.0.1:9", 1), ("127.0.0.1:9", 2)])
def test_no_router_is_an_error_with_the_next_step(url, status, capsys):
    assert cli.run(["workers", "--router", url]) == status
    assert "--router" in capsys.readouterr().err


def test_another_server_is_no_router(capsys):
    async def scenario():
        async with running_system() as system:
            for url in (system.prefill[0].url, f"{system.url}/m/planner"):
                assert await asyncio.to_thread(cli.run, ["workers", "--router", url]) == 1
                assert "answered 404" in capsys.readouterr().err

    run(scenario())
