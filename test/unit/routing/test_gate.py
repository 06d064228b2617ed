"""Requests that find no room wait in the router, and go, are turned away, or leave: nothing of them stays."""

import asyncio
import dataclasses
import json

import pytest

from sglang_prefillshare.protocol import Room
from sglang_prefillshare.routing.config import AdmissionConfig
from sglang_prefillshare.routing.request import Endpoint, parse_request
from sglang_prefillshare.routing.telemetry import Timings
from test.unit.routing.routing_harness import run, running_system, until

PROMPT_TOKENS, OUTPUT_TOKENS, PAGE_TOKENS = 40, 24, 16
NEED_TOKENS = PROMPT_TOKENS + OUTPUT_TOKENS + PAGE_TOKENS


def body(model="planner", *, first=5, **more):
    """A request that needs `NEED_TOKENS` of room on decode."""
    ids = [first] * PROMPT_TOKENS
    return {"model": model, "input_ids": ids, "sampling_params": {"max_new_tokens": OUTPUT_TOKENS}, **more}


def with_room(requests, *, module="planner", **changes):
    """Has the module's workers say that their pool holds so many requests."""

    def prepare(prefill, decode):
        for worker in decode[module]:
            room = Room(pool_tokens=requests * NEED_TOKENS + 8, used_tokens=0, **changes)
            worker.info = dataclasses.replace(worker.info, room=room)

    return prepare


async def waiting(system, count):
    await until(lambda: len(system.router.dispatcher.gate) == count)


