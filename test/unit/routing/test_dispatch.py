"""The two legs of a request: pairing, bytes, and both-or-neither in every order of failure."""

import asyncio
import contextlib
import dataclasses
import gc
import json
import random

import pytest

from sglang_prefillshare.protocol import MODULE_HEADER
from sglang_prefillshare.routing.attempt import AttemptEnd
from sglang_prefillshare.routing.config import PolicyConfig
from sglang_prefillshare.routing.endings import LegEnd
from sglang_prefillshare.routing.failures import LegFailure
from sglang_prefillshare.routing.policy import home
from sglang_prefillshare.routing.request import ClientRequest
from test.unit.routing.routing_harness import (
    STREAM,
    TRANSFER_FAILED,
    WHOLE,
    another_router,
    run,
    running_system,
    until,
)

TRANSFER_FAILED_MESSAGE = json.loads(TRANSFER_FAILED)["error"]["message"]


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
                wanted = {
                    "object": "error",
                    "message": "no",
                    "type": "invalid_request_error",
                    "param": None,
                    "code": 400,
                }
                assert answer.json() == {"error": wanted}
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


@pytest.mark.parametrize("prefill_workers", [1, 2])
def test_prefill_failing_after_decode_streamed_ends_the_stream(prefill_workers):
    async def scenario():
        async with running_system(prefill=prefill_workers) as system:
            system.prefill[0].behave, system.decode["planner"][0].behave = "slow:60", "hang_after_first"
            async with system.http.post(
                system.url + "/generate", json={"model": "planner", "text": "x", "stream": True}
            ) as response:
                assert await response.content.readany() == STREAM[0]
                await system.prefill[0].stop()
                rest = await response.read()
            assert json.loads(rest.removeprefix(b"data: "))["error"]["code"] in (502, 503)
            await until(lambda: system.decode["planner"][0].aborted != [])
            assert len(system.decode["planner"][0].seen) == (await system.last_call())["attempts"] == 1
            system.assert_idle()

    run(scenario())


@pytest.mark.parametrize("prefill_workers", [1, 2])
def test_prefill_failing_after_the_whole_answer_changes_nothing(prefill_workers):
    async def scenario():
        async with running_system(prefill=prefill_workers, drain_timeout_s=0.1) as system:
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
            decode = system.decode["planner"][0]
            await system.post("/generate", {"model": "planner", "text": ["a", "b"], "rid": ["r-a", "r-b"]})
            await until(lambda: len(decode.aborted) == 2 and decode.aborted == decode.seen[0].body["rid"])

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


@pytest.mark.parametrize(("retries", "status"), [(0, 503), (1, 503), (2, 200)])
def test_every_worker_that_refuses_is_marked_and_retries_are_a_setting(retries, status):
    async def scenario():
        async with running_system(prefill=3, poll_interval_s=30.0, retries=retries) as system:
            system.decode["planner"][0].behave = "slow:0.1"
            dead = [system.prefill[0], system.prefill[2]]  # equals take turns: these are asked before the other
            for worker in dead:
                await worker.stop()
            assert (await system.chat()).status == status
            assert (await system.last_call())["attempts"] == retries + 1
            lost = [system.router.pool[worker.url].lost for worker in dead]
            assert lost == ["refused a connection", "refused a connection" if retries else None]
            system.assert_idle()

    run(scenario())


def test_a_leg_that_fails_as_the_deadline_passes_is_not_tried_again():
    """The failure of a leg can take the cancellation with it that the deadline has sent."""

    async def scenario():
        async with running_system(prefill=2, request_timeout_s=0.2) as system:

            async def fails_late(attempt, receive):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(10)
                attempt.placed.release()
                failure = LegFailure(attempt.prefill_worker, LegEnd.BROKEN, 502, "broke")
                return AttemptEnd(LegEnd.BROKEN, LegEnd.LEFT, failure)

            system.router.dispatcher._legs.run = fails_late
            assert (await system.chat()).status == 504
            call = await system.last_call()
            assert (call["outcome"], call["attempts"]) == ("timeout", 1)
            system.assert_idle()

    run(scenario())


