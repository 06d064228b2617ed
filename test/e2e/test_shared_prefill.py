"""One prefill for several decode modules: what is computed, what is reused, and for whom it was computed first."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import aiohttp
import pytest

from sglang_prefillshare.deployment import Deployment, Worker
from sglang_prefillshare.protocol import CACHED_TOKENS_HEADER, CROSS_MODEL_HEADER, PROMPT_TOKENS_HEADER, TREE_PATH
from test.support.models import sample_prompt
from test.support.servers import greedy, pairing, post, session, until_idle

pytestmark = pytest.mark.devices


def test_a_session_prefills_its_context_once(deployment: Deployment) -> None:
    """Three agents, four turns, a context that grows past 1,500 tokens by each answer and each observation."""
    agents = ("planner", "coder", "twin")

    async def run() -> tuple[list[int], list[dict[str, Any]]]:
        context = sample_prompt(900, seed=77)
        async with session() as client:
            for turn in range(4):
                for place, agent in enumerate(agents):
                    body = greedy(context, 24, model=agent)
                    answer = await post(client, f"{deployment.router_url}/generate", body)
                    observation = sample_prompt(30, seed=1000 + 10 * turn + place)
                    context = [*context, *answer.token_ids, *observation]
            async with client.get(f"{deployment.router_url}/calls") as response:
                return context, (await response.json())["calls"][-12:]

    context, calls = asyncio.run(run())
    final_context = calls[-1]["prefill_tokens"] + 1
    assert final_context > 1400 and len(context) > 1500
    computed = sum(call["prefill_tokens"] - call["cached_tokens"] for call in calls)
    assert computed <= 1.02 * final_context
    # Every call after the first finds the whole earlier context, and all of what it finds was computed for other agents
    # except the two spans that this agent had prefilled itself.
    for earlier, call in itertools.pairwise(calls):
        assert call["cached_tokens"] >= earlier["prefill_tokens"] - 1


def test_cross_model_tokens_are_those_first_computed_for_another_module(deployment: Deployment) -> None:
    """Planner computes 100 tokens, coder 50 more, twin reuses both and adds 50; then planner comes again."""
    prompt = sample_prompt(400, seed=501)
    steps = [("planner", 101), ("coder", 151), ("twin", 201), ("planner", 251), ("planner", 251)]
    # The base holds n-1 tokens, and SGLang always computes at least the last of them:
    #   planner  computes   0..99                    coder computes 100..149          twin computes 150..199
    #   planner  finds 0..199: 100 of its own, 100 of others; computes 200..249
    #   planner  finds 0..248: 100 + 49 of its own, 100 of others; computes 249
    wanted = [(100, 0, 0), (150, 100, 100), (200, 150, 150), (250, 200, 100), (250, 249, 100)]

    async def run() -> list[tuple[int, int, int]]:
        found = []
        prefill = deployment.worker("base")
        async with session() as client:
            for module, length in steps:
                legs = {**greedy(prompt[:length], 2), **pairing(prefill), "routing_key": module}
                both = await asyncio.gather(
                    post(client, f"{prefill.url}/generate", legs),
                    post(client, f"{deployment.worker(module).url}/generate", legs),
                )
                assert [answer.status for answer in both] == [200, 200]
                names = (PROMPT_TOKENS_HEADER, CACHED_TOKENS_HEADER, CROSS_MODEL_HEADER)
                found.append(tuple(int(both[0].headers[name]) for name in names))
            await until_idle(client, deployment.workers)
        return found

    assert asyncio.run(run()) == wanted


def test_the_tree_shows_who_computed_and_who_read_since(deployment: Deployment) -> None:
    """Planner's 100 tokens, coder's 50 on top; and nothing of what they say."""
    prompt = sample_prompt(151, seed=502)

    async def tree(client: aiohttp.ClientSession, worker: Worker, query: str = "") -> dict[str, Any]:
        async with client.get(f"{worker.url}{TREE_PATH}{query}") as response:
            assert response.status == 200, await response.text()
            return dict(await response.json())

    async def run() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
        async with session() as client:
            # Another test's prompt may begin with the same token, which would then be a node by itself.
            await until_idle(client, deployment.workers)
            assert (await post(client, f"{deployment.router_url}/flush_cache", {})).status == 200
            for module, length in (("planner", 101), ("coder", 151)):
                body = greedy(prompt[:length], 2, model=module)
                assert (await post(client, f"{deployment.router_url}/generate", body)).status == 200
            await until_idle(client, deployment.workers)
            await asyncio.sleep(0.6)  # a worker describes its tree no more often
            base, coder = await tree(client, deployment.worker("base")), await tree(client, deployment.worker("coder"))
            few = await tree(client, deployment.worker("base"), "?limit=2")
            async with client.get(f"{deployment.worker('base').url}{TREE_PATH}?limit=all") as response:
                return base, coder, few, response.status

    base, coder, few, refused = asyncio.run(run())
    modules = base["modules"]
    nodes = {node["id"]: node for node in base["nodes"]}
    top, below = max(
        ((nodes[n["parent"]], n) for n in nodes.values() if n["parent"] in nodes and n["tokens"] == 50),
        key=lambda pair: pair[1]["id"],
    )
    assert (top["tokens"], modules[top["computed_for"]]) == (100, "planner")
    assert modules[below["computed_for"]] == "coder" and below["read_by"] == []
    assert [modules[index] for index in top["read_by"]] == ["coder"]
    assert not any(node["leased"] or node["locked"] for node in base["nodes"])
    for tree_of in (base, coder):
        held = sum(node["tokens"] for node in tree_of["nodes"]) + tree_of["other"]["tokens"]
        assert held + tree_of["unseen_tokens"] == tree_of["tree_tokens"] == tree_of["evictable_tokens"]
        assert tree_of["pool_tokens"] == tree_of["free_tokens"] + tree_of["tree_tokens"]
        assert tree_of["unseen_tokens"] < 20 and tree_of["failure"] is None, "health checks, which have no base's KV"
    assert {(n["tokens"], coder["modules"][n["computed_for"]]) for n in coder["nodes"]} >= {(150, "coder")}
    assert few["nodes"] and refused == 400
    assert not {"token_ids", "text", "input_ids"} & {key for node in base["nodes"] for key in node}
