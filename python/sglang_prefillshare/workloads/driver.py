"""Asks the sessions of one point: when they arrive, how many at a time, call after call; every wait has a deadline."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

from sglang_prefillshare.workloads.client import Answer, ask
from sglang_prefillshare.workloads.session import Session, Step


@dataclass(frozen=True, slots=True)
class CallSample:
    """One call that ended. `started_s` counts from the point's start."""

    session: str
    turn: int
    call: int
    agent: str
    prompt_tokens: int
    started_s: float
    answer: Answer

    @property
    def is_ok(self) -> bool:
        return self.answer.error is None


@dataclass(slots=True)
class SessionSample:
    """How one session went. Times in seconds from the point's start; `admitted_s` is when the cap let it in."""

    session: Session
    arrived_s: float
    admitted_s: float | None = None
    ended_s: float | None = None
    turn_ends_s: list[float] = field(default_factory=list)
    turn_starts_s: list[float] = field(default_factory=list)
    longest_prompt: int = 0
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        return self.ended_s is not None and self.error is None


@dataclass(slots=True)
class PointSamples:
    """All that a point saw. `is_cut` if its time was up before its sessions ended."""

    calls: list[CallSample] = field(default_factory=list)
    sessions: list[SessionSample] = field(default_factory=list)
    duration_s: float = 0.0
    is_cut: bool = False
    max_active_sessions: int = 0


class Cap:
    """Lets in so many sessions at a time, in the order of their arrival."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.active = 0
        self.peak = 0

    async def enter(self) -> None:
        if self._free:
            self._free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._hand_on()
                raise
        self.active += 1
        self.peak = max(self.peak, self.active)

    def leave(self) -> None:
        self.active -= 1
        self._hand_on()

    def _hand_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


async def run_point(
    sessions: Sequence[Session],
    arrivals_s: Sequence[float],
    *,
    urls: Mapping[str, str],
    are_adapters: bool = False,
    max_sessions: int,
    request_timeout_s: float,
    point_timeout_s: float,
    on_progress: Callable[[PointSamples, int], None] = lambda samples, active: None,
) -> PointSamples:
    """Run them all; what is unfinished when the point's time is up is cancelled and stays unfinished in the samples.

    `on_progress` is called whenever a call or a session ended, with what is known and how many sessions are active.
    """
    samples = PointSamples()
    cap = Cap(max_sessions)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)
    started = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - started

    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=2**20
    ) as client:

        async def ask_agent(session: Session, step: Step, context: list[int]) -> Answer:
            return await ask(
                client,
                urls[step.agent],
                agent=step.agent,
                is_adapter=are_adapters,
                session=session.name,
                prompt=context,
                answer_tokens=step.answer_tokens,
                timeout_s=request_timeout_s,
            )

        async def run(session: Session, arrival_s: float) -> None:
            await asyncio.sleep(max(0.0, arrival_s - now()))
            sample = SessionSample(session, arrived_s=arrival_s)
            samples.sessions.append(sample)
            await cap.enter()
            try:
                sample.admitted_s = now()
                await _run_session(sample, samples, ask_agent, now, lambda: on_progress(samples, cap.active))
                sample.ended_s = now()
            finally:
                cap.leave()
                on_progress(samples, cap.active)

        try:
            async with asyncio.timeout(point_timeout_s), asyncio.TaskGroup() as group:
                for session, arrival_s in zip(sessions, arrivals_s, strict=True):
                    group.create_task(run(session, arrival_s), name=session.name)
        except TimeoutError:
            samples.is_cut = True
        samples.duration_s = now()
    samples.max_active_sessions = cap.peak
    return samples


async def _run_session(
    sample: SessionSample,
    samples: PointSamples,
    ask_agent: Callable[[Session, Step, list[int]], Awaitable[Answer]],
    now: Callable[[], float],
    on_call: Callable[[], None],
) -> None:
    """Call after call, without a pause between them; the first failure ends the session."""
    session = sample.session
    context = list(session.prompt)
    for number, (turn, step) in enumerate(session.steps):
        if turn == len(sample.turn_starts_s):
            sample.turn_starts_s.append(now())
        started_s = now()
        answer = await ask_agent(session, step, context)
        samples.calls.append(CallSample(session.name, turn, number, step.agent, len(context), started_s, answer))
        on_call()
        if answer.error is not None:
            sample.error = answer.error
            return
        sample.longest_prompt = len(context)
        context = extend(context, step, answer)
        if _is_last_of_turn(session, number):
            sample.turn_ends_s.append(now())


def extend(context: Sequence[int], step: Step, answer: Answer) -> list[int]:
    """The next call's context: what was asked, what was answered, what was observed."""
    return [*context, *answer.token_ids, *step.observation]


def _is_last_of_turn(session: Session, number: int) -> bool:
    for steps in session.turns:
        if number < len(steps):
            return number == len(steps) - 1
        number -= len(steps)
    raise AssertionError("a call beyond the session's last")
