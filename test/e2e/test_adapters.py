"""A decode worker with adapters: several modules on one runtime and one cache of base KV, each equal to the oracle."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sglang_prefillshare.config import AdapterModule, RouterSettings, Topology, WorkerSettings
from sglang_prefillshare.deployment import Deployment
from sglang_prefillshare.ports import PortBlocks
from sglang_prefillshare.protocol import TREE_PATH
from test.e2e.conftest import Models
from test.support.device import WORKER_ARGS
from test.support.models import make_adapter, sample_prompt
from test.support.oracle import Oracle, clear_prompt
from test.support.servers import Answer, deploy, greedy, handoff_counts, post, session, until_idle

NEW_TOKENS = 12
ADMIN_KEY = "sesame"
LENGTHS = (1, 2, 3, 17, 65, 300, 900)


@pytest.fixture(scope="module")
def deployment(models: Models, adapters: dict[str, Path]) -> Iterator[Deployment]:
    """The base, one decode worker with three adapters, and the router; requests are retracted now and then."""
    modules = tuple(AdapterModule(name, str(folder)) for name, folder in adapters.items())
    args = {**WORKER_ARGS, "chunked-prefill-size": 64}
    base = WorkerSettings(str(models.base), args=args, env={"SGLANG_TEST_RETRACT": "1"})
    router = RouterSettings(args={"admin-api-key": ADMIN_KEY})
    with deploy(Topology(base, (), adapters=modules, router=router)) as running:
        yield running


def ask_all(deployment: Deployment, jobs: list[tuple[str, list[int]]]) -> list[list[int]]:
    """Eight at a time, through the router."""

    async def run() -> list[list[int]]:
        gate = asyncio.Semaphore(8)
        async with session() as client:

            async def ask(module: str, prompt: list[int]) -> list[int]:
                async with gate:
                    body = greedy(prompt, NEW_TOKENS, model=module)
                    return (await post(client, f"{deployment.router_url}/generate", body)).token_ids

            answers = await asyncio.gather(*(ask(module, prompt) for module, prompt in jobs))
            await until_idle(client, deployment.workers)
            return answers

    return asyncio.run(run())


def test_answers_equal_the_oracle_in_batches_of_three_modules(
    deployment: Deployment, adapter_oracles: dict[str, Oracle]
) -> None:
    jobs = [
        (name, clear_prompt(adapter_oracles[name], n, NEW_TOKENS, seed=n)) for n in LENGTHS for name in adapter_oracles
    ]
    for (module, prompt), answer in zip(jobs, ask_all(deployment, jobs), strict=True):
        adapter_oracles[module].check(prompt, answer, NEW_TOKENS)


def test_what_one_module_fetched_the_next_finds_and_what_it_generated_nobody(
    deployment: Deployment, adapter_oracles: dict[str, Oracle]
) -> None:
    """One prompt for three modules, and then a prompt that goes on as the first one's answer did."""

    worker = deployment.worker("adapters")

    async def counted() -> int:
        async with session() as client:
            return (await handoff_counts(client, worker)).moved_tokens

    def moved_tokens(module: str, prompt: list[int]) -> tuple[int, list[int]]:
        before = asyncio.run(counted())
        [answer] = ask_all(deployment, [(module, prompt)])
        return asyncio.run(counted()) - before, answer

    async def readers(tokens: int) -> tuple[str, set[str]]:
        async with session() as client, client.get(f"{worker.url}{TREE_PATH}") as response:
            tree = await response.json()
        [node] = [node for node in tree["nodes"] if node["tokens"] == tokens]
        return tree["modules"][node["computed_for"]], {tree["modules"][index] for index in node["read_by"]}

    prompt = clear_prompt(adapter_oracles["planner"], 161, NEW_TOKENS, seed=11)
    found = [moved_tokens(module, prompt) for module in adapter_oracles]
    assert [moved for moved, _ in found] == [160, 0, 0]
    assert len({tuple(answer) for _, answer in found}) == 3
    assert asyncio.run(readers(160)) == ("planner", {"coder", "reviewer"}), "as the worker describes its tree"
    longer = [*prompt, *found[0][1], *sample_prompt(5, seed=12)]
    moved, answer = moved_tokens("planner", longer)
    assert moved == len(longer) - 1 - 160
    adapter_oracles["planner"].check(longer, answer, NEW_TOKENS)


