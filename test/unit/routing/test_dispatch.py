"""The two legs of a request: pairing, bytes, and both-or-neither in every order of failure."""

import asyncio
import json
import random

import pytest

from sglang_prefillshare.protocol import MODULE_HEADER
from test.unit.routing.routing_harness import STREAM, WHOLE, run, running_system, until


def test_a_request_becomes_a_pair_and_decode_bytes_pass_untouched():
    async def scenario():
        async with running_system() as system:
            answer = await system.chat(
                "planner",
                headers={"Authorization": "Bearer k", "X-Request-Id": "trace-7", "X-SMG-Routing-Key": "s1"},
                temperature=0.5,
                logprobs=True,
                top_logprobs=3,
            )
            assert (answer.status, answer.body) == (200, WHOLE)
            assert answer.headers["Content-Type"] == "application/json"
            assert answer.headers["X-Worker"] == "yes"
            assert answer.headers["X-Request-Id"] == "trace-7"

            (p,), (d,) = system.prefill[0].seen, system.decode["planner"][0].seen
            assert not system.decode["coder"][0].seen
            assert p.path == d.path == "/v1/chat/completions"
            for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid"):
                assert p.body[name] == d.body[name]
            assert d.body["bootstrap_host"] == "127.0.0.1"
            assert d.body["bootstrap_port"] == 8998
            assert 1 <= d.body["bootstrap_room"] < 2**63
            assert p.body["model"] == "base"
            assert d.body["model"] == "planner"
            assert "logprobs" not in p.body and d.body["logprobs"] is True
            assert p.headers[MODULE_HEADER] == "planner"
            assert d.headers[MODULE_HEADER] == "s1"
            for leg in (p, d):
                assert leg.headers["authorization"] == "Bearer k"
                assert leg.headers["x-request-id"] == "trace-7"

            call = await system.last_call()
            assert call["rid"] == "trace-7"
            assert call["outcome"] == "ok" and call["status"] == 200
            assert call["prefill_worker"] == system.prefill[0].url
            assert call["decode_worker"] == system.decode["planner"][0].url
            assert (call["prefill_tokens"], call["cached_tokens"], call["cross_model_cached_tokens"]) == (40, 32, 16)
            assert call["ttft_ms"] is None and call["e2e_ms"] > 0
            assert (await system.get("/calls?rid=trace-7")).json()["calls"][0]["worker_rids"] == [d.body["rid"]]
            assert (await system.get("/calls?rid=other")).json()["calls"] == []
            system.assert_idle()

    run(scenario())


def test_a_stream_passes_untouched_and_its_first_byte_is_timed():
    async def scenario():
        async with running_system() as system:
            answer = await system.chat(stream=True, stream_options={"include_usage": True})
            assert (answer.status, answer.body) == (200, b"".join(STREAM))
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            p, d = system.prefill[0].seen[0].body, system.decode["planner"][0].seen[0].body
            assert p["stream"] is False and "stream_options" not in p
            assert d["stream"] is True and d["stream_options"] == {"include_usage": True}
            call = await system.last_call()
            assert 0 < call["ttft_ms"] <= call["e2e_ms"]
            assert await system.metric('ttft_seconds_count{model="planner"}') == 1

    run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/generate", {"text": "hi", "sampling_params": {"max_new_tokens": 9}}, None),
        ("/generate", {"input_ids": [1, 2, 3]}, None),
        ("/generate", {"text": ["a", "b", "c"]}, 3),
        ("/generate", {"text": ["a"], "rid": ["mine"]}, 1),
        ("/generate", {"input_ids": [[1, 2], [3]], "rid": "mine"}, 2),
        ("/v1/completions", {"prompt": "hi"}, None),
        ("/v1/completions", {"prompt": [1, 2]}, None),
        ("/v1/completions", {"prompt": ["a", "b"]}, 2),
        ("/v1/completions", {"prompt": [[1], [2]]}, 2),
    ],
)
def test_single_and_batched_prompts_are_paired_one_by_one(path, body, count):
    async def scenario():
        async with running_system() as system:
            answer = await system.post(path, {"model": "coder"} | body)
            assert (answer.status, answer.body) == (200, WHOLE)
            p, d = system.prefill[0].seen[0].body, system.decode["coder"][0].seen[0].body
            for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid"):
                assert p[name] == d[name]
                assert isinstance(d[name], list) == (count is not None)
                if count is not None:
                    assert len(d[name]) == count
            if count is not None:
                assert len(set(d["bootstrap_room"])) == count
                assert len(set(d["rid"])) == count
            if path == "/generate":
                assert p["routing_key"] == "coder"
                assert p["sampling_params"] == {"max_new_tokens": 1, "temperature": 0.0}

    run(scenario())