@pytest.mark.parametrize("how", ["breaks off", "goes down"])
def test_the_deadline_of_a_call_that_was_tried_again_is_a_timeout_too(how):
    """What ended the first pair of legs must not be taken for somebody's cancellation of the second."""

    async def scenario():
        async with running_system(prefill=2, request_timeout_s=2.0, poll_timeout_s=0.1) as system:
            decode = system.decode["planner"][0]
            urls = [worker.url for worker in system.prefill]
            for worker in (*system.prefill, decode):
                worker.behave = "hang"
                if worker.url == home("s", urls):
                    worker.script = ["die"] if how == "breaks off" else []
                    worker.info_behave = "hang" if how == "goes down" else "ok"
            answer = await system.chat(user="s")
            assert answer.status == 504 and "2 s" in answer.error
            call = await system.last_call()
            assert (call["outcome"], call["attempts"]) == ("timeout", 2)
            await until(lambda: decode.aborted == [seen.body["rid"] for seen in decode.seen])
            system.assert_idle()

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_after_the_whole_answer_is_no_timeout(stream):
    async def scenario():
        async with running_system(request_timeout_s=0.4, drain_timeout_s=5.0) as system:
            system.prefill[0].behave = "hang"
            answer = await system.chat(stream=stream)
            assert (answer.status, answer.body) == (200, b"".join(STREAM) if stream else WHOLE)
            await until(lambda: bool(system.router.calls.find()))
            call = await system.last_call()
            assert (call["outcome"], call["status"], call["error"]) == ("ok", 200, None)
            system.assert_idle()

    run(scenario())


async def assert_prefilled_again(system, answer, *, stream):
    """The call was answered by a second pair, and the first left nothing behind."""
    first, second = system.prefill
    decode = system.decode["planner"][0]
    assert (answer.status, answer.body) == (200, b"".join(STREAM) if stream else WHOLE)
    assert len(first.seen) == len(second.seen) == 1
    old, new = (seen.body for seen in decode.seen)
    assert old["bootstrap_room"] != new["bootstrap_room"] == second.seen[0].body["bootstrap_room"]
    assert new["rid"] == second.seen[0].body["rid"]
    assert not new["rid"].startswith(old["rid"]), "SGLang aborts by prefix"
    assert set(decode.aborted) <= {old["rid"]}
    call = await system.last_call()
    assert (call["outcome"], call["attempts"], call["prefill_worker"]) == ("ok", 2, second.url)
    assert call["worker_rids"] == [new["rid"]]
    assert await system.metric('retries_total{role="prefill"}') == 1
    system.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["die", "die_mid_body", "broken_then_silent", "stopped", "down"])