def test_modules_are_asked_for_by_name_and_come_and_go(
    deployment: Deployment,
    models: Models,
    adapters: dict[str, Path],
    adapter_oracles: dict[str, Oracle],
    tmp_path: Path,
) -> None:
    worker = deployment.worker("adapters")

    async def run() -> list[Any]:
        async with session() as client:
            chat = {"model": "coder", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
            seen = [await post(client, f"{deployment.router_url}/v1/chat/completions", chat)]
            seen.append(await post(client, f"{deployment.router_url}/generate", greedy([5, 6, 7], 2, model="tester")))
            async with client.get(f"{worker.url}/v1/models") as response:
                seen.append([card["id"] for card in (await response.json())["data"]])
            other = shutil.copytree(adapters["coder"], tmp_path / "tester")
            body = {"lora_name": "tester", "lora_path": str(other)}
            seen.append(await post(client, f"{worker.url}/load_lora_adapter", body))
            (other / "prefillshare.json").unlink()
            unmarked = {"lora_name": "unmarked", "lora_path": str(other)}
            seen.append(await post(client, f"{worker.url}/load_lora_adapter", unmarked))
            seen.append(await post(client, f"{worker.url}/unload_lora_adapter", {"lora_name": "tester"}))
            return seen

    chat, unknown, names, loaded, unmarked, unloaded = asyncio.run(run())
    assert chat.status == 200 and chat.body["model"] == "coder"
    assert unknown.status == 404 and "planner" in str(unknown.body)
    assert names == ["coder", "planner", "reviewer"]
    assert loaded.status == 200 and unloaded.status == 200
    assert unmarked.status == 400 and "prefillshare.json" in str(unmarked.body)
    prompt = clear_prompt(adapter_oracles["coder"], 40, NEW_TOKENS, seed=13)
    [answer] = ask_all(deployment, [("coder", prompt)])
    adapter_oracles["coder"].check(prompt, answer, NEW_TOKENS)


async def ask_router(client: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> Answer:
    """As an administrator."""
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with client.request(method, url, json=body, headers=headers) as response:
        return Answer(response.status, response.headers, await response.json())


async def model_names(client: aiohttp.ClientSession, url: str) -> list[str]:
    return [card["id"] for card in (await ask_router(client, "GET", f"{url}/v1/models")).body["data"]]


def test_modules_come_and_go_through_the_router_while_others_are_served(
    deployment: Deployment, models: Models, tmp_path: Path
) -> None:
    """One of this base, one of another, one without a manifest. What runs when a module goes ends as it began."""
    tester = make_adapter(tmp_path / "tester", models.base, seed=61, rank=8)
    strange = make_adapter(tmp_path / "strange", models.planner, seed=62)
    oracle = Oracle(models.base, models.base, adapter=tester)
    prompt = clear_prompt(oracle, 120, NEW_TOKENS, seed=64)
    url = deployment.router_url

    async def run() -> dict[str, Any]:
        async with session() as client:

            async def load(name: str, folder: Path) -> Answer:
                return await ask_router(client, "POST", f"{url}/modules", {"name": name, "path": str(folder)})

            async def generate(module: str, count: int = NEW_TOKENS) -> Answer:
                return await post(client, f"{url}/generate", greedy(prompt, count, model=module))

            async def under_way() -> AsyncIterator[bytes]:
                body = greedy(prompt, 60, model="tester", stream=True)
                async with client.post(f"{url}/generate", json=body) as response:
                    async for line in response.content:
                        yield line

            found: dict[str, Any] = {"before": await generate("coder")}
            found |= {"strange": await load("strange", strange), "loaded": await load("tester", tester)}
            found |= {"twice": await load("tester", tester), "names": await model_names(client, url)}
            found["answer"] = await generate("tester")
            stream = under_way()
            lines = [await anext(stream)]
            deleting = asyncio.create_task(ask_router(client, "DELETE", f"{url}/modules/tester"))
            lines += [line async for line in stream]
            found |= {"deleted": await deleting, "stream": [line for line in lines if line.startswith(b"data: ")]}
            found |= {"gone": await generate("tester"), "names after": await model_names(client, url)}
            found["after"] = await generate("coder")
            await until_idle(client, deployment.workers)
            return found

    found = asyncio.run(run())
    assert found["strange"].status == 400 and "the base's weights changed" in json.dumps(found["strange"].body)
    assert found["loaded"].status == 200, found["loaded"]
    assert found["twice"].status == 409
    assert sorted(found["names"]) == ["coder", "planner", "reviewer", "tester"]
    oracle.check(prompt, found["answer"].token_ids, NEW_TOKENS)
    assert found["deleted"].status == 200, found["deleted"]
    assert found["stream"][-1].strip() == b"data: [DONE]"
    assert json.loads(found["stream"][-2].removeprefix(b"data: "))["meta_info"]["completion_tokens"] == 60
    assert found["gone"].status == 404 and "reviewer" in json.dumps(found["gone"].body)
    assert sorted(found["names after"]) == ["coder", "planner", "reviewer"]
    assert found["after"].token_ids == found["before"].token_ids


@asynccontextmanager
async def second_router(workers: Path) -> AsyncIterator[str]:
    """A router that is told nothing but addresses, in a file."""
    ports = PortBlocks()
    port = ports.take()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sglang_prefillshare.cli", "route", "--workers", f"file:{workers}"),
        *("--port", str(port), "--poll-interval", "0.2", "--log-level", "warning"),
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()
        ports.release()


def test_a_router_that_knows_addresses_alone_finds_the_modules_and_loses_them_again(
    deployment: Deployment, adapter_oracles: dict[str, Oracle], tmp_path: Path
) -> None:
    workers = tmp_path / "workers.yaml"
    prompt = clear_prompt(adapter_oracles["reviewer"], 80, NEW_TOKENS, seed=65)

    def write(urls: Sequence[str]) -> None:
        (tmp_path / "new").write_text(json.dumps({"workers": urls}))
        os.replace(tmp_path / "new", workers)

    async def until_names(client: aiohttp.ClientSession, url: str, wanted: list[str]) -> None:
        deadline = time.monotonic() + 30.0
        while True:
            try:
                ready = await ask_router(client, "GET", f"{url}/readyz")
                if sorted(ready.body["modules"]) == wanted:
                    return
            except aiohttp.ClientError:
                pass
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)

    async def run() -> list[Any]:
        urls = [worker.url for worker in deployment.workers]
        write(urls[:1])
        async with second_router(workers) as url, session() as client:
            await until_names(client, url, [])
            write(urls)
            await until_names(client, url, ["coder", "planner", "reviewer"])
            body = greedy(prompt, NEW_TOKENS, model="reviewer")
            seen: list[Any] = [await post(client, f"{url}/generate", body)]
            write(urls[:1])
            await until_names(client, url, [])
            return [*seen, await post(client, f"{url}/generate", body), await model_names(client, url)]

    answer, gone, names = asyncio.run(run())
    adapter_oracles["reviewer"].check(prompt, answer.token_ids, NEW_TOKENS)
    assert gone.status == 404 and names == []


def test_every_api_asks_the_module_that_it_names(deployment: Deployment, adapters: dict[str, Path]) -> None:
    messages = [{"role": "user", "content": "Which adapter are you, and who wants to know?"}]

    async def said(module: str) -> list[str]:
        async with session() as client:

            async def asked(path: str, body: dict[str, Any]) -> Any:
                answer = await post(client, deployment.router_url + path, {"model": module, "temperature": 0, **body})
                assert answer.status == 200, answer
                return answer.body

            chat = await asked("/v1/chat/completions", {"messages": messages, "max_tokens": NEW_TOKENS, "n": 2})
            told = await asked("/v1/messages", {"messages": messages, "max_tokens": NEW_TOKENS})
            responded = await asked("/v1/responses", {"input": messages, "max_output_tokens": NEW_TOKENS + 2})
            return [
                *(choice["message"]["content"] for choice in chat["choices"]),
                told["content"][0]["text"],
                responded["output"][0]["content"][0]["text"],
            ]

    texts = {module: asyncio.run(said(module)) for module in adapters}
    assert all(len(found) == 4 and len(set(found)) == 1 for found in texts.values()), texts
    assert len({found[0] for found in texts.values()}) == len(adapters)