# ------------------------------------------------------------------------------------ both legs or neither


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("behave", "status"), [("bad", 400), ("broken", 500), ("die", 502), ("die_mid_body", 502)])
def test_a_failing_prefill_leg_ends_the_decode_leg(behave, status, stream):
    async def scenario():
        async with running_system() as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            prefill.behave, decode.behave = behave, "hang"
            answer = await system.chat(stream=stream)
            assert answer.status == status
            if behave == "bad":
                assert answer.body == b'{"object":"error","message":"no"}'
            elif status == 502:
                assert "prefill worker" in answer.error
            await until(lambda: decode.dropped == 1 and decode.aborted == [decode.seen[0].body["rid"]])
            assert await system.metric('legs_aborted_total{cause="peer",role="decode"}') == 1
            assert (await system.last_call())["outcome"] == ("worker_refused" if status == 400 else "worker_failed")
            system.assert_idle()

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("behave", "status"), [("bad", 400), ("broken", 500), ("die", 502), ("die_mid_body", 502)])
def test_a_failing_decode_leg_ends_the_prefill_leg(behave, status, stream):
    async def scenario():
        async with running_system() as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            prefill.behave, decode.behave = "hang", behave
            answer = await system.chat(stream=stream)
            assert answer.status == status
            await until(lambda: prefill.dropped == 1 and prefill.aborted == [prefill.seen[0].body["rid"]])
            system.assert_idle()

    run(scenario())


def test_decode_dying_in_a_stream_ends_it_with_an_error_event_and_no_done():
    async def scenario():
        async with running_system() as system:
            system.decode["planner"][0].behave = "die_mid_stream"
            answer = await system.chat(stream=True)
            assert answer.status == 200
            head, last = answer.body[: len(STREAM[0])], answer.body.rstrip().rsplit(b"\n\n", 1)[1]
            assert head == STREAM[0]
            assert b"[DONE]" not in answer.body
            error = json.loads(last.removeprefix(b"data: "))["error"]
            assert error["code"] == 502 and "broke" in error["message"]
            assert (await system.last_call())["outcome"] == "worker_failed"
            system.assert_idle()

    run(scenario())


def test_prefill_failing_after_decode_streamed_ends_the_stream():
    async def scenario():
        async with running_system() as system:
            system.prefill[0].behave, system.decode["planner"][0].behave = "slow:60", "hang_after_first"
            async with system.http.post(
                system.url + "/generate", json={"model": "planner", "text": "x", "stream": True}
            ) as response:
                assert await response.content.readany() == STREAM[0]
                await system.prefill[0].stop()
                rest = await response.read()
            assert json.loads(rest.removeprefix(b"data: "))["error"]["code"] in (502, 503)
            await until(lambda: system.decode["planner"][0].aborted != [])
            system.assert_idle()

    run(scenario())


def test_prefill_failing_after_the_whole_answer_changes_nothing():
    async def scenario():
        async with running_system(drain_timeout_s=0.1) as system:
            system.prefill[0].behave = "hang"
            answer = await system.chat()
            assert (answer.status, answer.body) == (200, WHOLE)
            await until(lambda: system.prefill[0].aborted != [])
            assert (await system.last_call())["outcome"] == "ok"
            assert await system.metric('legs_aborted_total{cause="timeout",role="prefill"}') == 1
            system.assert_idle()

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prefill_behave", ["ok", "hang"])
def test_a_leaving_client_ends_both_legs(stream, prefill_behave):
    async def scenario():
        async with running_system() as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            prefill.behave, decode.behave = prefill_behave, "hang_after_first" if stream else "hang"
            task = asyncio.create_task(system.chat(stream=stream))
            await asyncio.gather(prefill.arrived.wait(), decode.arrived.wait())
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: decode.dropped == 1 and decode.aborted == [decode.seen[0].body["rid"]])
            if prefill_behave == "hang":
                await until(lambda: prefill.dropped == 1 and prefill.aborted == [prefill.seen[0].body["rid"]])
            else:
                assert prefill.aborted == []
            assert (await system.last_call())["outcome"] == "disconnected"
            assert await system.metric('legs_aborted_total{cause="client",role="decode"}') == 1
            system.assert_idle()

    run(scenario())


def test_a_batch_is_aborted_prompt_by_prompt():
    async def scenario():
        async with running_system() as system:
            system.prefill[0].behave, system.decode["planner"][0].behave = "bad", "hang"
            await system.post("/generate", {"model": "planner", "text": ["a", "b"], "rid": ["r-a", "r-b"]})
            await until(lambda: system.decode["planner"][0].aborted == ["r-a", "r-b"])

    run(scenario())


