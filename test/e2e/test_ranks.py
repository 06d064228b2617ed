"""Workers of several tensor-parallel ranks hand KV over, rank by rank or in slices of heads; equal to the oracle."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.config import DecodeModule, RouterSettings, Topology, WorkerSettings
from sglang_prefillshare.deployment import Deployment
from test.e2e.conftest import Models
from test.support.device import WORKER_ARGS
from test.support.oracle import Oracle, clear_prompt
from test.support.servers import deploy, greedy, post, session, until_idle

NEW_TOKENS = 12
LENGTHS = (2, 3, 17, 130, 700)


def ranked(base: Path, ranks: int, modules: Mapping[str, tuple[Path, int]], **args: Any) -> Topology:
    """A base with so many ranks, and modules each with its own; prompts come in chunks of 64 tokens."""

    def worker(path: Path, tp_size: int) -> WorkerSettings:
        return WorkerSettings(str(path), args={**WORKER_ARGS, "tp-size": tp_size, "chunked-prefill-size": 64, **args})

    decode = tuple(DecodeModule(name, worker(path, ranks)) for name, (path, ranks) in modules.items())
    return Topology(base=worker(base, ranks), decode=decode, router=RouterSettings())


@pytest.fixture(scope="module")
def oracles(models: Models) -> dict[str, Oracle]:
    return {"planner": Oracle(models.base, models.planner), "coder": Oracle(models.base, models.coder)}


@pytest.fixture(scope="module", params=["2:1 and 2:2", "1:2"])
def described(request: pytest.FixtureRequest, models: Models) -> Topology:
    if request.param == "1:2":
        return ranked(models.base, 1, {"planner": (models.planner, 2)}, **{"page-size": 16})
    return ranked(models.base, 2, {"planner": (models.planner, 1), "coder": (models.coder, 2)})


@pytest.fixture(scope="module")
def deployment(described: Topology) -> Iterator[Deployment]:
    with deploy(described) as running:
        yield running


def test_answers_equal_the_oracle_whatever_the_ranks(
    deployment: Deployment, described: Topology, oracles: dict[str, Oracle]
) -> None:
    prompts = [(module.name, length) for length in LENGTHS for module in described.decode]
    jobs = [(name, clear_prompt(oracles[name], length, NEW_TOKENS, seed=length)) for name, length in prompts]

    async def run() -> list[list[int]]:
        async with session() as client:

            async def ask(model: str, prompt: list[int]) -> list[int]:
                body = greedy(prompt, NEW_TOKENS, model=model)
                return (await post(client, f"{deployment.router_url}/generate", body)).token_ids

            answers = await asyncio.gather(*(ask(model, prompt) for model, prompt in jobs))
            answers += [await ask(*jobs[-1])]  # from the caches
            await until_idle(client, deployment.workers)
            return answers

    found = asyncio.run(run())
    for (model, prompt), answer in zip([*jobs, jobs[-1]], found, strict=True):
        oracles[model].check(prompt, answer, NEW_TOKENS)
