"""A handoff moves what decode does not hold yet, and decode holds the base's KV only: nothing that a module wrote."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from sglang_prefillshare.deployment import Deployment
from test.e2e.conftest import Models
from test.e2e.test_equal_to_plain_server import CASES, comparable
from test.support.device import ALL_OVERLAPPED
from test.support.models import make_base, make_decode_module, sample_prompt
from test.support.oracle import Oracle, clear_prompt
from test.support.servers import (
    Answer,
    HandoffCounts,
    deploy,
    greedy,
    handoff_counts,
    metric_samples,
    post,
    session,
    topology,
    until_idle,
)

pytestmark = pytest.mark.devices
NEW_TOKENS = 12
AGENTS = ("planner", "coder")


@pytest.fixture(scope="module")
def oracles(models: Models) -> dict[str, Oracle]:
    return {"planner": Oracle(models.base, models.planner), "coder": Oracle(models.base, models.coder)}


async def ask(client: aiohttp.ClientSession, deployment: Deployment, model: str, prompt: list[int]) -> list[int]:
    body = greedy(prompt, NEW_TOKENS, model=model)
    return (await post(client, f"{deployment.router_url}/generate", body)).token_ids


async def counted(
    client: aiohttp.ClientSession, deployment: Deployment, model: str, prompt: list[int]
) -> tuple[list[int], HandoffCounts]:
    """An answer, and what its handoff added to the counts of its decode worker."""
    before = await handoff_counts(client, deployment.worker(model))
    ids = await ask(client, deployment, model, prompt)
    return ids, (await handoff_counts(client, deployment.worker(model))).since(before)


def test_later_turns_move_only_what_the_decode_worker_does_not_hold(deployment: Deployment, models: Models) -> None:
    """Two agents take turns over one context: each moves the whole context once, then what was appended since."""

    async def run() -> None:
        context = sample_prompt(600, seed=4001)
        held = dict.fromkeys(AGENTS, 0)
        async with session() as client:
            per_token = 0
            for turn in range(6):
                agent = AGENTS[turn % 2]
                ids, counts = await counted(client, deployment, agent, context)
                needed = len(context) - 1
                assert counts.by_outcome == {"ok": 1}
                assert (counts.held_tokens, counts.moved_tokens) == (held[agent], needed - held[agent])
                per_token = per_token or counts.moved_bytes // counts.moved_tokens
                assert counts.moved_bytes <= 1.02 * (needed - held[agent]) * per_token
                held[agent] = needed
                context = [*context, *ids, *sample_prompt(20, seed=4100 + turn)]
            _, again = await counted(client, deployment, agent, context[: held[agent] + 1])
            assert (again.moved_tokens, again.moved_bytes) == (0, 0)

    asyncio.run(run())


def test_what_a_module_generated_is_not_taken_for_the_bases_kv(
    deployment: Deployment, oracles: dict[str, Oracle]
) -> None:
    """The next prompt contains the answer: decode has its own KV of those tokens, and must fetch the base's."""

    async def run() -> None:
        for seed in range(5):
            prompt, observation = _with_follow_up(oracles["coder"], seed)
            async with session() as client:
                answer = await ask(client, deployment, "coder", prompt)
                follow_up = [*prompt, *answer, *observation]
                ids, counts = await counted(client, deployment, "coder", follow_up)
            oracles["coder"].check(prompt, answer, NEW_TOKENS)
            oracles["coder"].check(follow_up, ids, NEW_TOKENS)
            assert counts.held_tokens == len(prompt) - 1, "decode held KV that the base did not compute"
            assert counts.moved_tokens == len(follow_up) - len(prompt)

    asyncio.run(run())


def _with_follow_up(oracle: Oracle, seed: int) -> tuple[list[int], list[int]]:
    """A prompt and an observation; neither its answer nor that to prompt, answer and observation has a near tie."""
    observation = sample_prompt(9, seed=seed)
    for attempt in range(20):
        prompt = clear_prompt(oracle, 80 + seed, NEW_TOKENS, seed=5000 + 100 * seed + attempt)
        answer = oracle.generate(prompt, NEW_TOKENS).token_ids
        follow_up = [*prompt, *answer, *observation]
        if not oracle.is_exact or oracle.generate(follow_up, NEW_TOKENS).smallest_gap >= 3e-3:
            return prompt, observation
    raise AssertionError("no prompt whose follow-up has a clear answer")