def test_the_deadline_ends_both_legs():
    async def scenario():
        async with running_system(request_timeout_s=0.3) as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            prefill.behave = decode.behave = "hang"
            answer = await system.chat()
            assert answer.status == 504 and "0.3 s" in answer.error
            await until(lambda: bool(prefill.aborted and decode.aborted))
            assert (await system.last_call())["outcome"] == "timeout"
            assert await system.metric('legs_aborted_total{cause="timeout",role="decode"}') == 1
            system.assert_idle()

    run(scenario())


def test_cancelling_the_request_task_ends_both_legs():
    async def scenario():
        async with running_system() as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            prefill.behave = decode.behave = "hang"
            client = asyncio.create_task(system.chat())
            await asyncio.gather(prefill.arrived.wait(), decode.arrived.wait())
            for task in system.server.server_state.tasks:
                task.cancel()
            await until(lambda: bool(prefill.aborted and decode.aborted))
            await asyncio.gather(client, return_exceptions=True)
            assert (await system.last_call())["outcome"] == "cancelled"
            assert await system.metric('legs_aborted_total{cause="cancelled",role="prefill"}') == 1
            system.assert_idle()

    run(scenario())


def test_stopping_the_router_ends_legs_in_flight():
    async def scenario():
        async with running_system(stop_grace_s=0.1) as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            prefill.behave = decode.behave = "hang"
            client = asyncio.create_task(system.chat())
            await asyncio.gather(prefill.arrived.wait(), decode.arrived.wait())
            system.server.should_exit = True
            answer = await client
            assert answer.status == 503 and "stopping" in answer.error
            await system.server_task
            assert prefill.aborted and decode.aborted
            system.assert_idle()

    run(scenario())


# ------------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_refused_connection_is_tried_once_on_another_worker_with_a_new_room(role):
    async def scenario():
        # A long poll interval, so that the router does not learn of the death before the request.
        async with running_system(prefill=2, decode={"planner": 2}, poll_interval_s=30.0) as system:
            group = system.prefill if role == "prefill" else system.decode["planner"]
            other = system.decode["planner"] if role == "prefill" else system.prefill
            for worker in system.decode["planner"]:
                worker.behave = "slow:0.1"  # as a decode worker waits for its KV
            await group[0].stop()
            for _ in range(2):  # equals rotate: one of two requests meets the dead worker
                assert (await system.chat(headers={"x-request-id": "again"})).status == 200
            assert len(group[1].seen) == 2
            assert await system.metric(f'retries_total{{role="{role}"}}') == 1
            legs = [seen.body for worker in other for seen in worker.seen]
            assert len({leg["bootstrap_room"] for leg in legs}) == len(legs)
            retried = [c for c in (await system.get("/calls")).json()["calls"] if c["attempts"] == 2]
            assert len(retried) == 1
            assert (await system.get("/workers")).json()["workers"]
            system.assert_idle()

    run(scenario())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_refused_connection_without_another_worker_is_503(role):
    async def scenario():
        async with running_system(poll_interval_s=30.0) as system:
            dead = system.prefill[0] if role == "prefill" else system.decode["planner"][0]
            alive = system.decode["planner"][0] if role == "prefill" else system.prefill[0]
            alive.behave = "hang"
            await dead.stop()
            answer = await system.chat()
            assert answer.status == 503
            assert dead.url in answer.error
            assert answer.headers["Retry-After"] == "1"
            if alive.seen:
                await until(lambda: alive.aborted == [alive.seen[0].body["rid"]])
            # The next one is answered at once, and nothing is sent anywhere.
            sent = len(alive.seen)
            again = await system.chat()
            assert again.status == 503 and "refused a connection" in again.error
            assert len(alive.seen) == sent

    run(scenario())


def test_an_error_is_not_tried_again():
    async def scenario():
        async with running_system(prefill=2) as system:
            for worker in system.prefill:
                worker.behave = "die"
            system.decode["planner"][0].behave = "hang"
            assert (await system.chat()).status == 502
            assert sum(len(worker.seen) for worker in system.prefill) == 1

    run(scenario())


# ------------------------------------------------------------------------------------------------- routing


def test_the_models_of_a_session_share_a_prefill_worker():
    async def scenario():
        async with running_system(prefill=3) as system:
            messages = [{"role": "user", "content": "plan this: " + "x" * 600}]
            for turn, model in enumerate(["planner", "coder", "planner", "coder"]):
                await system.chat(model, messages=messages)
                messages = [*messages, {"role": "assistant", "content": f"answer {turn} " + "y" * 300}]
            used = [worker for worker in system.prefill if worker.seen]
            assert [len(worker.seen) for worker in used] == [4]
            reasons = [call["decision"] for call in (await system.get("/calls")).json()["calls"]]
            assert reasons == ["least_loaded", "prefix", "prefix", "prefix"]
            assert await system.metric('decisions_total{reason="prefix",role="prefill"}') == 3

    run(scenario())


