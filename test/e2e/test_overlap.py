"""Under SGLang's overlap loop, which knows each token a step later, every token still counts once and xn never.

The planner runs that loop, the coder the other one; on a GPU, or with PREFILLSHARE_CPU_OVERLAP=1, both run it. All else
that a request can ask for, and retraction, is in `test_incremental.py`, where both loops serve one module.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from sglang_prefillshare.deployment import Deployment
from test.e2e.conftest import Models
from test.support.device import ALL_OVERLAPPED
from test.support.models import sample_prompt
from test.support.oracle import Adjust, Generation, Oracle
from test.support.servers import post, session

pytestmark = pytest.mark.devices
NEW_TOKENS = 16
LAG = {"planner": 1, "coder": 1 if ALL_OVERLAPPED else 0}
"""By how many tokens penalties are behind: none, or the one that is being computed while its successor is prepared."""

CASES: dict[str, dict[str, Any]] = {
    "frequency": {"frequency_penalty": -1.5},
    "presence": {"presence_penalty": -1.5},
    "repetition": {"repetition_penalty": 0.6},
    "min_new_tokens": {"min_new_tokens": 2, "stop_token_ids": list(range(4, 200))},
}
"""Penalties below zero (repetition: one) reward: these models' answers repeat little of their own accord."""


@pytest.fixture(scope="module")
def oracles(models: Models) -> dict[str, Oracle]:
    return {"planner": Oracle(models.base, models.planner), "coder": Oracle(models.base, models.coder)}


def penalties(params: dict[str, Any], *, lag: int, told_first: list[int] | None = None) -> Adjust:
    """What these parameters make of logits when the last `lag` tokens are not counted, and `told_first` are."""

    def adjust(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        told = [*(told_first or []), *answer[: max(0, len(answer) - lag)]]
        counts = torch.bincount(torch.tensor(told, dtype=torch.int64), minlength=len(logits))
        logits = logits - params.get("frequency_penalty", 0.0) * counts
        logits = logits - params.get("presence_penalty", 0.0) * (counts > 0)
        divisor = torch.where(counts > 0, params.get("repetition_penalty", 1.0), 1.0)
        logits = torch.where(logits < 0, logits * divisor, logits / divisor)
        if len(answer) < params.get("min_new_tokens", 0):
            logits[params["stop_token_ids"]] = float("-inf")
        return logits

    return adjust


def telling_prompt(oracle: Oracle, params: dict[str, Any], *, lag: int, seed: int) -> list[int]:
    """A prompt whose answer has no near tie, and is another where a token counts at another time, or xn counts."""
    stops, minimum = params.get("stop_token_ids", ()), params.get("min_new_tokens")

    def answer(prompt: list[int], adjust: Adjust) -> Generation:
        return oracle.generate(prompt, NEW_TOKENS, stop_token_ids=stops, adjust=adjust)

    for attempt in range(200):
        prompt = sample_prompt(30 + seed, seed=7000 + 1000 * seed + attempt)
        if minimum is None:
            wrong = [penalties(params, lag=1 - lag), penalties(params, lag=lag, told_first=prompt[-1:])]
        else:
            wrong = [penalties({**params, "min_new_tokens": minimum + off}, lag=lag) for off in (-1, 1)]
        right = answer(prompt, penalties(params, lag=lag))
        if right.smallest_gap >= 3e-3 and all(answer(prompt, adjust).token_ids != right.token_ids for adjust in wrong):
            return prompt
    raise AssertionError(f"200 prompts, and none tells whether {params} count rightly")


def test_the_planner_runs_the_overlap_loop(deployment: Deployment) -> None:
    async def runs_it(name: str) -> bool:
        async with session() as client, client.get(f"{deployment.worker(name).url}/server_info") as response:
            return not (await response.json())["disable_overlap_schedule"]

    assert {name: asyncio.run(runs_it(name)) for name in LAG} == {name: lag == 1 for name, lag in LAG.items()}


def test_each_token_counts_once_and_the_last_of_the_prompt_never(
    deployment: Deployment, oracles: dict[str, Oracle]
) -> None:
    jobs = [
        (name, params, telling_prompt(oracles[name], params, lag=LAG[name], seed=seed))
        for name in oracles
        for seed, params in enumerate(CASES.values())
    ]

    async def run() -> list[list[int]]:
        async with session() as client:

            async def ask(index: int, model: str, params: dict[str, Any], prompt: list[int]) -> list[int]:
                await asyncio.sleep(0.05 * index)  # so that requests join a batch that is running
                sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, **params}
                body = {"input_ids": prompt, "sampling_params": sampling, "model": model}
                return (await post(client, f"{deployment.router_url}/generate", body)).token_ids

            return await asyncio.gather(*(ask(i, *job) for i, job in enumerate(jobs)))

    for (name, params, prompt), found in zip(jobs, asyncio.run(run()), strict=True):
        adjust = penalties(params, lag=LAG[name])
        oracles[name].check(prompt, found, NEW_TOKENS, stop_token_ids=params.get("stop_token_ids", ()), adjust=adjust)
