"""Measures one point on servers that run: values in, values out. Who shows and keeps them is `bench.py`'s to say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from sglang_prefillshare.errors import WorkerError
from sglang_prefillshare.workloads.config import Limits
from sglang_prefillshare.workloads.driver import PointSamples, run_point
from sglang_prefillshare.workloads.points import Point
from sglang_prefillshare.workloads.session import Session, Step, Words
from sglang_prefillshare.workloads.watch import Counters, Loads, Watch

_WARM_UP_PROMPT_TOKENS: Final = 96
_WARM_UP_ANSWER_TOKENS: Final = 4


@dataclass(frozen=True, slots=True)
class Servers:
    """A topology that runs: where each agent is asked, and who looks at it. `are_adapters`: agents are asked for by
    SGLang's name of an adapter."""

    urls: Mapping[str, str]
    watch: Watch
    are_adapters: bool = False


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a point found. `counters` are of the point alone, up to the moment when all workers were idle again, which
    took `drain_s` after its last call. `trouble` says why that moment did not come; then the counters are zero, and the
    servers are not to be asked again."""

    samples: PointSamples
    counters: Counters
    loads: Loads
    drain_s: float | None
    trouble: str | None = None


async def measure(
    point: Point,
    servers: Servers,
    *,
    limits: Limits,
    load_poll_s: float,
    on_progress: Callable[[PointSamples, int], None] = lambda samples, active: None,
    on_drain: Callable[[str], None] = lambda left: None,
) -> Measurement:
    """Ask the point's sessions on empty caches, and leave idle workers behind.

    A point that takes longer than `limits.point_s` is cut: what is running is aborted, and waited for as long as there
    is less of it. `on_progress` is told of calls and sessions that ended, `on_drain` of what is still running then.
    Raises `WorkerError` when the workers cannot be asked to begin with.
    """
    watch = servers.watch
    watch.check()
    await watch.flush(limits.idle_s)
    before = await watch.counters()
    loads = Loads()
    on_progress(PointSamples(), 0)
    async with _polled(watch, loads, load_poll_s):
        samples = await run_point(
            point.sessions,
            point.arrivals_s,
            urls=servers.urls,
            are_adapters=servers.are_adapters,
            max_sessions=point.max_sessions,
            request_timeout_s=limits.request_s,
            point_timeout_s=limits.point_s,
            on_progress=on_progress,
        )
    try:
        watch.check()
        grace_s = 0.0 if samples.is_cut else limits.idle_s
        drain_s = await watch.drain(grace_s=grace_s, stuck_s=limits.stuck_s, on_wait=on_drain)
        counters = (await watch.counters()).since(before)
    except WorkerError as error:
        return Measurement(samples, before.since(before), loads, None, str(error))
    return Measurement(samples, counters, loads, drain_s)


@contextlib.asynccontextmanager
async def _polled(watch: Watch, loads: Loads, interval_s: float) -> AsyncIterator[None]:
    polling = asyncio.create_task(watch.poll_loads(loads, interval_s))
    try:
        yield
    finally:
        polling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await polling


async def warm_up(servers: Servers, *, session_count: int, token_ids: tuple[int, int], limits: Limits) -> None:
    """Every agent, by several sessions at once: first requests compile, connect and shake hands.

    Raises `WorkerError` if one of them is not answered in the time that a worker may take to become ready.
    """
    words = Words(seed=-1, token_ids=token_ids)
    sessions = [
        Session(
            f"warm-up-{index}",
            words.draw(f"warm-up-{index}", _WARM_UP_PROMPT_TOKENS),
            0,
            (tuple(Step(agent, _WARM_UP_ANSWER_TOKENS) for agent in servers.urls),),
        )
        for index in range(session_count)
    ]
    samples = await run_point(
        sessions,
        [0.0] * session_count,
        urls=servers.urls,
        are_adapters=servers.are_adapters,
        max_sessions=session_count,
        request_timeout_s=limits.ready_s,
        point_timeout_s=limits.ready_s,
    )
    errors = sorted({call.answer.error or "" for call in samples.calls if not call.is_ok})
    if errors or samples.is_cut:
        raise WorkerError(f"it does not answer: {'; '.join(errors)[:1000] or 'the warm-up took too long'}.")
