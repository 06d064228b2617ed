"""A worker that keeps failing is left out, tried again, and never blamed for what is not its fault."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.breaker import Breaker, BreakerState, Fault
from sglang_prefillshare.routing.config import BreakerConfig
from test.unit.routing.routing_harness import run, running_system, until

CONFIG = BreakerConfig(failures_to_open=3, backoff_s=2.0, max_backoff_s=5.0)


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return Breaker(CONFIG, now=clock)


def fail(breaker, count, fault=Fault.TRANSPORT):
    for _ in range(count):
        breaker.failed(breaker.permit(), fault)


def test_failures_in_a_row_open_it_and_a_success_between_them_starts_over(breaker):
    fail(breaker, 2)
    breaker.succeeded(breaker.permit())
    fail(breaker, 2)
    assert (breaker.state, breaker.is_avoided) == (BreakerState.CLOSED, False)
    fail(breaker, 1)
    assert (breaker.state, breaker.is_avoided, breaker.is_shut) == (BreakerState.OPEN, True, True)


def test_it_lets_one_request_try_and_closes_when_that_is_served(breaker, clock):
    fail(breaker, 3)
    clock.now_s += 2.0
    assert (breaker.state, breaker.is_avoided) == (BreakerState.HALF_OPEN, False)
    probe = breaker.permit()
    assert breaker.is_avoided and breaker.is_shut, "one is under way"
    breaker.succeeded(probe)
    assert (breaker.state, breaker.is_avoided) == (BreakerState.CLOSED, False)


def test_a_permit_that_comes_back_unused_lets_the_next_one_try(breaker, clock):
    fail(breaker, 3)
    clock.now_s += 2.0
    breaker.give_back(breaker.permit())
    assert not breaker.is_avoided
    assert breaker.permit().is_probe


def test_each_failed_try_doubles_the_wait_up_to_a_bound(breaker, clock):
    fail(breaker, 3)
    for wait_s in (2.0, 4.0, 5.0, 5.0):
        clock.now_s += wait_s - 0.01
        assert breaker.state is BreakerState.OPEN
        clock.now_s += 0.01
        assert breaker.state is BreakerState.HALF_OPEN
        fail(breaker, 1)
    clock.now_s += 5.0
    breaker.succeeded(breaker.permit())
    fail(breaker, 3)
    clock.now_s += 2.0
    assert breaker.state is BreakerState.HALF_OPEN, "a success makes the wait short again"


def test_what_was_sent_before_it_opened_says_nothing_afterwards(breaker):
    early = [breaker.permit() for _ in range(2)]
    fail(breaker, 3)
    breaker.succeeded(early[0])
    breaker.failed(early[1], Fault.TRANSPORT)
    assert (breaker.state, breaker.opened_count) == (BreakerState.OPEN, 1)


def test_bad_answers_alone_never_shut_it(breaker):
    fail(breaker, 3, Fault.ANSWER)
    assert breaker.is_avoided and not breaker.is_shut


def test_one_broken_connection_among_bad_answers_does_not_shut_it(breaker, clock):
    """Somebody who aborts all that a worker does makes many bad answers at once."""
    fail(breaker, 1)
    fail(breaker, 4, Fault.ANSWER)
    assert breaker.is_avoided and not breaker.is_shut
    clock.now_s += 2.0
    fail(breaker, 1)  # the one that tries it
    assert breaker.is_avoided and breaker.is_shut


def test_another_process_starts_anew_and_zero_turns_it_off(breaker, clock):
    fail(breaker, 3)
    breaker.reset()
    assert (breaker.state, breaker.consecutive_failures) == (BreakerState.CLOSED, 0)
    never = Breaker(BreakerConfig(failures_to_open=0), now=clock)
    fail(never, 100)
    assert never.state is BreakerState.CLOSED


@given(st.lists(st.tuples(st.sampled_from(["permit", "ok", "fail", "back", "wait"]), st.integers(0, 9)), max_size=60))
def test_in_any_course_of_events_at_most_one_tries_and_it_can_always_close(events):
    clock = Clock()
    breaker, out = Breaker(CONFIG, now=clock), []
    for what, pick in events:
        if what == "permit" and not breaker.is_avoided:
            out.append(breaker.permit())
        elif what == "wait":
            clock.now_s += pick
        elif out and what in ("ok", "fail", "back"):
            permit = out.pop(pick % len(out))
            match what:
                case "ok":
                    breaker.succeeded(permit)
                case "fail":
                    breaker.failed(permit, Fault.ANSWER if pick % 2 else Fault.TRANSPORT)
                case "back":
                    breaker.give_back(permit)
            breaker.give_back(permit)  # as a leg's end does, whatever came before
        assert sum(permit.is_probe for permit in out) <= 1
    for permit in out:
        breaker.give_back(permit)
    clock.now_s += CONFIG.max_backoff_s
    assert not breaker.is_avoided
    breaker.succeeded(breaker.permit())
    assert breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize(
    "wrong", [{"failures_to_open": -1}, {"backoff_s": 0.0}, {"backoff_s": 9.0, "max_backoff_s": 8.0}]
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BreakerConfig(**wrong)


# ----------------------------------------------------------------------------------------------- with fake workers


def breaker_of(system, worker):
    return system.router.pool[worker.url].breaker


def test_a_worker_whose_connections_break_is_left_out_and_comes_back():
    async def scenario():
        config = BreakerConfig(failures_to_open=2, backoff_s=0.2)
        async with running_system(decode={"planner": 1, "coder": 1}, breaker=config, retries=0) as system:
            planner = system.decode["planner"][0]
            planner.behave = "die"
            assert [(await system.chat()).status for _ in range(2)] == [502, 502]
            answer = await system.chat()
            assert answer.status == 503 and "failed several times in a row" in answer.error
            assert answer.headers["retry-after"]
            assert len(planner.seen) == 2, "nothing was sent, to either side"
            assert len(system.prefill[0].seen) == 2
            assert (await system.chat("coder")).status == 200
            label = f'{{model="planner",role="decode",worker="{planner.url}"}}'
            assert await system.metric(f"worker_breaker_open{label}") == 1
            shown = (await system.get("/workers")).json()["workers"]
            (found,) = [worker["breaker"] for worker in shown if worker["url"] == planner.url]
            assert (found["state"], found["consecutive_failures"], found["openings"]) == ("open", 2, 1)
            planner.behave = "ok"
            await until(lambda: breaker_of(system, planner).state is BreakerState.HALF_OPEN)
            assert (await system.chat()).status == 200
            assert breaker_of(system, planner).state is BreakerState.CLOSED
            assert await system.metric(f"worker_breaker_open{label}") == 0
            system.assert_idle()

    run(scenario())


def test_a_client_that_leaves_while_its_request_tries_a_worker_lets_the_next_one_try():
    async def scenario():
        config = BreakerConfig(failures_to_open=1, backoff_s=0.1)
        async with running_system(breaker=config, retries=0) as system:
            planner = system.decode["planner"][0]
            planner.script = ["die", "hang"]
            assert (await system.chat()).status == 502
            await until(lambda: breaker_of(system, planner).state is BreakerState.HALF_OPEN)
            trying = asyncio.create_task(system.chat())
            await until(lambda: len(planner.seen) == 2)
            assert (await system.chat()).status == 503
            trying.cancel()
            await until(lambda: not breaker_of(system, planner).is_avoided)
            assert (await system.chat()).status == 200

    run(scenario())


def test_bad_answers_send_others_elsewhere_and_leave_no_module_without_a_worker():
    async def scenario():
        config = BreakerConfig(failures_to_open=2, backoff_s=30.0)
        async with running_system(decode={"planner": 2, "coder": 1}, breaker=config) as system:
            bad, good = system.decode["planner"]
            bad.behave = "broken"
            while not breaker_of(system, bad).is_avoided:
                await system.chat()
            count = len(bad.seen)
            assert [(await system.chat()).status for _ in range(4)] == [200] * 4
            assert len(bad.seen) == count and len(good.seen) >= 4
            coder = system.decode["coder"][0]
            coder.script = ["broken"] * 3
            assert [(await system.chat("coder")).status for _ in range(4)] == [500, 500, 500, 200]

    run(scenario())


@pytest.mark.parametrize("status", [429, 503])
def test_a_worker_that_is_full_gets_nothing_for_a_moment_and_has_not_failed(status):
    async def scenario():
        async with running_system(decode={"planner": 2}, breaker=BreakerConfig(failures_to_open=1)) as system:
            for worker in system.decode["planner"]:
                worker.script = [f"full:{status}"]
            assert [(await system.chat()).status for _ in range(2)] == [status, status]
            waited = await system.chat()
            assert waited.status == 200
            assert int(waited.headers["x-prefillshare-queue-ms"]) > 200, "both are full"
            assert all(not breaker_of(system, worker).is_avoided for worker in system.decode["planner"])

    run(scenario())


def test_what_a_client_got_wrong_is_no_failure_of_the_worker():
    async def scenario():
        async with running_system(breaker=BreakerConfig(failures_to_open=1)) as system:
            system.decode["planner"][0].behave = "bad"
            assert [(await system.chat()).status for _ in range(3)] == [400] * 3
            assert not breaker_of(system, system.decode["planner"][0]).is_avoided

    run(scenario())