def test_a_lost_prefill_leg_is_replaced_once_with_its_decode_leg(how, stream):
    async def scenario():
        async with running_system(prefill=2, decode={"planner": 1}, loss_wait_s=3.0, poll_timeout_s=0.3) as system:
            urls = [worker.url for worker in system.prefill]
            system.prefill.sort(key=lambda worker: worker.url != home("s", urls))
            first, decode = system.prefill[0], system.decode["planner"][0]
            first.script = ["hang" if how in ("stopped", "down") else how]
            decode.script = ["hang"]
            client = asyncio.create_task(system.chat(stream=stream, user="s"))
            await asyncio.gather(first.arrived.wait(), decode.arrived.wait())
            if how == "stopped":
                await first.stop()
            if how == "down":
                first.info_behave = "hang"
            await assert_prefilled_again(system, await client, stream=stream)
            await until(lambda: decode.aborted == [decode.seen[0].body["rid"]])
            first.script = ["die"]
            assert (await system.chat(user="s")).status == 200
            assert len(system.prefill[1].seen) == 2, "the session has moved"

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("order", ["prefill ends first", "decode fails first", "decode fails first, prefill is silent"])
def test_the_end_of_prefill_and_what_decode_says_of_it_may_come_in_either_order(order, stream):
    async def scenario():
        async with running_system(
            prefill=2, decode={"planner": 1}, loss_wait_s=3.0, poll_timeout_s=0.3, poll_misses_until_down=1000
        ) as system:
            first, decode = system.prefill[0], system.decode["planner"][0]
            first.script = ["hang"]
            decode.script = ["hang" if order == "prefill ends first" else "transfer_failed"]
            client = asyncio.create_task(system.chat(stream=stream))
            await asyncio.gather(first.arrived.wait(), decode.arrived.wait())
            if order != "prefill ends first":
                await asyncio.sleep(0.1)
                assert not client.done()
            if order == "decode fails first, prefill is silent":
                first.info_behave = "hang"
            else:
                await first.stop()
            await assert_prefilled_again(system, await client, stream=stream)

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_transfer_from_a_prefill_worker_that_lives_is_decodes_error(stream):
    async def scenario():
        async with running_system(prefill=2, decode={"planner": 1}, drain_timeout_s=0.1, poll_timeout_s=5.0) as system:
            first, decode = system.prefill[0], system.decode["planner"][0]
            first.behave, decode.behave = "hang", "transfer_failed"
            answer = await system.chat(stream=stream)
            assert answer.status == 500 and TRANSFER_FAILED_MESSAGE in answer.error
            await until(lambda: first.aborted == [first.seen[0].body["rid"]])
            await until(lambda: system.router.pool.leg_count == 0)
            assert len(decode.seen) == (await system.last_call())["attempts"] == 1
            assert not system.prefill[1].seen

    run(scenario())


def test_a_prefill_worker_that_answers_polls_again_is_not_lost():
    async def scenario():
        async with running_system(prefill=2, poll_misses_until_down=1000) as system:
            worker = system.router.pool.prefill[0]
            system.prefill[0].info_behave = "503"
            await until(lambda: worker.misses > 0)
            system.prefill[0].info_behave = "ok"
            await until(lambda: worker.misses == 0)
            system.prefill[0].behave, system.decode["planner"][0].behave = "hang", "transfer_failed"
            assert TRANSFER_FAILED_MESSAGE in (await system.chat()).error
            assert not system.prefill[1].seen

    run(scenario())


def test_a_worker_at_which_nobody_listens_is_sent_nothing_more_after_one_poll():
    async def scenario():
        async with running_system(poll_misses_until_down=1000) as system:
            worker = system.router.pool.decode["planner"][0]
            await system.decode["planner"][0].stop()
            await until(lambda: not worker.is_ready)
            await system.decode["planner"][0].start()
            await until(lambda: worker.is_ready)
            assert (await system.chat()).status == 200

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_transfer_after_prefill_answered_is_told_at_once(stream):
    async def scenario():
        async with running_system(prefill=2, decode={"planner": 1}, loss_wait_s=60.0) as system:
            system.decode["planner"][0].behave = "transfer_failed"
            async with asyncio.timeout(3):
                assert (await system.chat(stream=stream)).status == 500
            assert not system.prefill[1].seen

    run(scenario())


@pytest.mark.parametrize(
    ("prefill_behave", "decode_behave", "status"),
    [
        ("bad", "hang", 400),
        ("broken", "hang", 500),
        ("hang", "bad", 400),
        ("hang", "broken", 500),
        ("hang", "die", 502),
    ],
)
def test_other_errors_are_not_tried_again(prefill_behave, decode_behave, status):
    async def scenario():
        async with running_system(prefill=2, decode={"planner": 2}) as system:
            for worker in system.prefill:
                worker.behave = prefill_behave
            for worker in system.decode["planner"]:
                worker.behave = decode_behave
            assert (await system.chat()).status == status
            assert sum(len(worker.seen) for worker in system.prefill) == 1
            assert sum(len(worker.seen) for worker in system.decode["planner"]) == 1
            assert (await system.last_call())["attempts"] == 1
            system.assert_idle()

    run(scenario())


