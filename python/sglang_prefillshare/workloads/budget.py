"""How long a benchmark will take on this machine, and what to do about it. Pure: measured values in, a decision out.

On a CPU most of a benchmark's time is products with weights, and most of the rest is starting workers. `machine.py`
measures a few of both; here they are multiplied by the tokens that the points will make workers compute. The factors
are those of the runs in docs/performance.md, and the estimate is good to about a third.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgspec

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads.config import Benchmark, Flag, TopologyName
from sglang_prefillshare.workloads.points import Point, points_of, turns_of

ROWS: Final = (1, 8, 64)
"""For how many rows products are measured: a lonely decode step, a full one, and what a call adds to a prompt."""

SCALES: Final = (1.0, 0.75, 0.5, 0.35, 0.25)
"""What lengths may be multiplied by. With still shorter ones SGLang's own work per call is most of what is measured."""

CPU_POOL_TOKENS: Final = 32_768
"""Where --max-total-tokens does not say it."""

# Of the run in docs/performance.md, "Where the milliseconds of a call go".
_PREFILL_OVER_PRODUCTS: Final = 1.4
_PREFILL_S_PER_CALL: Final = 0.008
_DECODE_OVER_PRODUCTS: Final = 1.25
_DECODE_S_PER_STEP: Final = 0.015
_BETWEEN_POINTS_S: Final = 3.0
_STARTS_TOGETHER: Final = 1.1
"""Workers that start together, one on each core, over one that starts alone: it has all cores for its processes."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured. `pass_s` has, by number of rows, the seconds that one core needs for all products of a forward
    pass; `start_s` is one worker's start while nothing else runs."""

    dtype: str
    pass_s: Mapping[int, float]
    start_s: float
    cores: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds for all of it, and how many of its points would be cut at `limits.point_s`."""

    total_s: float
    cut_points: int

    def __str__(self) -> str:
        cut = f" with {self.cut_points} points cut" if self.cut_points else ""
        return minutes(self.total_s) + cut


@dataclass(frozen=True, slots=True)
class Budget:
    """The decision: lengths are multiplied by `scale`, which takes `estimate`; `as_written` is without it."""

    scale: float
    estimate: Estimate
    as_written: Estimate
    machine: Machine

    def describe(self) -> dict[str, Any]:
        """As plain values, for results."""
        machine = asdict(self.machine) | {"pass_s": {str(rows): s for rows, s in self.machine.pass_s.items()}}
        return asdict(self) | {"machine": machine}


def decide(
    benchmark: Benchmark, machine: Machine, *, token_ids: tuple[int, int], is_forced: bool = False
) -> tuple[Benchmark, Budget]:
    """The benchmark with the longest lengths that keep `limits.total_s` and cut no point, or as it is if nothing is
    promised or `is_forced`. Raises `ConfigError` when none of `SCALES` does."""
    limit_s = benchmark.limits.total_s
    as_written = shortest = estimate(benchmark, machine, token_ids=token_ids)
    if limit_s is None or is_forced:
        return benchmark, Budget(1.0, as_written, as_written, machine)
    for scale in SCALES:
        fitted = scaled(benchmark, scale)
        shortest = estimate(fitted, machine, token_ids=token_ids)
        if shortest.total_s <= limit_s and not shortest.cut_points:
            return fitted, Budget(scale, shortest, as_written, machine)
    once = estimate(msgspec.structs.replace(benchmark, repeats=1), machine, token_ids=token_ids)
    raise ConfigError(
        f"on this machine the benchmark would take about {as_written}, or {shortest} with every length times "
        f"{SCALES[-1]:g}; limits.total_s allows {minutes(limit_s)}. {told(machine)} Run it all the same with --anyway; "
        f"once, with --repeats 1, it takes about {once}, or less with shorter lengths."
    )


def told(machine: Machine) -> str:
    """What was measured, in a sentence."""
    return (
        f"A forward pass of {ROWS[-1]} rows takes a core {1000 * machine.pass_s[ROWS[-1]]:.0f} ms in {machine.dtype}, "
        f"a worker's start {machine.start_s:.0f} s."
    )


def minutes(seconds: float) -> str:
    """As people say it."""
    whole = max(1, round(seconds / 60))
    return f"{whole} min" if whole < 120 else f"{whole // 60} h {whole % 60} min"


def scaled(benchmark: Benchmark, scale: float) -> Benchmark:
    """Every length times `scale`, and the KV pools with them, so that they hold as many sessions as before."""
    if scale == 1:
        return benchmark
    workloads = tuple(
        msgspec.structs.replace(workload, length_scale=workload.length_scale * scale)
        for workload in benchmark.workloads
    )
    reserved = benchmark.workers.reserved_tokens
    sets = {
        name: {key: _pool(key, value, scale, reserved) for key, value in flags.items()}
        for name, flags in msgspec.structs.asdict(benchmark.workers).items()
        if name.endswith("args")
    }
    return msgspec.structs.replace(
        benchmark, workloads=workloads, workers=msgspec.structs.replace(benchmark.workers, **sets)
    )


def _pool(key: str, value: Flag, scale: float, reserved: int) -> Flag:
    if key.replace("_", "-") != "max-total-tokens" or not isinstance(value, int):
        return value
    return reserved + round((value - reserved) * scale)


def estimate(benchmark: Benchmark, machine: Machine, *, token_ids: tuple[int, int]) -> Estimate:
    """Starts and points of all topologies and repeats."""
    agents = len(benchmark.models.names)
    worker_counts = {
        "shared": agents + (benchmark.workers.shared_prefill or agents),
        "isolated": 2 * agents,
        "colocated": agents,
        "unified": 1,
        "shared_lora": 1 + (benchmark.workers.shared_prefill or agents),
        "stock_lora": 1,
    }
    start_s = sum(
        _STARTS_TOGETHER * machine.start_s * -(-worker_counts[name] // machine.cores)
        for name, _ in turns_of(benchmark.topologies, benchmark.repeats)
    )
    points = [
        point
        for workload in benchmark.workloads
        for point in points_of(benchmark, workload, repeat=0, token_ids=token_ids)
    ]
    limit_s = benchmark.limits.point_s
    each_s = [point_s(benchmark, name, point, machine) for name in benchmark.topologies for point in points]
    asked_s = sum(min(limit_s, each) + _BETWEEN_POINTS_S for each in each_s)
    cut = sum(each > limit_s for each in each_s)
    return Estimate(start_s + benchmark.repeats * asked_s, benchmark.repeats * cut)


def point_s(benchmark: Benchmark, topology: TopologyName, point: Point, machine: Machine) -> float:
    """Seconds of one point, if nobody cuts it: as long as its arrivals take, or what a side of the workers computes."""
    agents = len(benchmark.models.names)
    active = min(point.max_sessions, len(point.sessions))
    calls = sum(session.call_count for session in point.sessions)
    answers = sum(session.answer_tokens for session in point.sessions)
    contexts = sum(session.prompt_lengths[-1] - session.shared_prefix_tokens for session in point.sessions)
    prompts = sum(sum(session.prompt_lengths) for session in point.sessions)
    computed = min(prompts, contexts * _recomputed(benchmark, topology, point, agents=agents, active=active))

    batch = max(1.0, min(float(ROWS[1]), active / agents))
    share = (batch - ROWS[0]) / (ROWS[1] - ROWS[0])
    step_s = machine.pass_s[ROWS[0]] * (1 - share) + machine.pass_s[ROWS[1]] * share
    prefill_s = computed * _PREFILL_OVER_PRODUCTS * machine.pass_s[ROWS[2]] / ROWS[2] + calls * _PREFILL_S_PER_CALL
    decode_s = answers * (_DECODE_OVER_PRODUCTS * step_s + _DECODE_S_PER_STEP) / batch

    workers = benchmark.workers
    if topology in ("unified", "stock_lora"):
        work_s = prefill_s + decode_s  # one process, which computes in one thread
    elif workers.prefill_cores and workers.decode_cores and topology != "colocated":
        work_s = max(prefill_s / len(workers.prefill_cores), decode_s / len(workers.decode_cores))
    else:
        work_s = (prefill_s + decode_s) / machine.cores
    last_s = (prefill_s + decode_s * batch) / len(point.sessions)  # one session, by itself
    return max(work_s, max(point.arrivals_s) + last_s)


def _recomputed(benchmark: Benchmark, topology: TopologyName, point: Point, *, agents: int, active: int) -> float:
    """How often a context is computed: once where it is shared, by each model where it is not, and again by each where
    a pool does not hold the sessions that are active. One of `stock_lora` holds those of all models."""
    if topology in ("shared", "unified", "shared_lora"):
        return 1.0
    pool = benchmark.workers.flags.get("max-total-tokens")
    room = pool if isinstance(pool, int) else CPU_POOL_TOKENS
    copies = agents if topology == "stock_lora" else 1
    holds_all = copies * active * max(session.total_tokens for session in point.sessions) <= room
    return 0.9 * agents if holds_all else 1.5 * agents
