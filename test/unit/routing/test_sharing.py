"""A prefix that is being computed is waited for where that is shorter than to compute it again."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.routing.config import AdmissionConfig
from sglang_prefillshare.routing.prefix_index import chain_hashes
from sglang_prefillshare.routing.sharing import ComputeRate, common_blocks, wait_for_prefix_s
from test.unit.routing.routing_harness import run, running_system, until


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
def test_common_blocks_are_those_of_the_common_bytes(prefix, one, other):
    chains = [chain_hashes(prefix + tail, block_bytes=4) for tail in (one, other)]
    equal = 0
    while equal < min(map(len, chains)) and chains[0][equal] == chains[1][equal]:
        equal += 1
    assert common_blocks(*chains) == equal


def wait(*, pending=1000, leg=1000, elapsed=0.0, rate=1000.0):
    return wait_for_prefix_s(
        pending_tokens=pending, leg_tokens=leg, elapsed_s=elapsed, tokens_per_s=rate, min_tokens=512
    )


def test_it_waits_as_long_as_computing_takes_at_most():
    assert wait() == 1.0
    assert wait(pending=600, elapsed=0.5) == 0.6


@pytest.mark.parametrize(
    "why",
    [
        {"rate": None},  # nothing is known
        {"pending": 511},  # too little
        {"pending": 600},  # the leg goes on for longer than that
        {"elapsed": 2.1},  # it is held up
        {"rate": 1e6},  # it is computed at once
    ],
)
def test_otherwise_it_does_not(why):
    assert wait(**why) is None


def test_the_rate_is_of_legs_that_computed_much_and_follows_them():
    rate = ComputeRate()
    rate.note(255, 0.001)
    rate.note(1000, 0.0)
    assert rate.tokens_per_s is None
    rate.note(1000, 1.0)
    assert rate.tokens_per_s == 1000
    for _ in range(30):
        rate.note(2000, 1.0)
    assert rate.tokens_per_s == pytest.approx(2000, rel=0.01)


def body(tail, *, model="planner"):
    return {"model": model, "input_ids": [*[7] * 4096, *[tail] * 10], "sampling_params": {"max_new_tokens": 4}}


async def with_known_rate(system, *, behave):
    """A first leg that computed 1,024 tokens in a tenth of a second; later ones take what `behave` says."""
    base = system.prefill[0]
    base.counts, base.script = (1024, 0, 0), ["slow:0.1"]
    for workers in system.decode.values():
        workers[0].behave = "slow:0.1"
    assert (await system.post("/generate", {"model": "planner", "input_ids": [3] * 1024})).status == 200
    await until(lambda: system.router.pool[base.url].rate.tokens_per_s is not None)
    base.seen.clear()
    behave_all(system, behave)


def behave_all(system, behave):
    """A decode worker answers when it has its KV."""
    for worker in system.workers:
        worker.behave = behave


def test_those_that_begin_at_once_wait_for_the_first():
    async def scenario():
        async with running_system() as system:
            await with_known_rate(system, behave="slow:0.2")
            base = system.prefill[0]
            first = asyncio.create_task(system.post("/generate", body(1)))
            await until(lambda: len(base.seen) == 1)
            others = [
                asyncio.create_task(system.post("/generate", body(2 + i, model=model)))
                for i, model in enumerate(("planner", "coder", "coder"))
            ]
            await until(lambda: len(system.router.dispatcher.gate) == 3)
            assert len(base.seen) == 1
            answers = await asyncio.gather(first, *others)
            assert [answer.status for answer in answers] == [200] * 4
            assert base.most_active == 3, "those that waited went together, when the first was done"
            assert int(answers[1].headers["x-prefillshare-queue-ms"]) > 0
            assert await system.metric('prefix_waits_total{model="coder"}') == 2
            system.assert_idle()

    run(scenario())


def test_nobody_waits_longer_than_computing_takes_nor_for_a_leg_that_failed():
    async def scenario():
        async with running_system() as system:
            await with_known_rate(system, behave="hang")
            base = system.prefill[0]
            first = asyncio.create_task(system.post("/generate", body(1)))
            await until(lambda: len(base.seen) == 1)
            behave_all(system, "ok")
            assert (await system.post("/generate", body(2))).status == 200  # after 0.4 s, by the rate
            first.cancel()
            await until(lambda: not system.router.pool[base.url].legs)
            base.script, system.decode["planner"][0].script = ["slow:0.3"], ["slow:0.3"]
            again = asyncio.create_task(system.post("/generate", body(1) | {"input_ids": [9] * 4096}))
            await until(lambda: len(base.seen) == 3)
            waits = asyncio.create_task(system.post("/generate", body(1) | {"input_ids": [9] * 4100}))
            await until(lambda: len(system.router.dispatcher.gate) == 1)
            again.cancel()
            assert (await waits).status == 200
            system.assert_idle()

    run(scenario())


def test_a_client_that_leaves_meanwhile_leaves_nothing():
    async def scenario():
        async with running_system(decode={"planner": 1}) as system:
            await with_known_rate(system, behave="slow:0.3")
            base = system.prefill[0]
            first = asyncio.create_task(system.post("/generate", body(1)))
            await until(lambda: len(base.seen) == 1)
            gone = asyncio.create_task(system.post("/generate", body(2)))
            await until(lambda: len(system.router.dispatcher.gate) == 1)
            gone.cancel()
            await until(lambda: not system.router.dispatcher.gate)
            assert (await first).status == 200
            assert len(base.seen) == 1
            system.assert_idle()

    run(scenario())


@pytest.mark.parametrize("config", [{"is_on": False}, {"queue_size": 0}, {"min_shared_tokens": 5000}])
def test_where_nobody_may_wait_nobody_does(config):
    async def scenario():
        async with running_system(admission=AdmissionConfig(**config)) as system:
            await with_known_rate(system, behave="slow:0.2")
            answers = await asyncio.gather(*(system.post("/generate", body(i)) for i in range(2)))
            assert [answer.status for answer in answers] == [200, 200]
            assert system.prefill[0].most_active == 2

    run(scenario())