def test_another_error_of_decode_does_not_wait_for_prefill():
    async def scenario():
        async with running_system(prefill=2, loss_wait_s=60.0) as system:
            system.prefill[0].behave, system.decode["planner"][0].behave = "hang", "broken"
            async with asyncio.timeout(3):
                assert (await system.chat()).status == 500

    run(scenario())


def test_prefill_is_not_lost_twice():
    async def scenario():
        async with running_system(prefill=3) as system:
            for worker in system.prefill:
                worker.behave = "die"
            system.decode["planner"][0].behave = "hang"
            answer = await system.chat()
            assert answer.status == 502 and "prefill worker" in answer.error
            assert sorted(len(worker.seen) for worker in system.prefill) == [0, 1, 1]
            call = await system.last_call()
            assert (call["outcome"], call["attempts"]) == ("worker_failed", 2)
            await until(lambda: len(system.decode["planner"][0].aborted) == 2)
            system.assert_idle()

    run(scenario())


def test_without_another_ready_prefill_worker_the_loss_is_told():
    async def scenario():
        async with running_system(prefill=2, loss_wait_s=60.0) as system:
            await system.prefill[1].stop()
            await until(lambda: not system.router.pool.prefill[1].is_ready)
            first, decode = system.prefill[0], system.decode["planner"][0]
            decode.behave = "hang"
            for behave, status in (("die", 502), ("broken", 500)):
                first.behave = behave
                assert (await system.chat()).status == status
            first.behave, decode.behave = "hang", "transfer_failed"
            assert TRANSFER_FAILED_MESSAGE in (await system.chat()).error
            assert [call["attempts"] for call in (await system.get("/calls")).json()["calls"]] == [1, 1, 1]
            assert await system.metric('retries_total{role="prefill"}') == 0

    run(scenario())


@pytest.mark.parametrize("how", ["client leaves", "deadline", "router stops"])
@pytest.mark.parametrize(("first", "decode"), [("broken", "hang"), ("hang", "transfer_failed")])
def test_the_wait_for_a_loss_ends_with_the_call(how, first, decode):
    async def scenario():
        limit_s = 0.5 if how == "deadline" else 60.0
        async with running_system(prefill=2, loss_wait_s=60.0, request_timeout_s=limit_s) as system:
            system.prefill[0].behave, system.decode["planner"][0].behave = first, decode
            client = asyncio.create_task(system.chat())
            await asyncio.gather(system.prefill[0].arrived.wait(), system.decode["planner"][0].arrived.wait())
            await asyncio.sleep(0.1)
            assert not client.done()
            if how == "client leaves":
                client.cancel()
                await asyncio.gather(client, return_exceptions=True)
                await until(lambda: system.router.pool.leg_count == 0)
                assert (await system.last_call())["outcome"] == "disconnected"
            elif how == "deadline":
                assert (await client).status == 504
            else:
                system.router.dispatcher.stop()
                assert (await client).status == 503
            assert not system.prefill[1].seen
            system.assert_idle()

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


def placed(system) -> dict[str, set[tuple[str, str]]]:
    """By session, the workers that its prompts, "i unlike the others", went to: of prefill and of decode."""
    found: dict[str, set[tuple[str, str]]] = {}
    for worker in system.workers:
        for seen in worker.seen:
            found.setdefault(seen.body["user"], set()).add((worker.info.role, worker.url))
    return found


@pytest.mark.parametrize(
    ("policy", "is_reversed"),
    [(PolicyConfig(), False), (PolicyConfig(session_margin=16, home_margin=16), True)],
    ids=["after a restart, in the same order", "another router, in another order"],
)
def test_a_router_that_does_not_know_a_session_sends_it_where_its_kv_is(policy, is_reversed):
    """Else each of 12 sessions would find its workers again in one case of six."""

    async def scenario():
        async with running_system(prefill=3, decode={"planner": 2}, policy=policy) as system:
            sessions = [f"session {i}" for i in range(12)]

            async def ask(router) -> None:
                for session in sessions[::-1] if is_reversed and router is not system else sessions:
                    content = [{"role": "user", "content": f"{session} unlike the others"}]
                    assert (await router.chat(messages=content, user=session)).status == 200

            await ask(system)
            before = placed(system)
            assert all(len(workers) == 2 for workers in before.values())
            assert len({worker for workers in before.values() for worker in workers}) >= 3, "not all on one pair"
            async with another_router(system) as other:
                await ask(other)
                assert await other.metric('decisions_total{reason="new_session",role="prefill"}') == 12
            assert placed(system) == before

    run(scenario())


