"""Rows and summaries from samples whose numbers can be counted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.workloads.client import Answer
from sglang_prefillshare.workloads.driver import CallSample, PointSamples, SessionSample
from sglang_prefillshare.workloads.report import percentile, point_row, server_fields, summarise
from sglang_prefillshare.workloads.session import Session, Step
from sglang_prefillshare.workloads.watch import Counters, Loads

SIDE = dict.fromkeys(
    (
        *("evicted_tokens", "retracted_requests", "transfer_failures", "sglang_transfers", "sglang_transfer_mib"),
        *("sglang_transfer_ms", "handoffs", "handoff_bytes", "handoff_s"),
    ),
    0.0,
)


def call(number: int, *, started_s: float, e2e_s: float, tokens: int = 3, error: str | None = None) -> CallSample:
    arrivals = ((0.1, 1), (0.2, 1), (0.4, 2))[: tokens if tokens < 3 else 3]
    answer = Answer(token_ids=(1,) * tokens, cached_tokens=2, ttft_s=0.1, e2e_s=e2e_s, arrivals_s=arrivals, error=error)
    return CallSample("s", 0, number, "planner", 10 + 5 * number, started_s, answer)


def samples() -> PointSamples:
    session = Session("s", tuple(range(10)), 0, ((Step("planner", 3, (1, 2)), Step("coder", 3)),))
    other = Session("t", tuple(range(50, 60)), 0, ((Step("planner", 3),),))
    done = SessionSample(session, 0.5, 1.0, 4.0, [4.0], [1.0], longest_prompt=15)
    failed = SessionSample(other, 0.5, 1.0, 2.0, [], [1.0], error="503: no")
    waiting = SessionSample(other, 3.0)
    return PointSamples(
        calls=[
            call(0, started_s=1.0, e2e_s=1.0),
            call(1, started_s=2.0, e2e_s=2.0),
            call(0, started_s=1.5, e2e_s=0.1, tokens=0, error="503: no"),
        ],
        sessions=[done, failed, waiting],
        duration_s=4.0,
        is_cut=True,
        max_active_sessions=2,
    )


def counters(**router: float) -> Counters:
    prefill = {**SIDE, "evicted_tokens": 70.0, "sglang_transfers": 2.0, "sglang_transfer_mib": 3.0}
    decode = {**SIDE, "retracted_requests": 1.0}
    return Counters({"prefill": prefill, "decode": decode}, router, {"prefill": 1.234})


def test_a_row_has_bench_servings_fields_and_ours():
    loads = Loads()
    loads.note("base", 30, 0.25)
    loads.note("base", 20, 0.5)
    row = point_row(samples(), counters(prompt_tokens=25, cached_tokens=12, cross_model_cached_tokens=9), loads)
    assert (row["completed"], row["failed"], row["timeouts"]) == (2, 1, 0)
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (25, 6)
    assert (row["request_throughput"], row["output_throughput"], row["total_throughput"]) == (0.5, 1.5, 31 / 4)
    assert (row["mean_e2e_latency_ms"], row["p95_e2e_latency_ms"]) == (1500.0, 1950.0)
    assert row["median_ttft_ms"] == 100.0
    # Chunks of 1, 1 and 2 tokens at 0.1, 0.2 and 0.4 s: gaps of 100, 100 and 100 ms.
    assert (row["mean_itl_ms"], row["p99_itl_ms"]) == (pytest.approx(100), pytest.approx(100))
    assert row["mean_tpot_ms"] == pytest.approx((900 / 2 + 1900 / 2) / 2)
    assert (row["concurrency"], row["max_concurrent_requests"]) == (0.75, 2)
    assert (row["sessions"], row["sessions_completed"], row["sessions_failed"], row["sessions_unfinished"]) == (
        3,
        1,
        1,
        1,
    )
    assert row["median_session_latency_ms"] == 3500.0 and row["median_session_service_ms"] == 3000.0
    assert row["median_turn_latency_ms"] == 3000.0
    assert row["is_cut"] is True and row["errors"] == ["503: no"]
    assert (row["hit_ratio"], row["hit_ratio_own_model"], row["hit_ratio_other_model"]) == (12 / 25, 3 / 25, 9 / 25)
    assert row["unique_context_tokens"] == 15 and row["computed_tokens"] == 13
    assert row["recompute_factor"] is None, "of a point that was cut"
    assert (row["prefill_evicted_tokens"], row["decode_retracted_requests"]) == (70, 1)
    assert (row["handoffs"], row["handoff_bytes"]) == (2, 3 * 2**20)
    assert row["peak_kv_tokens"] == {"base": 30} and row["peak_kv_usage"] == {"base": 0.5}


def test_the_recompute_factor_is_of_what_one_cache_would_compute():
    whole = samples()
    whole.is_cut = False
    row = point_row(whole, counters(prompt_tokens=25, cached_tokens=12, cross_model_cached_tokens=9), Loads())
    assert row["recompute_factor"] == 13 / 15


def test_what_the_router_predicted_is_held_against_what_was_found():
    told = counters(predicted_tokens=90, found_tokens=100, prediction_error_tokens=30)
    row = server_fields(told, Loads())
    assert (row["prefix_predicted"], row["prefix_prediction_error"]) == (0.9, 0.3)
    assert server_fields(counters(), Loads())["prefix_predicted"] is None


def test_without_a_router_the_answers_say_what_was_found():
    row = point_row(samples(), counters(), Loads())
    assert (row["prompt_tokens"], row["cached_tokens"], row["hit_ratio_other_model"]) == (25, 4, 0.0)
    assert row["router_overhead_ms"] is None


def test_our_own_handoff_metrics_come_first():
    ours = {**SIDE, "handoffs": 4.0, "handoff_bytes": 1e6, "handoff_s": 0.02}
    row = point_row(
        samples(), Counters({"prefill": {**SIDE, "sglang_transfers": 9.0}, "decode": ours}, {}, {}), Loads()
    )
    assert (row["handoffs"], row["handoff_bytes"], row["handoff_ms"]) == (4, 1_000_000, 5.0)


def test_a_point_in_which_nothing_was_answered_has_no_latencies():
    row = point_row(PointSamples(duration_s=1.0), counters(), Loads())
    assert (row["completed"], row["p95_e2e_latency_ms"], row["hit_ratio"], row["recompute_factor"]) == (
        0,
        None,
        None,
        None,
    )


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.sampled_from((0, 50, 90, 95, 99, 100)))
def test_percentiles_are_numpys(values: list[float], share: int):
    assert percentile(values, share) == pytest.approx(float(np.percentile(values, share)), abs=1e-6)


def row(topology: str, repeat: int, *, rate: Any = 1.0, cap: int = 4, p95: float, tokens: float) -> dict[str, Any]:
    return {
        "topology": topology,
        "workload": "react",
        "request_rate": rate,
        "max_sessions": cap,
        "repeat": repeat,
        "p95_e2e_latency_ms": p95,
        "output_throughput": tokens,
        "hit_ratio": 0.5,
    }


def test_ratios_are_of_the_same_repeat_and_keep_their_spread():
    rows = [
        row("shared", 0, p95=100, tokens=40), row("isolated", 0, p95=300, tokens=10),
        row("isolated", 1, p95=800, tokens=20), row("shared", 1, p95=200, tokens=60),
        row("shared", 2, p95=100, tokens=50),
    ]  # fmt: skip
    [point] = summarise(rows)["react"]["points"]
    ratios = point["ratios"]["shared"]
    assert ratios["against"] == "isolated"
    assert ratios["p95_e2e_ratio"] == {"median": 3.5, "min": 3.0, "max": 4.0, "values": [3.0, 4.0]}
    assert ratios["throughput_ratio"]["values"] == [4.0, 3.0]
    assert point["topologies"]["shared"]["output_throughput"]["median"] == 50
    assert point["topologies"]["isolated"]["hit_ratio"]["values"] == [0.5, 0.5]


def test_each_rate_has_each_topology_at_its_own_best_cap():
    rows: Sequence[dict[str, Any]] = [
        row("shared", 0, cap=4, p95=100, tokens=40), row("shared", 0, cap=8, p95=150, tokens=60),
        row("isolated", 0, cap=4, p95=400, tokens=20), row("isolated", 0, cap=8, p95=900, tokens=15),
        row("shared", 0, cap=4, rate="inf", p95=1, tokens=1),
    ]  # fmt: skip
    best, at_once = summarise(rows)["react"]["by_rate"]
    assert best["topologies"]["shared"]["max_sessions"] == 8
    assert best["topologies"]["isolated"]["max_sessions"] == 4
    assert best["ratios"]["shared"] == {"against": "isolated", "p95_e2e_ratio": 400 / 150, "throughput_ratio": 3.0}
    assert at_once["request_rate"] == "inf" and not at_once["ratios"]


def test_adapters_are_compared_with_stock_adapters():
    rows = [
        row("shared", 0, p95=100, tokens=40), row("unified", 0, p95=50, tokens=80),
        row("stock_lora", 0, p95=200, tokens=20), row("shared_lora", 0, p95=100, tokens=60),
    ]  # fmt: skip
    [point] = summarise(rows)["react"]["points"]
    found = {
        name: (ratios["against"], ratios["throughput_ratio"]["median"]) for name, ratios in point["ratios"].items()
    }
    assert found == {"unified": ("stock_lora", 4.0), "shared_lora": ("stock_lora", 3.0)}


def test_a_ratio_without_its_other_half_is_absent():
    rows = [row("shared", 0, p95=100, tokens=40), row("isolated", 1, p95=300, tokens=10)]
    [point] = summarise(rows)["react"]["points"]
    assert point["ratios"]["shared"]["p95_e2e_ratio"] is None
    assert not summarise(rows[:1])["react"]["points"][0]["ratios"]


def test_times_of_a_cut_point_are_not_compared_and_its_throughput_is():
    rows = [
        row("shared", 0, p95=100, tokens=40), row("isolated", 0, p95=50, tokens=10) | {"is_cut": True},
        row("shared", 1, p95=200, tokens=60), row("isolated", 1, p95=600, tokens=20),
    ]  # fmt: skip
    found = summarise(rows)["react"]
    [point] = found["points"]
    ratios = point["ratios"]["shared"]
    assert ratios["p95_e2e_ratio"]["values"] == [3.0] and ratios["throughput_ratio"]["values"] == [4.0, 3.0]
    assert (point["topologies"]["isolated"]["cut"], point["topologies"]["shared"]["cut"]) == (1, 0)
    assert found["by_rate"][0]["ratios"]["shared"]["p95_e2e_ratio"] == 600 / 150
    [cut] = summarise([row("shared", 0, p95=1, tokens=0) | {"is_cut": True}])["react"]["by_rate"]
    assert "p95_e2e_latency_ms" not in cut["topologies"]["shared"]
