"""A decode worker with adapters: several modules on one runtime and one cache of base KV, each equal to the oracle."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.config import AdapterModule, Topology, WorkerSettings
from sglang_prefillshare.deployment import Deployment
from sglang_prefillshare.protocol import TREE_PATH
from test.e2e.conftest import Models
from test.support.device import WORKER_ARGS
from test.support.models import sample_prompt
from test.support.oracle import Oracle, clear_prompt
from test.support.servers import deploy, greedy, handoff_counts, post, session, until_idle

NEW_TOKENS = 12
LENGTHS = (1, 2, 3, 17, 65, 300, 900)


@pytest.fixture(scope="module")
def deployment(models: Models, adapters: dict[str, Path]) -> Iterator[Deployment]:
    """The base, one decode worker with three adapters, and the router; requests are retracted now and then."""
    modules = tuple(AdapterModule(name, str(folder)) for name, folder in adapters.items())
    args = {**WORKER_ARGS, "chunked-prefill-size": 64}
    base = WorkerSettings(str(models.base), args=args, env={"SGLANG_TEST_RETRACT": "1"})
    with deploy(Topology(base, (), adapters=modules)) as running:
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