def test_load_overrides_stickiness_and_the_session_moves():
    async def scenario():
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


def test_tokens_that_prefill_is_expected_to_hold_are_no_load():
    """A long context that is in the worker's tree costs what its new tokens cost: its session has no reason to move."""

    async def scenario():
        policy = PolicyConfig(load_margin_tokens=100)
        async with running_system(prefill=2, policy=policy) as system:
            context = [{"role": "user", "content": "z" * 4000}]
            await system.chat(user="s", messages=context)
            home = next(worker for worker in system.prefill if worker.seen)
            assert (await system.last_call())["matched_tokens"] == 0
            home.behave = "hang"
            again = asyncio.create_task(system.chat(user="s", messages=context))
            await until(lambda: len(home.seen) == 2)
            in_flight = next(worker for worker in system.router.pool.prefill if worker.legs).inflight_tokens
            assert 0 < in_flight < 100
            home.behave = "ok"
            await system.chat(user="s", messages=context)
            assert len(home.seen) == 3
            again.cancel()
            await asyncio.gather(again, return_exceptions=True)

    run(scenario())


def test_a_conversation_stays_on_the_decode_worker_that_holds_its_prompts():
    async def scenario():
        async with running_system(decode={"planner": 3, "coder": 2}) as system:
            messages = [{"role": "user", "content": "plan this: " + "x" * 600}]
            for model in ("planner", "coder") * 3:
                assert (await system.chat(model, messages=messages)).status == 200
                messages = [*messages, {"role": "assistant", "content": "y" * 300}]
            for group in system.decode.values():
                assert sorted(len(worker.seen) for worker in group)[-2:] == [0, 3]
            calls = (await system.get("/calls")).json()["calls"]
            assert [call["decode_decision"] for call in calls] == ["least_loaded"] * 2 + ["prefix"] * 4
            assert calls[0]["decode_matched_tokens"] == 0 < calls[2]["decode_matched_tokens"]
            assert await system.metric('decisions_total{reason="prefix",role="decode"}') == 4

    run(scenario())


def test_a_session_key_sticks_to_its_decode_worker_of_each_module():
    async def scenario():
        async with running_system(decode={"planner": 2, "coder": 2}) as system:
            for i in range(4):
                for model in ("planner", "coder"):
                    await system.chat(model, messages=[{"role": "user", "content": f"{i} unlike"}], user="s")
            for group in system.decode.values():
                assert sorted(len(worker.seen) for worker in group) == [0, 4]
            assert await system.metric('decisions_total{reason="session",role="decode"}') == 6

    run(scenario())


def test_an_overloaded_decode_worker_is_left_and_the_session_moves():
    async def scenario():
        async with running_system(decode={"planner": 2}, policy=PolicyConfig(load_margin_requests=1)) as system:
            await system.chat(user="s")
            home = next(worker for worker in system.decode["planner"] if worker.seen)
            other = next(worker for worker in system.decode["planner"] if worker is not home)
            home.behave = "hang"
            busy = [asyncio.create_task(system.chat(user="s")) for _ in range(2)]
            await until(lambda: len(home.seen) == 3)
            await system.chat(user="s")
            assert len(other.seen) == 1
            assert (await system.last_call())["decode_decision"] == "load"
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)
            await system.chat(user="s")
            assert len(other.seen) == 2
            assert (await system.last_call())["decode_decision"] == "session"

    run(scenario())


