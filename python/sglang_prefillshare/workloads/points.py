"""A point: sessions of a workload at one arrival rate under one cap, in one repeat; and the order of the repeats.

Pure values, drawn from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads.arrivals import poisson_arrivals
from sglang_prefillshare.workloads.config import Benchmark, TopologyName, Workload
from sglang_prefillshare.workloads.presets import Shape, make_session, preset_shape
from sglang_prefillshare.workloads.session import Session, Words
from sglang_prefillshare.workloads.trace import load_trace


@dataclass(frozen=True, slots=True)
class Point:
    """What a topology is asked: `sessions[i]` arrives `arrivals_s[i]` seconds after the start."""

    workload: str
    request_rate: float | str
    """Sessions a second, as JSON can hold it: `inf` for all at once, `trace` for a trace's own arrivals."""
    max_sessions: int
    repeat: int
    sessions: tuple[Session, ...] = field(repr=False)
    arrivals_s: tuple[float, ...] = field(repr=False)


def points_of(benchmark: Benchmark, workload: Workload, *, repeat: int, token_ids: tuple[int, int]) -> list[Point]:
    """A workload's points in the order given, the same for every topology."""
    sessions = sessions_of(workload, benchmark.models.names, seed=benchmark.seed, repeat=repeat, token_ids=token_ids)
    points = []
    for rate, cap, count in workload.points:
        asked = sessions[:count]
        arrivals = arrivals_of(workload, asked, rate=rate, seed=benchmark.seed, repeat=repeat)
        points.append(Point(workload.label, _label(workload, rate), cap, repeat, tuple(asked), tuple(arrivals)))
    return points


def _label(workload: Workload, rate: float) -> float | str:
    if workload.trace_arrivals:
        return "trace"
    return "inf" if math.isinf(rate) else rate


def sessions_of(
    workload: Workload, agents: Sequence[str], *, seed: int, repeat: int, token_ids: tuple[int, int]
) -> list[Session]:
    """The sessions of one repeat, as many as its largest point has: other sessions in each repeat, the same on every
    topology, and the first of them at every point."""
    words = Words(seed=seed * 1_000_003 + repeat, token_ids=token_ids)
    count = max(sessions for _, _, sessions in workload.points)
    if workload.trace is not None:
        return load_trace(workload.trace, agents=agents, words=words, length_scale=workload.length_scale, limit=count)
    shape = shape_of(workload, agents)
    return [make_session(shape, workload=workload.label, index=index, words=words) for index in range(count)]


def shape_of(workload: Workload, agents: Sequence[str]) -> Shape:
    """A preset's lengths, with what the benchmark changes of them, scaled."""
    assert workload.preset is not None
    shape = preset_shape(workload.preset, agents, turns=workload.turns, shares_prefix=workload.shares_prefix)
    return Shape(
        agents=shape.agents,
        turns=shape.turns,
        shared_prefix_tokens=_either(workload.shared_prefix_tokens, shape.shared_prefix_tokens),
        own_prefix_tokens=shape.own_prefix_tokens,
        answer_tokens=_either(workload.answer_tokens, shape.answer_tokens),
        observation_tokens=_either(workload.observation_tokens, shape.observation_tokens),
    ).scaled(workload.length_scale)


def _either(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given


def arrivals_of(workload: Workload, sessions: Sequence[Session], *, rate: float, seed: int, repeat: int) -> list[float]:
    """When each session arrives. Raises `ConfigError` for a trace that is to say it and does not."""
    if workload.trace_arrivals:
        times = [session.arrival_s for session in sessions]
        if None in times:
            raise ConfigError(f"the trace {workload.trace} has no arrival_s. Leave trace_arrivals out.")
        return [time_s for time_s in times if time_s is not None]
    return poisson_arrivals(len(sessions), rate=rate, seed=f"{seed}/{workload.label}/{repeat}")


def turns_of(topologies: Sequence[TopologyName], repeats: int) -> list[tuple[TopologyName, list[int]]]:
    """Which topology runs when, and which repeats before it is ended: A0, B0 B1, A1 A2, B2 for two and three repeats.

    Repeats alternate, and each second one has the order turned around, so that neither side is always first, and the
    side that is up need not start again.
    """
    turns: list[tuple[TopologyName, list[int]]] = []
    for repeat in range(repeats):
        for name in topologies if repeat % 2 == 0 else tuple(reversed(topologies)):
            if turns and turns[-1][0] == name:
                turns[-1][1].append(repeat)
            else:
                turns.append((name, [repeat]))
    return turns