def test_the_router_shows_the_handoffs_of_all_workers_in_sum(deployment: Deployment) -> None:
    async def run() -> None:
        async with session() as client:
            await ask(client, deployment, "planner", sample_prompt(90, seed=4500))
            await ask(client, deployment, "coder", sample_prompt(90, seed=4501))
            await until_idle(client, deployment.workers)
            of_workers = [
                await handoff_counts(client, worker) for worker in deployment.workers if worker.name != "base"
            ]
            samples = await metric_samples(client, deployment.router_url)
        shown = {
            name: sum(
                s.value for s in samples if s.name == name and {**labels, "side": "decode"}.items() <= s.labels.items()
            )
            for name, labels in (
                ("prefillshare_handoffs_total", {"outcome": "ok"}),
                ("prefillshare_handoff_bytes_total", {"source": "moved", "outcome": "ok"}),
            )
        }
        assert shown["prefillshare_handoffs_total"] == sum(
            counts.by_outcome["ok"] for counts in of_workers if counts.by_outcome
        )
        assert shown["prefillshare_handoff_bytes_total"] == sum(counts.moved_bytes for counts in of_workers)
        assert {s.labels["model"] for s in samples if s.name == "prefillshare_pages_leased"} >= {"planner", "coder"}
        missing = [s.value for s in samples if s.name == "prefillshare_router_worker_metrics_missing"]
        assert missing and not any(missing)

    asyncio.run(run())


@pytest.fixture(scope="module")
def small_pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, Oracle]]:
    """Pages of 16 tokens; decode workers with room for 1,792 tokens that retract a request now and then.

    Planner and coder are one module. The planner's worker runs SGLang's overlap loop, on a CPU too: there a retraction
    loses the token that is being computed.
    """
    folder = tmp_path_factory.mktemp("small")
    base = make_base(folder / "base", seed=21)
    module = make_decode_module(folder / "module", base, seed=22)
    described = topology(
        base,
        dict.fromkeys(AGENTS, module),
        args={"page-size": 16},
        overlapped=("planner",),
        max_total_tokens=1792,
        num_reserved_decode_tokens=32,
    )
    with deploy(dataclasses.replace(described, env={"SGLANG_TEST_RETRACT": "1"})) as running:
        yield running, Oracle(base, module)


@pytest.mark.parametrize("agent", AGENTS)
def test_under_pressure_decode_evicts_and_every_answer_stays_right(
    small_pools: tuple[Deployment, Oracle], agent: str
) -> None:
    """Twelve prompts of 400 tokens and their follow-ups, four at a time, in a pool that holds four of them."""
    deployment, oracle = small_pools
    prompts = [clear_prompt(oracle, 400 + 7 * i, NEW_TOKENS, seed=6000 + i) for i in range(12)]

    async def run() -> Any:
        gate = asyncio.Semaphore(4)
        async with session() as client:

            async def one(prompt: list[int]) -> list[int]:
                async with gate:
                    return await ask(client, deployment, agent, prompt)

            rounds = [await asyncio.gather(*map(one, prompts)) for _ in range(2)]
            await until_idle(client, deployment.workers)
            return rounds, await handoff_counts(client, deployment.worker(agent))

    rounds, counts = asyncio.run(run())
    for answers in rounds:
        for prompt, ids in zip(prompts, answers, strict=True):
            oracle.check(prompt, ids, NEW_TOKENS)
    needed = 2 * sum(len(prompt) - 1 for prompt in prompts)
    assert counts.held_tokens + counts.moved_tokens == needed
    assert counts.moved_tokens > needed * 0.6, "the pool cannot have held all prompts"
    assert counts.pages_leased == 0


def test_a_request_that_the_pool_can_never_hold_is_refused_at_once(
    small_pools: tuple[Deployment, Oracle],
) -> None:
    """SGLang would let it wait for room that an empty pool does not have."""
    deployment, _ = small_pools

    async def run() -> None:
        async with session() as client:
            body = greedy(sample_prompt(1770, seed=7), 8, model="coder")
            started = time.monotonic()
            refused = await post(client, f"{deployment.router_url}/generate", body)
            assert refused.status == 400 and "needs room for 1808 tokens of KV" in str(refused.body), refused
            assert time.monotonic() - started < 5.0
            await until_idle(client, deployment.workers)

    asyncio.run(run())


@pytest.mark.parametrize("agent", AGENTS)
def test_the_longest_request_that_the_pool_holds_is_answered(
    small_pools: tuple[Deployment, Oracle], agent: str
) -> None:
    """SGLang leaves a page and a token of the 1,792 free; the overlap loop computes one token too many."""
    deployment, oracle = small_pools
    new_tokens = 1792 - 1728 - 17
    prompt = clear_prompt(oracle, 1728, new_tokens, seed=7)

    async def run() -> list[int]:
        async with session() as client:
            body = greedy(prompt, new_tokens, model=agent)
            answer = await post(client, f"{deployment.router_url}/generate", body)
            await until_idle(client, deployment.workers)
            return answer.token_ids

    oracle.check(prompt, asyncio.run(run()), new_tokens)