def test_a_decode_worker_that_restarts_is_expected_to_hold_nothing():
    async def scenario():
        async with running_system(decode={"planner": 2}) as system:
            messages = [{"role": "user", "content": "x" * 2000}]
            await system.chat(messages=messages)
            home = next(worker for worker in system.decode["planner"] if worker.seen)
            assert system.router.index.block_count(home.url) > 0
            await home.stop()
            await until(lambda: not system.router.pool[home.url].is_ready)
            await home.start()
            await until(lambda: system.router.pool[home.url].is_ready)
            assert system.router.index.block_count(home.url) == 0

    run(scenario())


def test_decode_requests_spread_over_a_modules_workers():
    async def scenario():
        async with running_system(decode={"planner": 2}) as system:
            first, second = system.decode["planner"]
            first.behave = second.behave = "slow:60"  # none ends before the last is placed, however slow the machine
            calls = [asyncio.create_task(system.chat()) for _ in range(4)]
            await until(lambda: len(first.seen) + len(second.seen) == 4)
            for call in calls:
                call.cancel()
            assert (len(first.seen), len(second.seen)) == (2, 2)

    run(scenario())


def test_a_slow_client_of_one_call_does_not_hold_another():
    async def scenario():
        async with running_system() as system:
            prefill = system.prefill[0]
            prefill.behave = "slow:2"
            slow = asyncio.create_task(system.chat())
            await prefill.arrived.wait()
            prefill.behave = "ok"
            assert (await system.chat("coder")).status == 200
            assert not slow.done()
            assert (await slow).status == 200

    run(scenario())


def test_a_rid_with_line_breaks_cannot_write_headers():
    async def scenario():
        async with running_system() as system:
            answer = await system.chat(rid="a\r\nSet-Cookie: x=é")
            assert answer.status == 200
            assert answer.headers["X-Request-Id"] == "a%0D%0ASet-Cookie%3A%20x%3D%C3%A9"
            assert "Set-Cookie" not in answer.headers

    run(scenario())


def test_large_bodies_and_large_answers_pass():
    async def scenario():
        async with running_system(max_body_bytes=3_000_000) as system:
            batch = [list(range(8_000))] * 25
            answer = await system.post("/generate", {"model": "coder", "input_ids": batch})
            assert answer.status == 200
            assert system.prefill[0].seen[0].body["input_ids"] == batch
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
            # On a machine that stands still for a moment connections time out, and breakers open.
            await until(lambda: all(one.is_ready and not one.breaker.is_shut for one in system.router.pool))
            assert (await system.chat()).body == WHOLE

    run(scenario())


# ------------------------------------------------------------------------ whose ids, and answers that are none


def ids_of(answer, *, stream):
    lines = answer.body.split(b"\n\n") if stream else [b"data: " + answer.body]
    parsed = [json.loads(line[6:]) for line in lines if line.startswith((b"data: {", b"data: [{"))]
    items = [item for entry in parsed for item in (entry if isinstance(entry, list) else [entry])]
    return [item["meta_info"]["id"] for item in items]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"text": "a", "rid": "session-42"}, ["session-42"]),
        ({"text": "a", "rid": 'quoted "é" \\ \n'}, ['quoted "é" \\ \n']),
        ({"text": ["a", "b"], "rid": ["x", "xy"]}, ["x", "xy"]),
        ({"text": ["a", "b"], "rid": "batch"}, ["batch_0", "batch_1"]),
    ],
)
def test_answers_carry_the_clients_ids_and_legs_carry_ours(body, wanted, stream):
    async def scenario():
        async with running_system() as system:
            decode = system.decode["planner"][0]
            decode.behave = "echo"
            answer = await system.post("/generate", {"model": "planner", "stream": stream, **body})
            assert answer.status == 200
            assert ids_of(answer, stream=stream) == (wanted * 2 if stream else wanted)
            legs = decode.seen[0].body["rid"]
            assert legs == system.prefill[0].seen[0].body["rid"]
            for leg in legs if isinstance(legs, list) else [legs]:
                assert len(leg) == 32 and leg not in wanted

    run(scenario())


