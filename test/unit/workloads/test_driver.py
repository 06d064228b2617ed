"""The driver against a small server that streams as SGLang does: what it asks, and what it does about failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from sglang_prefillshare.workloads.driver import Cap, PointSamples, run_point
from sglang_prefillshare.workloads.session import Session, Step

AGENTS = ("planner", "coder")


@dataclass
class Server:
    """Streams `answer_of(prompt)`, a token at a time, the whole answer in each event unless `is_incremental`."""

    delay_s: float = 0.0
    is_incremental: bool = False
    fail_on_call: int | None = None
    script: str = "ok"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    active: int = 0
    peak: int = 0
    url: str = ""

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.bodies.append(body)
        self.sessions.append(request.headers["x-smg-routing-key"])
        if self.fail_on_call == len(self.bodies):
            return web.json_response({"error": {"message": "no room"}}, status=503)
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            await asyncio.sleep(self.delay_s)
            prompt, wanted = body["input_ids"], body["sampling_params"]["max_new_tokens"]
            ids = answer_of(prompt, wanted - (self.script == "short"))
            for count in range(1, len(ids) + 1):
                meta = {"prompt_tokens": len(prompt) + (self.script == "lost"), "completion_tokens": count}
                shown = ids[count - 1 : count] if self.is_incremental else ids[:count]
                event = {"output_ids": shown, "meta_info": {**meta, "cached_tokens": 3}}
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if self.script != "cut":
                await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self.active -= 1


def answer_of(prompt: list[int], count: int) -> list[int]:
    return [(sum(prompt) + index) % 97 for index in range(count)]


@contextlib.asynccontextmanager
async def serving(server: Server) -> AsyncIterator[dict[str, str]]:
    app = web.Application()
    app.router.add_post("/generate", server.generate)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert runner.addresses
    try:
        yield dict.fromkeys(AGENTS, f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


def session(index: int, turns: int = 2) -> Session:
    steps = tuple(Step(agent, 3, (index, place)) for place, agent in enumerate(AGENTS))
    return Session(f"s{index}", (index, 50, 60, 70), 0, (steps,) * turns)


def run(server: Server, sessions: list[Session], **changes: Any) -> PointSamples:
    async def point() -> PointSamples:
        async with serving(server) as urls:
            settings: dict[str, Any] = {
                "urls": urls,
                "max_sessions": 8,
                "request_timeout_s": 5.0,
                "point_timeout_s": 10.0,
                **changes,
            }
            arrivals = settings.pop("arrivals", [0.0] * len(sessions))
            return await run_point(sessions, arrivals, **settings)

    return limited(point())


def limited(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(bounded())


@pytest.mark.parametrize("is_incremental", [False, True])
def test_each_context_is_the_last_one_with_its_real_answer_and_observation(is_incremental: bool):
    server = Server(is_incremental=is_incremental)
    samples = run(server, [session(1)])
    context = [1, 50, 60, 70]
    for number, body in enumerate(server.bodies):
        assert body["input_ids"] == context
        assert body["model"] == AGENTS[number % 2] and body["stream"] is True
        assert body["sampling_params"] == {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
        context = [*context, *answer_of(context, 3), 1, number % 2]
    assert server.sessions == ["s1"] * 4
    assert [call.prompt_tokens for call in samples.calls] == session(1).prompt_lengths
    [one] = samples.sessions
    assert one.is_complete and one.longest_prompt == session(1).prompt_lengths[-1]
    assert len(one.turn_starts_s) == len(one.turn_ends_s) == 2
    assert all(call.answer.cached_tokens == 3 and len(call.answer.arrivals_s) == 3 for call in samples.calls)
    assert not samples.is_cut


def test_no_more_sessions_than_the_cap_and_later_ones_wait_in_order():
    server = Server(delay_s=0.02)
    samples = run(server, [session(index) for index in range(6)], max_sessions=2)
    assert server.peak == samples.max_active_sessions == 2
    admitted = [one.admitted_s for one in samples.sessions]
    assert [one.session.name for one in samples.sessions] == [f"s{index}" for index in range(6)]
    assert admitted == sorted(admitted, key=lambda at: at or 0.0)
    assert samples.sessions[-1].admitted_s > 4 * 0.02 * 2


def test_sessions_arrive_when_they_are_said_to():
    samples = run(Server(), [session(0), session(1)], arrivals=[0.0, 0.3])
    assert samples.sessions[1].admitted_s > 0.29  # a loop's timers may ring a millisecond early
    assert samples.duration_s > 0.29


def test_a_call_that_fails_ends_its_session_and_no_other():
    server = Server(fail_on_call=2)
    samples = run(server, [session(0), session(1)], arrivals=[0.0, 0.2])
    failed = [call for call in samples.calls if not call.is_ok]
    assert len(failed) == 1 and failed[0].answer.error is not None and failed[0].answer.error.startswith("503: ")
    assert [one.is_complete for one in samples.sessions] == [False, True]
    assert samples.sessions[0].longest_prompt == 4
    assert len(server.bodies) == 2 + 4


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("short", "the answer has 2 tokens, wanted 3"),
        ("lost", "the server read 5 prompt tokens, 4 were sent"),
        ("cut", "the stream ended early"),
    ],
)
def test_an_answer_of_other_lengths_is_a_failure(script: str, complaint: str):
    samples = run(Server(script=script), [session(0)])
    assert [call.answer.error for call in samples.calls] == [complaint]


def test_a_request_has_a_deadline():
    samples = run(Server(delay_s=3.0), [session(0)], request_timeout_s=0.1)
    [call] = samples.calls
    assert call.answer.is_timeout and call.answer.error == "no whole answer within 0.1 s"
    assert samples.duration_s < 2.0


def test_a_point_that_takes_too_long_is_cut_and_leaves_nothing_running():
    server = Server(delay_s=0.15)
    samples = run(server, [session(index) for index in range(4)], max_sessions=1, point_timeout_s=0.5)
    assert samples.is_cut and samples.duration_s < 2.0
    assert 1 <= len(samples.calls) <= 4 and not any(one.is_complete for one in samples.sessions)
    assert server.active == 0


def test_a_server_that_is_not_there_is_a_failure():
    async def point() -> PointSamples:
        urls = dict.fromkeys(AGENTS, "http://127.0.0.1:9")
        return await run_point(
            [session(0)], [0.0], urls=urls, max_sessions=1, request_timeout_s=2.0, point_timeout_s=5.0
        )

    [call] = limited(point()).calls
    assert call.answer.error is not None and "ClientConnectorError" in call.answer.error


def test_a_cap_survives_those_who_leave_while_they_wait():
    async def scenario() -> None:
        cap = Cap(1)
        await cap.enter()
        waiting = [asyncio.create_task(cap.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        cap.leave()
        await asyncio.sleep(0.01)
        assert waiting[1].done() and not waiting[2].done() and cap.active == 1
        cap.leave()
        await waiting[2]
        cap.leave()
        assert cap.active == 0
        await cap.enter()

    limited(scenario())
