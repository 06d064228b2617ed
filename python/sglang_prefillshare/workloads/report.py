"""From samples to rows and a summary: pure functions. Field names are those of SGLang's bench_serving where it has one.

docs/benchmark.md describes every field.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sglang_prefillshare.workloads.driver import CallSample, PointSamples
from sglang_prefillshare.workloads.session import unique_context_tokens
from sglang_prefillshare.workloads.watch import STAGE, Counters, Loads

Row = dict[str, Any]

PERCENTILES: Final = (90, 95, 99)


def point_row(samples: PointSamples, counters: Counters, loads: Loads) -> Row:
    """Everything one point found, without what the point was."""
    done = [call for call in samples.calls if call.is_ok]
    failed = [call for call in samples.calls if not call.is_ok]
    output_tokens = sum(len(call.answer.token_ids) for call in done)
    input_tokens = sum(call.prompt_tokens for call in done)
    duration_s = samples.duration_s
    sessions = samples.sessions
    complete = [session for session in sessions if session.is_complete]
    e2e_s = [call.answer.e2e_s for call in done]
    turns_s = [end - start for s in sessions for start, end in zip(s.turn_starts_s, s.turn_ends_s, strict=False)]
    row: Row = {
        "duration": duration_s,
        "completed": len(done),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / duration_s,
        "input_throughput": input_tokens / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_throughput": (input_tokens + output_tokens) / duration_s,
        **spread_ms("e2e_latency", e2e_s),
        **spread_ms("ttft", [call.answer.ttft_s for call in done if call.answer.ttft_s is not None]),
        **spread_ms("tpot", [tpot for call in done if (tpot := _tpot_s(call)) is not None]),
        **spread_ms("itl", [gap for call in done for gap in call.answer.itls_s]),
        "concurrency": sum(e2e_s) / duration_s,
        "max_concurrent_requests": _peak_overlap(samples.calls),
        # What bench_serving has not:
        "sessions": len(sessions),
        "sessions_completed": len(complete),
        "session_throughput": len(complete) / duration_s,
        "max_active_sessions": samples.max_active_sessions,
        **spread_ms("session_latency", [_after(s.arrived_s, s.ended_s) for s in complete]),
        **spread_ms("session_service", [_after(s.admitted_s, s.ended_s) for s in complete]),
        **spread_ms("turn_latency", turns_s),
        "failed": len(failed),
        "timeouts": sum(call.answer.is_timeout for call in failed),
        "sessions_failed": sum(session.error is not None for session in sessions),
        "sessions_unfinished": sum(session.ended_s is None for session in sessions),
        "is_cut": samples.is_cut,
        "errors": sorted({call.answer.error for call in failed if call.answer.error is not None})[:5],
        **cache_fields(samples, counters),
        **server_fields(counters, loads),
    }
    return row


def cache_fields(samples: PointSamples, counters: Counters) -> Row:
    """Which prompt tokens were found, and for whom they had been computed; what was computed more than once.

    With a router the counts are prefill's own, as the router adds them up; without one they are the answers'.
    """
    done = [call for call in samples.calls if call.is_ok]
    if counters.router:
        prompt = counters.router["prompt_tokens"]
        cached = counters.router["cached_tokens"]
        other = counters.router["cross_model_cached_tokens"]
    else:
        prompt = float(sum(call.prompt_tokens for call in done))
        cached = float(sum(call.answer.cached_tokens or 0 for call in done))
        other = 0.0
    unique = unique_context_tokens([(s.session, s.longest_prompt) for s in samples.sessions])
    computed = prompt - cached
    return {
        "prompt_tokens": round(prompt),
        "cached_tokens": round(cached),
        "computed_tokens": round(computed),
        "unique_context_tokens": unique,
        "hit_ratio": _ratio(cached, prompt),
        "hit_ratio_own_model": _ratio(cached - other, prompt),
        "hit_ratio_other_model": _ratio(other, prompt),
        "computed_ratio": _ratio(computed, prompt),
        # What was computed for calls that a cut point aborted has no context to be set against.
        "recompute_factor": None if samples.is_cut else _ratio(computed, unique),
    }


def server_fields(counters: Counters, loads: Loads) -> Row:
    """What the servers counted, by side."""
    row: Row = {}
    for side, values in counters.by_side.items():
        row[f"{side}_evicted_tokens"] = round(values["evicted_tokens"])
        row[f"{side}_retracted_requests"] = round(values["retracted_requests"])
    ours = _total(counters, "handoffs")
    theirs = _total(counters, "sglang_transfers")
    if ours:
        row |= {
            "handoffs": round(ours),
            "handoff_bytes": round(_total(counters, "handoff_bytes")),
            "handoff_ms": 1000 * _total(counters, "handoff_s") / ours,
        }
    elif theirs:
        row |= {
            "handoffs": round(theirs),
            "handoff_bytes": round(_total(counters, "sglang_transfer_mib") * 2**20),
            "handoff_ms": _total(counters, "sglang_transfer_ms") / theirs,
        }
    else:
        row |= {"handoffs": 0, "handoff_bytes": 0, "handoff_ms": None}
    row |= {
        "transfer_failures": round(_total(counters, "transfer_failures")),
        "router_overhead_ms": None,
        "prefix_predicted": None,
        "prefix_prediction_error": None,
        "peak_kv_tokens": dict(sorted(loads.peak_tokens.items())),
        "peak_kv_usage": {name: round(value, 4) for name, value in sorted(loads.peak_usage.items())},
        "load_polls": loads.polls,
        "load_polls_missed": loads.misses,
        "cpu_s": {side: round(value, 2) for side, value in counters.cpu_s.items()},
        "stage_ms": {side: stage_means(values) for side, values in counters.by_side.items()},
    }
    if counters.router.get("router_calls"):
        row["router_overhead_ms"] = 1000 * counters.router["router_overhead_s"] / counters.router["router_calls"]
    if found := counters.router.get("found_tokens"):
        row["prefix_predicted"] = round(counters.router["predicted_tokens"] / found, 4)
        row["prefix_prediction_error"] = round(counters.router["prediction_error_tokens"] / found, 4)
    return row


def stage_means(counters: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds that a request spent in each of a side's stages, mean of those that went through it."""
    names = [name.removeprefix(STAGE).removesuffix("/n") for name in counters if name.endswith("/n")]
    return {
        name: round(1000 * counters[f"{STAGE}{name}/s"] / counters[f"{STAGE}{name}/n"], 2)
        for name in sorted(names)
        if counters[f"{STAGE}{name}/n"] > 0
    }


