"""Whose contexts are kept: values in, decisions out; and a router that holds sessions back."""

import asyncio
import dataclasses
import random
from collections import OrderedDict, deque

import pytest

from sglang_prefillshare.protocol import Room
from sglang_prefillshare.routing.config import AdmissionConfig
from sglang_prefillshare.routing.holdings import Hold
from sglang_prefillshare.routing.residency import Pressure, Residency
from test.unit.routing.routing_harness import run, running_system, until

BLOCK, POOL, IDLE_S = 10, 100, 2.0


def context(session, tokens):
    """Of a session of its own: nothing in common with others."""
    return Hold([[(session, place) for place in range(tokens // BLOCK)]], tokens % BLOCK)


def name(session):
    return ("base", str(session))


class Sessions:
    """A residency of one worker, and what its sessions have under way."""

    def __init__(self, *, do_come_back=True):
        self.residency = Residency(block_tokens=BLOCK, idle_s=IDLE_S)
        self.now_s = 0.0
        if do_come_back:
            for _ in range(20):
                self.call("early", 10).end(self.now_s)
            self.now_s += IDLE_S
            self.residency.sweep(self.now_s)
            self.residency._grown_tokens = 0.0

    def call(self, session, tokens, *, worker="w", **how):
        how = {"pool_tokens": POOL, **how}
        return self.residency.enter(name(session), worker, context(session, tokens), now_s=self.now_s, **how)

    @property
    def held(self):
        return self.residency.held_tokens("w")


def test_a_session_waits_where_the_contexts_of_others_fill_the_pool():
    sessions = Sessions()
    stays = [sessions.call(session, 40) for session in range(2)]
    assert all(stays) and sessions.held == 80
    assert sessions.call(2, 40) is None
    assert sessions.held == 80, "nothing of it stays"
    stays[0].end(sessions.now_s)
    assert sessions.call(2, 40) is None, "between its calls a context counts"
    assert sessions.call(2, 20) is None, "a tenth is kept for contexts that grow"
    assert sessions.call(3, 10), "what is small fits beside them"
    assert sessions.call(0, 45), "its own next turn goes on"
    assert sessions.held == 95


def test_a_session_that_makes_no_call_for_a_while_leaves_its_room():
    sessions = Sessions()
    stay = sessions.call(0, 90)
    sessions.now_s += 100
    assert sessions.call(1, 90) is None, "its call is under way"
    assert sessions.residency.next_change_s(sessions.now_s) is None
    stay.end(sessions.now_s)
    stay.end(sessions.now_s + 1)
    assert sessions.residency.next_change_s(sessions.now_s) == sessions.now_s + IDLE_S
    sessions.now_s += IDLE_S - 0.1
    assert sessions.call(1, 90) is None
    sessions.now_s += 0.1
    assert sessions.call(1, 90) and sessions.held == 90 and len(sessions.residency) == 1


def test_contexts_that_grow_too_large_send_out_who_came_last():
    sessions = Sessions()
    stays = [sessions.call(session, 30) for session in range(3)]
    for stay in stays:
        stay.end(sessions.now_s)
    assert sessions.call(0, 50)
    assert sessions.held == 80 and len(sessions.residency) == 2
    assert sessions.call(2, 30) is None, "it waits from its next call on"
    assert sessions.call(1, 60) is None, "now it came last, and is the one that grew"
    assert sessions.held == 50
    assert sessions.call(0, 500), "the only one stays whatever its size: to refuse it is the worker's business"


def test_contexts_are_taken_to_grow_as_large_as_others_became():
    sessions = Sessions()
    for tokens in (20, 40):
        sessions.call(0, tokens).end(sessions.now_s)
    sessions.now_s += IDLE_S
    sessions.residency.sweep(sessions.now_s)
    assert sessions.call(1, 10) and sessions.call(2, 30)
    assert sessions.call(3, 10) is None, "there will be no room for three of 40"
    assert sessions.call(1, 50) and sessions.call(2, 50), "what is there stays until it is too much"
    sessions.call("once", 10, worker="v").end(sessions.now_s)
    sessions.now_s += IDLE_S
    sessions.residency.sweep(sessions.now_s)
    assert sessions.residency._grown_tokens == 40, "of one call nothing is learned"


def test_who_waited_long_enough_takes_the_place_of_who_came_first_but_seldom():
    sessions = Sessions()
    stays = [sessions.call(session, 45) for session in range(2)]
    assert sessions.call(2, 50) is None
    due = sessions.call(2, 50, is_due=True, compute_s=0.5)
    assert due and sessions.held == 95 and len(sessions.residency) == 2
    assert sessions.call(1, 50), "it came later than the first"
    assert sessions.call(0, 50, is_due=True) is None, "each half of a second that is computed again takes 10 s"
    assert sessions.residency.next_change_s(sessions.now_s) == sessions.now_s + 10
    sessions.now_s += 10
    assert sessions.call(0, 45) is None
    assert sessions.call(0, 45, is_due=True) and sessions.held == 95
    assert sessions.call(1, 45) is None, "now it was the first"
    for stay in (*stays, due):
        stay.end(sessions.now_s)
    assert sessions.held == 95


def test_what_sessions_have_in_common_counts_once():
    sessions = Sessions()
    common = list(range(8))
    for session in range(20):
        hold = Hold([[*common, ("own", session)]], 0)
        found = sessions.residency.enter(name(session), "w", hold, pool_tokens=120, now_s=0.0)
        assert (found is not None) == (session < 2)


def test_nobody_waits_where_sessions_do_not_come_back_or_nobody_waits_for_the_worker():
    sessions = Sessions(do_come_back=False)
    for session in range(50):
        assert sessions.call(session, 40), "it is not known yet that they do"
        sessions.now_s += 1
    sessions = Sessions()
    assert all(sessions.call(session, 40, pool_tokens=None) for session in range(10))
    assert sessions.call(11, 40) is None
    for session in range(50):  # from now on each makes one call
        sessions.call(f"once {session}", 10, pool_tokens=None).end(sessions.now_s)
        sessions.now_s += 3
    assert all(sessions.call(f"more {session}", 40) for session in range(10))


def test_a_session_that_changes_its_worker_leaves_the_first():
    sessions = Sessions()
    sessions.call(0, 60)
    assert sessions.call(0, 60, worker="v")
    assert sessions.held == 0 and sessions.residency.held_tokens("v") == 60
    sessions.residency.forget({"v", "unknown"})
    assert len(sessions.residency) == 0 and sessions.residency.held_tokens("v") == 0


def test_any_course_of_events_leaves_the_books_balanced(monkeypatch):
    monkeypatch.setattr(Residency, "_come_back", lambda self: True)
    draw = random.Random(4)
    sessions, stays = Sessions(), []
    for _ in range(5000):
        sessions.now_s += draw.choice((0.0, 0.1, 1.0))
        if stays and draw.random() < 0.5:
            stays.pop(draw.randrange(len(stays))).end(sessions.now_s)
        else:
            stay = sessions.call(
                draw.randrange(12), draw.randint(1, 80), worker=draw.choice("wv"), is_due=draw.random() < 0.1
            )
            stays += [stay] if stay else []
        for worker in "wv":
            pool = sessions.residency._pools.get(worker)
            assert pool is None or len(pool.residents) == 1 or pool.holdings.tokens <= POOL
        if draw.random() < 0.01:
            sessions.residency.forget({draw.choice("wv")})
    for stay in stays:
        stay.end(sessions.now_s)
    sessions.residency.sweep(sessions.now_s + IDLE_S)
    assert len(sessions.residency) == 0 and not sessions.residency._pools and not sessions.residency._idle


@pytest.mark.parametrize(("busy_s", "idle_s", "share"), [(5, 0, 0.5), (100, 0, 1.0), (100, 5, 0.5), (0, 50, 0.0)])
def test_a_busy_time_is_forgotten_by_half(busy_s, idle_s, share):
    pressure = Pressure(half_life_s=5.0)
    pressure.note(True, 100.0)
    pressure.note(False, 100.0 + busy_s)
    assert pressure.busy_share(100.0 + busy_s + idle_s) == pytest.approx(share, abs=0.01)
    assert pressure.is_high(100.0 + busy_s + idle_s, tokens_per_s=None) == (share > 0.8)


@pytest.mark.parametrize(("tokens_per_s", "is_high"), [(1500, True), (2500, False), (None, False)])
def test_a_worker_that_could_not_compute_every_context_is_pressed(tokens_per_s, is_high):
    pressure = Pressure()
    for call in range(20):  # a call a second, each of 1,000 tokens
        pressure.begins(1000, float(call))
    assert pressure.is_high(20.0, tokens_per_s=tokens_per_s) == is_high


class Crowd:
    """Sessions that all begin at once, on one worker that computes one call after another and keeps what fits its pool,
    least recently used given up first."""

    CALLS, GROWTH, POOL = 8, 10, 400

    def __init__(self, count, *, is_held):
        self.residency = Residency(block_tokens=BLOCK, idle_s=IDLE_S)
        self.now_s, self.computed = 0.0, 0
        self.kept = OrderedDict()
        self.made = dict.fromkeys(range(count), 0)
        self.waiting, self.held = deque(), deque(range(count))
        while any(calls < self.CALLS for calls in self.made.values()):
            self.let_in(is_held)
            if self.waiting:
                self.compute(*self.waiting.popleft())
            else:
                self.now_s += 0.1

    def let_in(self, is_held):
        while self.held:
            session = self.held[0]
            context = Hold([[(session, place) for place in range(self.made[session] + 1)]], 0)
            pool = self.POOL if is_held else None
            stay = self.residency.enter(name(session), "w", context, pool_tokens=pool, now_s=self.now_s)
            if stay is None:
                return
            self.waiting.append((self.held.popleft(), stay))

    def compute(self, session, stay):
        context = (self.made[session] + 1) * self.GROWTH
        missing = context - min(context, self.kept.pop(session, 0))
        self.computed += missing
        self.now_s += 0.1 + missing / 100
        self.kept[session] = context
        while sum(self.kept.values()) > self.POOL:
            self.kept.popitem(last=False)
        stay.end(self.now_s)
        self.made[session] += 1
        if self.made[session] < self.CALLS:
            self.held.appendleft(session)  # its next turn goes before those that have not begun


def test_a_crowd_that_is_held_back_computes_little_again():
    """Twelve times the sessions whose contexts fit."""
    needed = 60 * Crowd.CALLS * Crowd.GROWTH
    together, in_turn = Crowd(60, is_held=False), Crowd(60, is_held=True)
    assert together.computed > 3 * needed
    assert in_turn.computed < 1.6 * needed
    assert in_turn.now_s < 0.6 * together.now_s


# ---- in a router

PROMPT = 640  # ten blocks of the index


@pytest.fixture
def pays(monkeypatch):
    """Sessions come back, and prefill is what they wait for."""
    monkeypatch.setattr(Residency, "_come_back", lambda self: True)
    monkeypatch.setattr(Pressure, "is_high", lambda self, now_s, tokens_per_s: True)


def body(session, *, turns=1, **more):
    ids = [session] * PROMPT * turns
    return {
        "model": "planner",
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 8},
        "user": f"s{session}",
        **more,
    }


def with_room_for(contexts):
    """The prefill workers' pools hold so many of them."""

    def prepare(prefill, decode):
        for worker in prefill:
            room = Room(pool_tokens=round(contexts * (PROMPT + 32) / 0.9), used_tokens=0)
            worker.info = dataclasses.replace(worker.info, room=room)

    return prepare


def holding(**config):
    return AdmissionConfig(**{"session_hold_s": 20.0, "session_idle_s": 0.3, **config})


async def waiting(system, count):
    await until(lambda: len(system.router.dispatcher.gate) == count)


async def calls_of(system, count):
    """The router's records, once it has so many: the last comes when its prefill leg has ended, too."""
    async with asyncio.timeout(5):
        while len(calls := (await system.get("/calls")).json()["calls"]) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return calls


def test_a_third_session_waits_until_one_of_two_makes_no_call_any_more(pays):
    async def scenario():
        async with running_system(prepare=with_room_for(2), admission=holding()) as system:
            assert [(await system.post("/generate", body(session))).status for session in (1, 2)] == [200, 200]
            began = asyncio.get_running_loop().time()
            third = asyncio.create_task(system.post("/generate", body(3)))
            await waiting(system, 1)
            assert await system.metric('queued_requests{model="planner"}') == 1
            assert (await system.post("/generate", body(2))).status == 200, "a running session goes on meanwhile"
            assert (await system.post("/generate", {**body(4), "user": None})).status == 200, "and so does who has none"
            answer = await third
            assert answer.status == 200 and asyncio.get_running_loop().time() - began < 5
            assert int(answer.headers["x-prefillshare-queue-ms"]) > 100
            assert await system.metric('session_holds_total{model="planner"}') == 1
            assert await system.metric('queued_requests{model="planner"}') == 0
            system.assert_idle()

    run(scenario())


def test_a_small_session_does_not_go_before_a_large_one_that_waits(pays):
    async def scenario():
        async with running_system(prepare=with_room_for(3), admission=holding(session_idle_s=1.0)) as system:
            assert (await system.post("/generate", body(1, turns=2))).status == 200
            large = asyncio.create_task(system.post("/generate", body(2, turns=2)))
            await waiting(system, 1)
            small = asyncio.create_task(system.post("/generate", body(3)))
            await waiting(system, 2)
            await asyncio.gather(large, small)
            waited = {call["queue_ms"] > 300 for call in (await calls_of(system, 3))[1:]}
            assert waited == {True}
            system.assert_idle()

    run(scenario())


def test_who_waited_long_enough_goes_on_and_the_first_waits(pays):
    async def scenario():
        config = holding(session_hold_s=0.4, session_idle_s=30.0)
        async with running_system(prepare=with_room_for(1), admission=config) as system:
            for session in (1, 2, 1):
                answer = await system.post("/generate", body(session))
                assert answer.status == 200
            waited = [call["queue_ms"] > 300 for call in await calls_of(system, 3)]
            assert waited == [False, True, True]
            system.assert_idle()

    run(scenario())


def test_another_worker_with_room_takes_a_session(pays):
    async def scenario():
        async with running_system(prefill=2, prepare=with_room_for(2), admission=holding()) as system:
            answers = [await system.post("/generate", body(session)) for session in range(1, 5)]
            assert [answer.status for answer in answers] == [200] * 4
            calls = await calls_of(system, 4)
            assert await system.metric('session_holds_total{model="planner"}') == 0
            placed = [call["prefill_worker"] for call in calls]
            assert sorted(placed.count(worker.url) for worker in system.prefill) == [2, 2]
            again = [await system.post("/generate", body(session)) for session in range(1, 5)]
            assert [answer.status for answer in again] == [200] * 4
            assert [call["prefill_worker"] for call in await calls_of(system, 8)] == placed * 2

    run(scenario())


@pytest.mark.parametrize("hold_s", [20.0, None])
def test_a_resident_waits_for_its_worker_although_another_has_room(pays, hold_s):
    """Its context is kept there; any other would have to compute it."""

    async def scenario():
        config = holding(session_hold_s=hold_s, patience_s=0.05)
        async with running_system(prefill=2, prepare=with_room_for(1), admission=config) as system:
            assert (await system.post("/generate", body(1))).status == 200
            (first,) = await calls_of(system, 1)
            home = next(worker for worker in system.prefill if worker.url == first["prefill_worker"])
            home.script = ["slow:1"]
            system.decode["planner"][0].script = ["slow:1"]
            blocking = {**body(1), "user": None}  # it finds its prefix there
            tasks = [asyncio.create_task(system.post("/generate", blocking))]
            await until(lambda: home.active == 1)
            tasks.append(asyncio.create_task(system.post("/generate", body(1, turns=2))))
            assert [answer.status for answer in await asyncio.gather(*tasks)] == [200, 200]
            last = next(call for call in await calls_of(system, 3) if call["prefill_tokens"] and call["queue_ms"] > 20)
            assert (last["prefill_worker"] == home.url) == (hold_s is not None)
            system.assert_idle()

    run(scenario())


def test_a_client_that_leaves_and_a_router_that_stops_leave_nothing(pays):
    async def scenario():
        config = holding(session_idle_s=30.0)
        async with running_system(prepare=with_room_for(1), admission=config) as system:
            assert (await system.post("/generate", body(1))).status == 200
            leaving, staying = (asyncio.create_task(system.post("/generate", body(session))) for session in (2, 3))
            await waiting(system, 2)
            leaving.cancel()
            await waiting(system, 1)
            assert system.router.dispatcher.gate._body_bytes > 0
            system.router.dispatcher.stop()
            assert (await staying).status == 503
            await waiting(system, 0)
            assert system.router.dispatcher.gate._body_bytes == 0
            system.assert_idle()

    run(scenario())


def test_a_session_that_finds_no_room_in_time_is_told_so(pays):
    async def scenario():
        config = holding(session_idle_s=30.0, queue_timeout_s=0.3)
        async with running_system(prepare=with_room_for(1), admission=config) as system:
            assert (await system.post("/generate", body(1))).status == 200
            answer = await system.post("/generate", body(2))
            assert answer.status == 429 and "contexts of other sessions" in answer.error
            assert answer.headers["retry-after"]
            assert await system.metric('refusals_total{model="planner",reason="queue_timeout"}') == 1
            system.assert_idle()

    run(scenario())


def test_the_bodies_of_those_held_back_are_bounded(pays):
    async def scenario():
        config = holding(session_idle_s=30.0, queue_bytes=6000)
        async with running_system(prepare=with_room_for(1), admission=config) as system:
            assert (await system.post("/generate", body(1))).status == 200
            held = asyncio.create_task(system.post("/generate", body(2)))
            await waiting(system, 1)
            answer = await system.post("/generate", body(3, turns=3))
            assert answer.status == 429 and "bytes" in answer.error
            held.cancel()

    run(scenario())


def test_those_held_back_count_for_the_queue(pays):
    async def scenario():
        config = holding(session_idle_s=30.0, queue_size=1)
        async with running_system(prepare=with_room_for(1), admission=config) as system:
            assert (await system.post("/generate", body(1))).status == 200
            held = asyncio.create_task(system.post("/generate", body(2)))
            await waiting(system, 1)
            answer = await system.post("/generate", body(3))
            assert answer.status == 429 and "--queue-size" in answer.error and answer.headers["retry-after"]
            assert (await system.post("/generate", body(1))).status == 200
            held.cancel()

    run(scenario())


@pytest.mark.parametrize("hold_s", [None, 20.0])
def test_nobody_is_held_back_where_it_is_off_or_does_not_pay(hold_s, request):
    if hold_s is None:
        request.getfixturevalue("pays")

    async def scenario():
        async with running_system(prepare=with_room_for(1), admission=holding(session_hold_s=hold_s)) as system:
            for session in (1, 2, 1, 2, 3):
                assert (await system.post("/generate", body(session))).status == 200
            assert await system.metric('session_holds_total{model="planner"}') == 0

    run(scenario())
