"""How the last minutes went, by decode module, from the records of the calls. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from sglang_prefillshare.routing.telemetry import CallRecord, Outcome

WINDOW_S: Final = 300.0
STEP_S: Final = 10.0

_FAILED: Final = frozenset(
    {Outcome.UNAVAILABLE, Outcome.WORKER_FAILED, Outcome.TIMEOUT, Outcome.CANCELLED, Outcome.INTERNAL}
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of some calls. Times in ms; `None` is what no call has measured.

    `hit_ratio` is the share of the tokens that the base had to hold that were there already, `cross_model_ratio` the
    share that was there because it had been computed for another module. TTFT is known of streamed answers.
    """

    calls: int
    failed: int
    prefill_tokens: int
    hit_ratio: float | None
    cross_model_ratio: float | None
    ttft_ms_p50: float | None
    ttft_ms_p95: float | None
    e2e_ms_p50: float | None
    e2e_ms_p95: float | None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that is not less than `percent` of them (nearest rank)."""
    if not values:
        return None
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def figures_of(records: Sequence[CallRecord]) -> Figures:
    hit_ratio, cross_model_ratio = _ratios(records)
    ttft_ms = [record.ttft_ms for record in records if record.ttft_ms is not None and record.outcome is Outcome.OK]
    e2e_ms = [record.e2e_ms for record in records if record.outcome is Outcome.OK]
    return Figures(
        calls=len(records),
        failed=sum(record.outcome in _FAILED for record in records),
        prefill_tokens=sum(record.prefill_tokens or 0 for record in records),
        hit_ratio=hit_ratio,
        cross_model_ratio=cross_model_ratio,
        ttft_ms_p50=percentile(ttft_ms, 50),
        ttft_ms_p95=percentile(ttft_ms, 95),
        e2e_ms_p50=percentile(e2e_ms, 50),
        e2e_ms_p95=percentile(e2e_ms, 95),
    )


def summarize(
    records: Iterable[CallRecord],
    *,
    modules: Sequence[str],
    now_s: float,
    window_s: float = WINDOW_S,
    step_s: float = STEP_S,
) -> dict[str, Any]:
    """The calls that began within the window before `now_s` (seconds of the wall clock): all, by module, and over time.

    `series` has `times`, the ends of the steps in seconds, and by module the median TTFT of the calls that began in
    each, with None for a step without one; and likewise the hit ratio of all calls. Steps end at multiples of `step_s`,
    so that the same call is in the same step whenever one looks. Calls of no module of `modules` count for nobody.
    """
    last = -(-now_s // step_s)
    count = int(window_s // step_s)
    first = last - count
    known = set(modules)
    recent = [
        record for record in records if record.model in known and first * step_s <= record.started_at < last * step_s
    ]
    by_module: dict[str, list[CallRecord]] = {name: [] for name in modules}
    by_step: list[list[CallRecord]] = [[] for _ in range(count)]
    ttft_ms: dict[str, list[list[float]]] = {name: [[] for _ in range(count)] for name in modules}
    for record in recent:
        step = int(record.started_at // step_s - first)
        by_module[record.model].append(record)
        by_step[step].append(record)
        if record.ttft_ms is not None and record.outcome is Outcome.OK:
            ttft_ms[record.model][step].append(record.ttft_ms)
    ratios = [_ratios(records) for records in by_step]
    return {
        "window_s": window_s,
        "all": asdict(figures_of(recent)),
        "modules": {name: asdict(figures_of(found)) for name, found in by_module.items()},
        "series": {
            "times": [(first + place + 1) * step_s for place in range(count)],
            "ttft_ms_p50": {name: [percentile(values, 50) for values in steps] for name, steps in ttft_ms.items()},
            "hit_ratio": [hit for hit, _ in ratios],
            "cross_model_ratio": [cross for _, cross in ratios],
        },
    }


def _ratios(records: Sequence[CallRecord]) -> tuple[float | None, float | None]:
    """(hit ratio, cross-model ratio)."""
    tokens = sum(record.prefill_tokens or 0 for record in records)
    if not tokens:
        return None, None
    cached = sum(record.cached_tokens or 0 for record in records)
    return cached / tokens, sum(record.cross_model_cached_tokens or 0 for record in records) / tokens