def _total(counters: Counters, name: str) -> float:
    return sum(values[name] for values in counters.by_side.values())


def call_sample(call: CallSample) -> Row:
    """One call as the samples file keeps it."""
    answer = call.answer
    return {
        "session": call.session,
        "turn": call.turn,
        "call": call.call,
        "agent": call.agent,
        "started_s": round(call.started_s, 4),
        "prompt_tokens": call.prompt_tokens,
        "output_tokens": len(answer.token_ids),
        "cached_tokens": answer.cached_tokens,
        "ttft_ms": None if answer.ttft_s is None else round(1000 * answer.ttft_s, 2),
        "e2e_latency_ms": round(1000 * answer.e2e_s, 2),
        "itls_ms": [round(1000 * gap, 2) for gap in answer.itls_s],
        "error": answer.error,
    }


def spread_ms(name: str, values_s: Sequence[float]) -> Row:
    """`mean_…_ms`, `median_…_ms` and so on; `None` where there is no value."""
    values = [1000 * value for value in values_s]
    row: Row = {
        f"mean_{name}_ms": statistics.fmean(values) if values else None,
        f"median_{name}_ms": statistics.median(values) if values else None,
        f"std_{name}_ms": statistics.pstdev(values) if values else None,
    }
    return row | {f"p{share}_{name}_ms": percentile(values, share) for share in PERCENTILES}