async def send(system, count, **kw):
    tasks = [asyncio.create_task(system.post("/generate", body(**kw))) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


def test_with_room_nobody_waits_and_no_task_is_switched():
    async def scenario():
        async with running_system(prepare=with_room(2)) as system:
            answer = await system.post("/generate", body())
            assert answer.status == 200
            assert answer.headers["x-prefillshare-queue-ms"] == "0"
            assert (await system.last_call())["queue_ms"] == 0
            raw = json.dumps(body()).encode()
            request = parse_request(Endpoint.GENERATE, raw, headers={}, modules=["planner"])
            entering = system.router.dispatcher.gate.enter(request, [], None, timings=Timings())
            with pytest.raises(StopIteration) as done:
                entering.send(None)
            done.value.value.release()
            system.assert_idle()

    run(scenario())


def test_what_does_not_fit_waits_and_goes_when_a_leg_ends():
    async def scenario():
        async with running_system(prepare=with_room(2)) as system:
            planner = system.decode["planner"][0]
            planner.script = ["slow:0.4", "slow:0.4"]
            tasks = await send(system, 3)
            await waiting(system, 1)
            assert await system.metric('queued_requests{model="planner"}') == 1
            assert planner.active == 2
            answers = await asyncio.gather(*tasks)
            assert [answer.status for answer in answers] == [200] * 3
            assert planner.most_active == 2
            assert sorted(int(answer.headers["x-prefillshare-queue-ms"]) > 100 for answer in answers) == [0, 0, 1]
            records = (await system.get("/calls")).json()["calls"]
            waited = max(records, key=lambda record: record["queue_ms"])
            assert waited["queue_ms"] > 100
            assert waited["overhead_ms"] < waited["queue_ms"]
            assert await system.metric('queued_requests{model="planner"}') == 0
            assert await system.metric('queue_seconds_count{model="planner"}') == 3
            system.assert_idle()

    run(scenario())


def test_four_times_the_load_that_fits_is_all_answered_and_never_over_committed():
    async def scenario():
        async with running_system(prepare=with_room(3), decode={"planner": 2, "coder": 1}) as system:
            for worker in system.decode["planner"]:
                worker.behave = "slow:0.03"
            tasks = [
                asyncio.create_task(system.post("/generate", body(first=i, user=f"s{i % 5}", priority=i % 2)))
                for i in range(24)
            ]
            answers = await asyncio.gather(*tasks)
            assert [answer.status for answer in answers] == [200] * 24
            assert all(worker.most_active <= 3 for worker in system.decode["planner"])
            assert all(worker.most_active == 3 for worker in system.decode["planner"]), "room was left"
            system.assert_idle()

    run(scenario())


@pytest.mark.parametrize("is_streamed", [True, False])
def test_an_answer_that_will_have_ended_makes_room_for_another(is_streamed):
    """Two of 400 tokens never hold 800 at one time, if the first has 390 of them when the other begins. Of an answer
    that is not streamed nobody knows how far it is."""
    longest = {"stream": is_streamed, "sampling_params": {"max_new_tokens": 400}}
    need = PROMPT_TOKENS + 400 + PAGE_TOKENS

    def two_and_a_bit(prefill, decode):
        (planner,) = decode["planner"]
        planner.info = dataclasses.replace(planner.info, room=Room(pool_tokens=2 * need + 100, used_tokens=0))

    async def scenario():
        async with running_system(prepare=two_and_a_bit) as system:
            (planner,) = system.decode["planner"]
            (worker,) = system.router.pool.decode["planner"]
            planner.script = ["tokens:390", "tokens:5", "tokens:1"] if is_streamed else ["slow:0.5"] * 3
            tasks = [asyncio.create_task(system.post("/generate", body(first=5, **longest)))]
            if is_streamed:
                await until(lambda: sum(leg.came for leg in worker.legs) == 390)
            tasks += [asyncio.create_task(system.post("/generate", body(first=i, **longest))) for i in (6, 7)]
            await until(lambda: planner.active == (3 if is_streamed else 2))
            await asyncio.sleep(0.1)
            assert planner.active == (3 if is_streamed else 2)
            more = asyncio.create_task(system.post("/generate", body(first=8, **longest)))
            await waiting(system, 1 if is_streamed else 2)
            planner.goes_on.set()
            answers = await asyncio.gather(*tasks, more)
            assert [answer.status for answer in answers] == [200] * 4
            system.assert_idle()

    run(scenario())


def test_a_module_that_waits_does_not_hold_another_up():
    async def scenario():
        async with running_system(prepare=with_room(1)) as system:
            system.decode["planner"][0].script = ["slow:0.5"]
            tasks = await send(system, 2)
            await waiting(system, 1)
            assert (await system.post("/generate", body("coder"))).status == 200
            assert len(system.router.dispatcher.gate) == 1
            assert [answer.status for answer in await asyncio.gather(*tasks)] == [200, 200]

    run(scenario())


def test_a_prefix_that_is_held_already_needs_no_room_again():
    """Four requests of one long prompt, in a pool that holds it once with four answers."""

    async def scenario():
        def prepare(prefill, decode):
            room = Room(pool_tokens=640 + 4 * (OUTPUT_TOKENS + PAGE_TOKENS), used_tokens=0)
            for worker in decode["planner"]:
                worker.info = dataclasses.replace(worker.info, room=room)

        async with running_system(prepare=prepare) as system:
            planner = system.decode["planner"][0]
            planner.behave = "slow:0.2"
            one = {"input_ids": [7] * 640, "sampling_params": {"max_new_tokens": OUTPUT_TOKENS}, "model": "planner"}
            answers = await asyncio.gather(*(system.post("/generate", one) for _ in range(5)))
            assert [answer.status for answer in answers] == [200] * 5
            assert planner.most_active == 4

    run(scenario())


def test_prefill_is_not_given_more_work_than_is_ahead():
    async def scenario():
        config = AdmissionConfig(prefill_backlog_tokens=1)

        def prepare(prefill, decode):
            for worker in prefill:
                worker.info = dataclasses.replace(worker.info, room=Room(pool_tokens=10**6, used_tokens=0))

        async with running_system(prepare=prepare, admission=config) as system:
            system.prefill[0].behave = "slow:0.1"
            system.decode["planner"][0].behave = system.decode["coder"][0].behave = "slow:0.1"
            tasks = [*await send(system, 2), *await send(system, 2, model="coder")]
            answers = await asyncio.gather(*tasks)
            assert [answer.status for answer in answers] == [200] * 4
            assert system.prefill[0].most_active == 1
            modules = [seen.headers["x-smg-routing-key"] for seen in system.prefill[0].seen]
            assert modules[1:3] in (["coder", "planner"], ["planner", "coder"]), "modules take turns"

    run(scenario())


def test_more_than_a_pool_goes_alone_and_is_the_workers_to_refuse():
    async def scenario():
        async with running_system(prepare=with_room(1)) as system:
            planner = system.decode["planner"][0]
            planner.script = ["slow:0.3", "bad"]
            first = asyncio.create_task(system.post("/generate", body()))
            await planner.arrived.wait()
            large = asyncio.create_task(system.post("/generate", body() | {"input_ids": [1] * 5000}))
            await waiting(system, 1)
            assert (await first).status == 200
            assert (await large).status == 400
            assert planner.most_active == 1

    run(scenario())


def test_a_full_queue_turns_away_at_once_and_says_when_to_come_again():
    async def scenario():
        config = AdmissionConfig(queue_size=1)
        async with running_system(prepare=with_room(1), admission=config) as system:
            system.decode["planner"][0].script = ["slow:0.4"]
            tasks = await send(system, 2)
            await waiting(system, 1)
            answer = await system.post("/generate", body())
            assert answer.status == 429
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert "--queue-size" in answer.error and answer.json()["error"]["type"] == "overloaded"
            record = await system.last_call()
            assert (record["outcome"], record["status"], record["attempts"]) == ("overloaded", 429, 0)
            assert await system.metric('refusals_total{model="planner",reason="queue_full"}') == 1
            assert [answer.status for answer in await asyncio.gather(*tasks)] == [200, 200]
            system.assert_idle()

    run(scenario())


def test_a_queue_that_one_module_fills_does_not_turn_away_another_that_has_room():
    async def scenario():
        config = AdmissionConfig(queue_size=1)
        async with running_system(prepare=with_room(1), admission=config) as system:
            system.decode["planner"][0].script = ["slow:2"]
            system.decode["coder"][0].script = ["slow:1"]
            tasks = await send(system, 2)
            await waiting(system, 1)
            other = asyncio.create_task(system.post("/generate", body("coder")))
            await system.decode["coder"][0].arrived.wait()
            assert len(system.router.dispatcher.gate) == 1
            info = system.router.pool[system.decode["coder"][0].url].info
            assert info is not None and info.room is None, "its workers say nothing: they have room for all"
            assert (await system.post("/generate", body("coder"))).status == 200
            assert (await system.post("/generate", body())).status == 429
            assert [answer.status for answer in await asyncio.gather(other, *tasks)] == [200] * 3
            system.assert_idle()

    run(scenario())


def test_a_full_queue_turns_away_a_module_of_which_none_waits_and_that_has_no_room():
    async def scenario():
        def prepare(prefill, decode):
            with_room(1)(prefill, decode)
            with_room(1, module="coder")(prefill, decode)

        async with running_system(prepare=prepare, admission=AdmissionConfig(queue_size=1)) as system:
            system.decode["planner"][0].script = ["slow:2"]
            system.decode["coder"][0].script = ["slow:2"]
            tasks = await send(system, 1, model="coder")
            await system.decode["coder"][0].arrived.wait()
            tasks += await send(system, 2)
            await waiting(system, 1)
            assert (await system.post("/generate", body("coder"))).status == 429
            assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 3
            system.assert_idle()

    run(scenario())


def test_large_bodies_fill_the_queue_too():
    async def scenario():
        config = AdmissionConfig(queue_bytes=3000)
        async with running_system(prepare=with_room(1), admission=config) as system:
            planner = system.decode["planner"][0]
            planner.script = ["slow:0.4"]
            first = asyncio.create_task(system.post("/generate", body()))
            await planner.arrived.wait()
            small = asyncio.create_task(system.post("/generate", body()))
            await waiting(system, 1)
            answer = await system.post("/generate", body(rid="x" * 3000))
            assert answer.status == 429 and "bytes" in answer.error
            assert (await first).status == (await small).status == 200
            system.assert_idle()

    run(scenario())


def test_who_waits_too_long_is_turned_away_and_the_others_go_on():
    async def scenario():
        config = AdmissionConfig(queue_timeout_s=0.2)
        async with running_system(prepare=with_room(1), admission=config) as system:
            system.decode["planner"][0].script = ["slow:0.5"]
            first, second = await send(system, 2)
            answer = (await second) if not second.done() else second.result()
            late = answer if answer.status == 429 else await first
            assert late.status == 429
            assert int(late.headers["x-prefillshare-queue-ms"]) >= 150
            assert "--queue-timeout" in late.error and "retry-after" in late.headers
            assert await system.metric('refusals_total{model="planner",reason="queue_timeout"}') == 1
            assert sorted([(await first).status, (await second).status]) == [200, 429]
            assert (await system.post("/generate", body())).status == 200
            system.assert_idle()

    run(scenario())


def test_a_client_that_leaves_while_it_waits_leaves_nothing():
    async def scenario():
        async with running_system(prepare=with_room(1)) as system:
            planner = system.decode["planner"][0]
            planner.script = ["slow:0.5"]
            first = asyncio.create_task(system.post("/generate", body()))
            await planner.arrived.wait()
            gone, stays = await send(system, 2, first=6)
            await waiting(system, 2)
            gone.cancel()
            await waiting(system, 1)
            assert (await first).status == (await stays).status == 200
            await until(lambda: len(system.router.calls.find()) == 3)
            assert len(planner.seen) == 2
            outcomes = sorted(record.outcome for record in system.router.calls.find())
            assert outcomes == ["disconnected", "ok", "ok"]
            system.assert_idle()

    run(scenario())


def test_a_router_that_stops_answers_those_that_wait():
    async def scenario():
        async with running_system(prepare=with_room(1), stop_grace_s=5.0) as system:
            planner = system.decode["planner"][0]
            planner.script = ["slow:0.4"]
            first = asyncio.create_task(system.post("/generate", body()))
            await planner.arrived.wait()
            tasks = await send(system, 3)
            await waiting(system, 3)
            system.server.should_exit = True
            answers = await asyncio.gather(*tasks)
            assert [answer.status for answer in answers] == [503] * 3
            assert "stopping" in answers[0].error
            assert (await first).status == 200  # it was in flight, and has its grace

    run(scenario())


def test_those_that_wait_for_a_worker_that_is_lost_are_told_at_once():
    async def scenario():
        async with running_system(prepare=with_room(1), poll_misses_until_down=1) as system:
            planner = system.decode["planner"][0]
            planner.script = ["hang"]
            tasks = await send(system, 3)
            await waiting(system, 2)
            planner.info_behave = "503"
            answers = await asyncio.gather(*tasks)
            assert [answer.status for answer in answers] == [503] * 3
            system.assert_idle()

    run(scenario())


def test_what_others_hold_counts_once_it_was_seen_twice():
    async def scenario():
        async with running_system(prepare=with_room(1)) as system:
            planner = system.decode["planner"][0]
            room = planner.info.room
            busy = dataclasses.replace(room, used_tokens=room.pool_tokens, running_requests=4)
            planner.info = dataclasses.replace(planner.info, room=busy)
            worker = system.router.pool[planner.url]
            await until(lambda: worker.foreign_tokens > 0)
            blocks = system.router.index.block_count(planner.url)
            task = asyncio.create_task(system.post("/generate", body()))
            await waiting(system, 1)
            planner.info = dataclasses.replace(planner.info, room=room)
            assert (await task).status == 200
            assert system.router.index.block_count(planner.url) >= blocks, "its KV is still there"

    run(scenario())


def test_without_admission_nobody_waits():
    async def scenario():
        async with running_system(prepare=with_room(1), admission=AdmissionConfig(is_on=False)) as system:
            planner = system.decode["planner"][0]
            planner.behave = "slow:0.2"
            answers = await asyncio.gather(*await send(system, 4))
            assert [answer.status for answer in answers] == [200] * 4
            assert planner.most_active == 4

    run(scenario())


def test_a_request_waits_for_the_worker_that_has_its_prefix_and_not_for_long():
    async def scenario():
        def prepare(prefill, decode):
            for worker in prefill:
                worker.info = dataclasses.replace(worker.info, room=Room(pool_tokens=1400, used_tokens=0))

        for patience_s, moves in ((60.0, False), (0.05, True)):
            async with running_system(
                prefill=2, prepare=prepare, admission=AdmissionConfig(patience_s=patience_s)
            ) as system:
                one = {"model": "planner", "input_ids": [3] * 1024, "user": "s"}
                assert (await system.post("/generate", one)).status == 200
                home = next(worker for worker in system.prefill if worker.seen)
                other = next(worker for worker in system.prefill if worker is not home)
                home.script, system.decode["planner"][0].script = ["slow:0.5"], ["slow:0.5"]
                busy = asyncio.create_task(system.post("/generate", one | {"input_ids": [4] * 1024}))
                await until(lambda home=home: home.active == 1)
                assert (await system.post("/generate", one | {"input_ids": [3] * 1040})).status == 200
                assert bool(other.seen) is moves
                assert (await busy).status == 200

    run(scenario())


def test_what_one_waits_for_is_not_taken_by_smaller_ones_of_another_module():
    async def scenario():
        def prepare(prefill, decode):
            for worker in prefill:
                worker.info = dataclasses.replace(worker.info, room=Room(pool_tokens=1000, used_tokens=0))

        async with running_system(prepare=prepare) as system:
            base = system.prefill[0]
            base.script, system.decode["planner"][0].script = ["slow:0.4"], ["slow:0.4"]
            first = asyncio.create_task(system.post("/generate", {"model": "planner", "input_ids": [1] * 300}))
            await base.arrived.wait()
            large = asyncio.create_task(system.post("/generate", {"model": "planner", "input_ids": [2] * 800}))
            await waiting(system, 1)
            small = asyncio.create_task(system.post("/generate", {"model": "coder", "input_ids": [3] * 100}))
            await waiting(system, 2)
            answers = await asyncio.gather(first, large, small)
            assert [answer.status for answer in answers] == [200] * 3
            assert len(base.seen[1].body["input_ids"]) == 800

    run(scenario())


def test_who_waits_for_its_prefix_lets_others_go_elsewhere():
    async def scenario():
        def prepare(prefill, decode):
            for worker in prefill:
                worker.info = dataclasses.replace(worker.info, room=Room(pool_tokens=1400, used_tokens=0))

        config = AdmissionConfig(patience_s=60.0)
        async with running_system(prefill=2, prepare=prepare, admission=config) as system:
            one = {"model": "planner", "input_ids": [3] * 1024, "user": "s"}
            assert (await system.post("/generate", one)).status == 200
            home = next(worker for worker in system.prefill if worker.seen)
            other = next(worker for worker in system.prefill if worker is not home)
            home.script, system.decode["planner"][0].script = ["slow:0.5"], ["slow:0.5"]
            busy = asyncio.create_task(system.post("/generate", one | {"input_ids": [4] * 1024}))
            await until(lambda: home.active == 1)
            waits = asyncio.create_task(system.post("/generate", one | {"input_ids": [3] * 1040}))
            await waiting(system, 1)
            passes = await system.post("/generate", {"model": "planner", "input_ids": [5] * 1024})
            assert passes.status == 200 and len(other.seen) == 1
            assert len(system.router.dispatcher.gate) == 1
            assert (await busy).status == (await waits).status == 200
            assert len(home.seen) == 3

    run(scenario())


def test_one_that_is_cancelled_as_it_is_let_through_leaves_nothing():
    async def scenario():
        async with running_system(prepare=with_room(1)) as system:
            gate = system.router.dispatcher.gate
            raw = json.dumps(body()).encode()
            request = parse_request(Endpoint.GENERATE, raw, headers={}, modules=["planner"])

            async def never():
                await asyncio.Event().wait()

            first = await gate.enter(request, [], never, timings=Timings())
            timings = Timings()
            task = asyncio.create_task(gate.enter(request, [], never, timings=timings))
            await waiting(system, 1)
            await asyncio.sleep(0.02)
            first.release()
            gate.clear()  # its turn has come, and it has not run since
            assert not gate
            assert system.router.pool[system.decode["planner"][0].url].legs
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert timings.queue_ms >= 20
            system.assert_idle()

    run(scenario())


@pytest.mark.parametrize(
    ("endpoint", "fields", "limits", "priority"),
    [
        (Endpoint.CHAT, {"messages": [{"role": "user", "content": "x"}]}, [None], None),
        (Endpoint.CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "priority": 2}, [3], 2),
        (
            Endpoint.CHAT,
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "max_completion_tokens": 9},
            [9],
            None,
        ),
        (Endpoint.COMPLETIONS, {"prompt": ["x", "y"]}, [16, 16], None),
        (Endpoint.COMPLETIONS, {"prompt": "x", "max_tokens": 5, "priority": -4}, [5], -4),
        (Endpoint.GENERATE, {"text": "x"}, [128], None),
        (
            Endpoint.GENERATE,
            {"text": ["x", "y"], "sampling_params": [{"max_new_tokens": 7}, {}], "priority": [1, 8]},
            [7, 128],
            8,
        ),
    ],
)
def test_what_a_request_says_of_its_answers_and_its_priority(endpoint, fields, limits, priority):
    raw = json.dumps({"model": "m"} | fields).encode()
    request = parse_request(endpoint, raw, headers={}, modules=["m"])
    assert (request.output_limits, request.priority) == (limits, priority)
