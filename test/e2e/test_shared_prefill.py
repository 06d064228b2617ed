"""One prefill for several decode modules: what is computed, what is reused, and for whom it was computed first."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from sglang_prefillshare.deployment import Deployment
from sglang_prefillshare.protocol import CACHED_TOKENS_HEADER, CROSS_MODEL_HEADER, PROMPT_TOKENS_HEADER
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