def percentile(values: Sequence[float], share: float) -> float | None:
    """Linear between neighbours, as numpy's; `None` for no values."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _tpot_s(call: CallSample) -> float | None:
    tokens, ttft_s = len(call.answer.token_ids), call.answer.ttft_s
    return None if tokens < 2 or ttft_s is None else (call.answer.e2e_s - ttft_s) / (tokens - 1)


def _peak_overlap(calls: Iterable[CallSample]) -> int:
    """How many calls were in flight at once, at most."""
    edges = sorted(edge for call in calls for edge in ((call.started_s, 1), (call.started_s + call.answer.e2e_s, -1)))
    peak = now = 0
    for _, change in edges:
        now += change
        peak = max(peak, now)
    return peak


def _after(start_s: float | None, end_s: float | None) -> float:
    assert start_s is not None and end_s is not None
    return end_s - start_s


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# ---- the summary -------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Row]) -> Row:
    """By workload: at each arrival rate the ratios of stock SGLang and ours, at each cap the cache's numbers.

    `ratios` are by our topology, `against` the one of `COUNTERPARTS`. A ratio is of two runs of the same repeat, which
    saw the same sessions one after the other; above 1 is better for ours. `values` has each repeat's, `median`, `min`
    and `max` are over them. Times of a cut point are left out: they are those of the calls that were fast enough. Its
    throughput counts.
    """
    found: Row = {}
    for workload in _distinct(rows, "workload"):
        of_workload = [_without_times(row) if row.get("is_cut") else row for row in rows if row["workload"] == workload]
        points = [_point(of_workload, rate, cap) for rate, cap in _points(of_workload)]
        found[workload] = {
            "points": points,
            "by_rate": [_best_cap(points, rate) for rate in dict.fromkeys(point["request_rate"] for point in points)],
        }
    return found


def _without_times(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in _TIMES}


def _points(rows: Sequence[Row]) -> list[tuple[Any, int]]:
    return list(dict.fromkeys((row["request_rate"], row["max_sessions"]) for row in rows))


def _point(rows: Sequence[Row], rate: Any, cap: int) -> Row:
    here = [row for row in rows if (row["request_rate"], row["max_sessions"]) == (rate, cap)]
    by_topology = {name: [r for r in here if r["topology"] == name] for name in _distinct(here, "topology")}
    point: Row = {"request_rate": rate, "max_sessions": cap}
    point["ratios"] = {}
    for ours, stock in _compared(by_topology):
        shared, isolated = by_topology[ours], by_topology[stock]
        point["ratios"][ours] = {
            "against": stock,
            "p95_e2e_ratio": _paired(isolated, shared, "p95_e2e_latency_ms"),
            "p95_session_ratio": _paired(isolated, shared, "p95_session_latency_ms"),
            "median_e2e_ratio": _paired(isolated, shared, "median_e2e_latency_ms"),
            "median_ttft_ratio": _paired(isolated, shared, "median_ttft_ms"),
            "throughput_ratio": _paired(shared, isolated, "output_throughput"),
        }
    point["topologies"] = {name: _medians(found) for name, found in by_topology.items()}
    return point


COUNTERPARTS: Final[Mapping[str, str]] = {"shared": "isolated", "unified": "stock_lora", "shared_lora": "stock_lora"}
"""What stock SGLang serves the same models with."""


def _compared(topologies: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(ours, stock) of those that were run."""
    return [(ours, stock) for ours, stock in COUNTERPARTS.items() if ours in topologies and stock in topologies]


_TIMES: Final = (
    *("p95_e2e_latency_ms", "median_e2e_latency_ms", "p95_session_latency_ms", "median_ttft_ms", "mean_ttft_ms"),
    *("p95_ttft_ms", "mean_itl_ms"),
)
_IN_SUMMARY: Final = (
    *_TIMES,
    *("output_throughput", "total_throughput", "request_throughput"),
    *("session_throughput", "hit_ratio", "hit_ratio_own_model", "hit_ratio_other_model", "recompute_factor"),
    *("prefill_evicted_tokens", "decode_evicted_tokens", "colocated_evicted_tokens"),
    *("prefill_retracted_requests", "decode_retracted_requests", "handoff_bytes", "handoff_ms"),
    *("failed", "sessions_unfinished", "duration"),
)


def _medians(rows: Sequence[Row]) -> Row:
    medians = {name: spread(values) for name in _IN_SUMMARY if (values := _values(rows, name))}
    return {"cut": sum(bool(row.get("is_cut")) for row in rows), **medians}


def _values(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def spread(values: Sequence[float]) -> Row:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": [round(value, 6) for value in values],
    }


def _paired(above: Sequence[Row], below: Sequence[Row], name: str) -> Row | None:
    """The ratio in each repeat that has both; `None` without any."""
    lower = {row["repeat"]: row[name] for row in below if row.get(name)}
    values = [row[name] / lower[row["repeat"]] for row in above if row.get(name) and row["repeat"] in lower]
    return spread(values) if values else None


def _best_cap(points: Sequence[Row], rate: Any) -> Row:
    """Each topology at its best cap for this rate, as the paper's Figure 3 does; ratios are of medians."""
    here = [point for point in points if point["request_rate"] == rate]
    best: Row = {"request_rate": rate, "ratios": {}, "topologies": {}}
    for name in dict.fromkeys(name for point in here for name in point["topologies"]):
        candidates = [point for point in here if name in point["topologies"]]
        chosen = max(candidates, key=lambda point: _goodness(point["topologies"][name]))
        best["topologies"][name] = {"max_sessions": chosen["max_sessions"], **chosen["topologies"][name]}
    both = best["topologies"]
    for ours, stock in _compared(both):
        best["ratios"][ours] = {
            "against": stock,
            "p95_e2e_ratio": _over(both, stock, ours, "p95_e2e_latency_ms"),
            "throughput_ratio": _over(both, ours, stock, "output_throughput"),
        }
    return best


def _goodness(found: Row) -> tuple[float, float]:
    """More tokens a second; among equals, a lower p95."""
    return (_median(found, "output_throughput") or 0.0, -(_median(found, "p95_e2e_latency_ms") or math.inf))


def _median(found: Row, name: str) -> float | None:
    value: float | None = found[name]["median"] if name in found else None
    return value


def _over(both: Mapping[str, Row], above: str, below: str, name: str) -> float | None:
    upper, lower = _median(both[above], name), _median(both[below], name)
    return upper / lower if upper is not None and lower else None


def _distinct(rows: Iterable[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))