@pytest.mark.parametrize("how", ["header", "user"])
def test_a_session_key_sticks_to_its_prefill_worker(how):
    async def scenario():
        async with running_system(prefill=2) as system:
            for i in range(6):
                content = [{"role": "user", "content": f"{i} unlike the others"}]
                if how == "header":
                    await system.chat(messages=content, headers={"X-SMG-Routing-Key": "s"})
                else:
                    await system.chat(messages=content, user="s")
            assert sorted(len(worker.seen) for worker in system.prefill) == [0, 6]

    run(scenario())


def test_load_overrides_stickiness_and_the_session_moves():
    async def scenario():
        from sglang_prefillshare.routing.config import PolicyConfig

        policy = PolicyConfig(load_margin_tokens=100)
        async with running_system(prefill=2, policy=policy) as system:
            await system.chat(user="s")
            home = next(worker for worker in system.prefill if worker.seen)
            other = next(worker for worker in system.prefill if worker is not home)
            home.behave = "hang"
            big = asyncio.create_task(system.chat(user="s", messages=[{"role": "user", "content": "z" * 4000}]))
            await until(lambda: len(home.seen) == 2)
            await system.chat(user="s")
            assert len(other.seen) == 1
            assert (await system.last_call())["decision"] == "load"
            big.cancel()
            await asyncio.gather(big, return_exceptions=True)
            await system.chat(user="s")
            assert len(other.seen) == 2
            assert (await system.last_call())["decision"] == "session"

    run(scenario())


def test_decode_requests_spread_over_a_modules_workers():
    async def scenario():
        async with running_system(decode={"planner": 2}) as system:
            first, second = system.decode["planner"]
            first.behave = second.behave = "slow:0.2"
            await asyncio.gather(*(system.chat() for _ in range(4)))
            assert (len(first.seen), len(second.seen)) == (2, 2)

    run(scenario())


def test_a_slow_client_of_one_call_does_not_hold_another():
    async def scenario():
        async with running_system() as system:
            prefill = system.prefill[0]
            prefill.behave = "slow:0.3"
            slow = asyncio.create_task(system.chat())
            await prefill.arrived.wait()
            prefill.behave = "ok"
            async with asyncio.timeout(0.25):
                assert (await system.chat("coder")).status == 200
            assert (await slow).status == 200

    run(scenario())


def test_a_rid_with_line_breaks_cannot_write_headers():
    async def scenario():
        async with running_system() as system:
            answer = await system.chat(rid="a\r\nSet-Cookie: x=é")
            assert answer.status == 200
            assert answer.headers["X-Request-Id"] == "a%0D%0ASet-Cookie%3A%20x%3D%C3%A9"
            assert "Set-Cookie" not in answer.headers
            assert system.decode["planner"][0].seen[0].body["rid"] == "a\r\nSet-Cookie: x=é"

    run(scenario())


def test_large_bodies_and_large_answers_pass():
    async def scenario():
        async with running_system(max_body_bytes=3_000_000) as system:
            answer = await system.post("/generate", {"model": "coder", "input_ids": list(range(200_000))})
            assert answer.status == 200
            assert len(system.prefill[0].seen[0].body["input_ids"]) == 200_000
            answer = await system.post("/generate", {"model": "coder", "text": "x" * 3_000_001})
            assert answer.status == 413

    run(scenario())


def test_after_a_storm_of_failures_and_departures_nothing_is_held():
    async def scenario():
        rng = random.Random(7)
        async with running_system(prefill=2, decode={"planner": 2, "coder": 1}, request_timeout_s=1.0) as system:
            statuses = []

            async def one(i):
                await asyncio.sleep(rng.random() * 0.2)
                for worker in system.workers:
                    kinds = ["ok"] * 6 + ["bad", "broken", "die", "slow:0.02", "hang", "die_mid_stream", "die_mid_body"]
                    worker.behave = rng.choice(kinds)
                call = system.chat(rng.choice(["planner", "coder"]), stream=rng.random() < 0.5, user=f"u{i % 5}")
                try:
                    async with asyncio.timeout(0.1 if rng.random() < 0.2 else 5):
                        statuses.append((await call).status)
                except TimeoutError:
                    statuses.append(None)

            await asyncio.gather(*(one(i) for i in range(120)))
            assert len(statuses) == 120
            assert 200 in statuses
            assert set(statuses) <= {200, 400, 500, 502, 503, 504, None}
            await until(lambda: system.router.pool.leg_count == 0)
            await until(lambda: len(system.server.server_state.tasks) == 0)
            system.assert_idle()
            for model in ("planner", "coder"):
                assert await system.metric(f'inflight_requests{{model="{model}"}}') == 0
            for worker in system.workers:
                worker.behave = "ok"
            assert (await system.chat()).body == WHOLE

    run(scenario())