def test_two_requests_of_one_rid_are_both_served_under_ids_of_their_own():
    async def scenario():
        async with running_system() as system:
            decode = system.decode["planner"][0]
            decode.behave = "echo"
            both = [system.post("/generate", {"model": "planner", "text": "a", "rid": "same"}) for _ in range(2)]
            answers = await asyncio.gather(*both)
            assert [ids_of(answer, stream=False) for answer in answers] == [["same"]] * 2
            first, second = (seen.body["rid"] for seen in decode.seen)
            assert first != second

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ({"type": "abort", "message": "Abort in /srv/models/x/y.py"}, 503),
        ({"type": "abort", "message": "too long", "status_code": 400}, 400),
    ],
)
def test_an_answer_that_ends_with_an_abort_is_an_error(reason, status, stream):
    async def scenario():
        async with running_system() as system:
            decode = system.decode["planner"][0]
            decode.behave, decode.finish_reason = "echo", reason
            answer = await system.post("/generate", {"model": "planner", "text": "a", "stream": stream})
            if stream:
                assert answer.status == 200 and b"[DONE]" not in answer.body
                *_, last, end = answer.body.split(b"\n\n")
                assert end == b"" and json.loads(last.removeprefix(b"data: "))["error"]["code"] == status
            else:
                assert answer.status == status
                assert "before it was whole" in answer.error and "/srv" not in answer.error
            assert (await system.last_call())["outcome"] == ("worker_refused" if status == 400 else "worker_failed")
            system.assert_idle()

    run(scenario())


def test_an_encoded_body_is_refused_by_name():
    async def scenario():
        async with running_system() as system:
            body = {"model": "planner", "text": "a"}
            answer = await system.post("/generate", body, headers={"content-encoding": "x-odd"})
            assert answer.status == 415 and "encoded as x-odd" in answer.error

    run(scenario())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input_ids": [5, 999999, 7]}, "input_ids[1] is 999999, wanted a token id from 0 to 511"),
        ({"input_ids": [5] * 9000}, "context length of 8192"),
        ({"text": "x" * 90_000}, "context length of 8192"),
        ({"text": "x", "sampling_params": {"stop_token_ids": [99999999]}}, "a token id from 0 to 511"),
        ({"text": ["x", "y"], "top_logprobs_num": [1, 2**63]}, "[1] of top_logprobs_num"),
        ({"text": ["x", "y"], "sampling_params": [{}]}, "2 of them"),
        ({"text": "x", "disagg_prefill_dp_rank": 5}, "disagg_prefill_dp_rank"),
        ({"text": "x", "encoder_urls": ["http://127.0.0.1:1"]}, "between themselves"),
    ],
)
def test_what_the_workers_cannot_index_or_hold_stops_at_the_door(body, words):
    async def scenario():
        async with running_system() as system:
            for fake in system.workers:
                fake.info = dataclasses.replace(fake.info, vocab_size=512, max_prompt_bytes=80_000)
            await until(lambda: system.router.pool.limits("planner").vocab_size == 512)
            answer = await system.post("/generate", {"model": "planner", **body})
            assert answer.status == 400 and words in answer.error
            assert not any(fake.seen for fake in system.workers)

    run(scenario())


def test_arrays_inside_arrays_are_refused_and_not_a_failure_of_ours():
    async def scenario():
        async with running_system() as system:
            for depth in (200, 3_000, 100_000):
                raw = b'{"model": "planner", "messages": ' + b"[" * depth + b"]" * depth + b"}"
                answer = await system.post("/v1/chat/completions", raw)
                assert answer.status == 400 and "deep" in answer.error, answer

    run(scenario())


def test_what_a_served_request_held_is_freed_without_the_garbage_collector():
    """Prompts are large, and a cycle among the objects of a call would keep them until the next full collection."""

    async def scenario():
        async with running_system(poll_interval_s=30.0) as system:
            for stream in (False, True):
                await system.chat(stream=stream)
            gc.collect()
            gc.disable()
            try:
                for stream in (False, True) * 5:
                    assert (await system.chat(stream=stream)).status == 200
                await until(lambda: sum(isinstance(held, ClientRequest) for held in gc.get_objects()) <= 1)
            finally:
                gc.enable()

    run(scenario())