@pytest.mark.parametrize("agent", AGENTS)
def test_retracted_requests_leave_the_cache_clean(small_pools: tuple[Deployment, Oracle], agent: str) -> None:
    """A request that is retracted and resumed brings generated KV back into the pool, and must not publish it."""
    deployment, oracle = small_pools

    async def run() -> None:
        async with session() as client:
            for seed in range(10, 14):
                prompt, observation = _with_follow_up(oracle, seed)
                answer = await ask(client, deployment, agent, prompt)
                follow_up = [*prompt, *answer, *observation]
                ids, counts = await counted(client, deployment, agent, follow_up)
                oracle.check(prompt, answer, NEW_TOKENS)
                oracle.check(follow_up, ids, NEW_TOKENS)
                assert counts.held_tokens == (len(prompt) - 1) // 16 * 16

    asyncio.run(run())


@pytest.mark.parametrize("agent", AGENTS)
def test_a_retracted_requests_tokens_count_on(small_pools: tuple[Deployment, Oracle], agent: str) -> None:
    """Four at once, of which one is retracted in every third step, with what SGLang would forget of them by then.

    Under overlap a penalty is behind by a token, but for the step after a resumption: which step that is, timing says.
    """
    deployment, oracle = small_pools
    stops = list(range(4, 260))
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40, "min_new_tokens": 24, "stop_token_ids": stops}
    if agent == "coder" and not ALL_OVERLAPPED:
        sampling |= {"frequency_penalty": -0.3, "presence_penalty": -0.7}

    def adjust(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        counts = torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=len(logits))
        logits = logits - sampling.get("frequency_penalty", 0.0) * counts
        logits = logits - sampling.get("presence_penalty", 0.0) * (counts > 0)
        if len(answer) < sampling["min_new_tokens"]:
            logits[stops] = float("-inf")
        return logits

    prompts = []
    for seed in range(8000, 8400):
        prompt = sample_prompt(50, seed=seed)
        if oracle.generate(prompt, 40, stop_token_ids=stops, adjust=adjust).smallest_gap >= 3e-3:
            prompts.append(prompt)
        if len(prompts) == 4:
            break

    async def run() -> list[list[int]]:
        async with session() as client:
            bodies = [{"input_ids": prompt, "sampling_params": sampling, "model": agent} for prompt in prompts]
            answers = await asyncio.gather(
                *(post(client, f"{deployment.router_url}/generate", body) for body in bodies)
            )
            assert any(answer.body["meta_info"].get("num_retractions") for answer in answers), answers[0].body
            await until_idle(client, deployment.workers)
            return [answer.token_ids for answer in answers]

    for prompt, found in zip(prompts, asyncio.run(run()), strict=True):
        oracle.check(prompt, found, 40, stop_token_ids=stops, adjust=adjust)


@pytest.mark.skipif(ALL_OVERLAPPED, reason="waits for a CPU, where one of the two workers runs the other loop")
@pytest.mark.parametrize("name", [name for name in CASES if "penalt" not in name])
def test_both_loops_answer_alike(small_pools: tuple[Deployment, Oracle], name: str) -> None:
    """Grammars, stops, log-probabilities, streams: all but penalties, which `test_overlap.py` has."""
    path, body = CASES[name]

    async def run() -> list[Answer]:
        async with session() as client:
            url = small_pools[0].router_url + path
            return list(await asyncio.gather(*(post(client, url, {**body, "model": agent}) for agent in AGENTS)))

    overlapped, other = asyncio.run(run())
    assert (overlapped.status, other.status) == (200, 200), (overlapped, other)
    assert but_for_retractions(comparable(overlapped.body)) == but_for_retractions(comparable(other.body))


def but_for_retractions(value: Any) -> Any:
    """How often a request was retracted in a pool this small is timing."""
    if isinstance(value, dict):
        return {key: but_for_retractions(inner) for key, inner in value.items() if key != "num_retractions"}
    return [but_for_retractions(inner) for inner in value] if isinstance(value, list) else value


def test_a_decode_worker_without_a_cache_moves_everything(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", seed=31)
    coder = make_decode_module(tmp_path / "coder", base, seed=32)
    oracle = Oracle(base, coder)
    prompt = clear_prompt(oracle, 120, NEW_TOKENS, seed=33)

    async def run(deployment: Deployment) -> None:
        async with session() as client:
            for _ in range(2):
                ids, counts = await counted(client, deployment, "coder", prompt)
                oracle.check(prompt, ids, NEW_TOKENS)
                assert (counts.held_tokens, counts.moved_tokens) == (0, 119)

    with deploy(topology(base, {"coder": coder}, disable_radix_cache=True)) as running:
        asyncio.run(run(running))
