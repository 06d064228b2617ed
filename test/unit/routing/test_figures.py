"""What is said of the last minutes, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_prefillshare.routing.figures import figures_of, percentile, summarize
from sglang_prefillshare.routing.telemetry import CallRecord, Outcome

PLAIN: dict[str, Any] = dict.fromkeys(CallRecord.__dataclass_fields__)


def call(model: str = "planner", at: float = 1000.0, **values: Any) -> CallRecord:
    plain = {"rid": "r", "worker_rids": (), "endpoint": "/generate", "attempts": 1, "e2e_ms": 50.0, "status": 200}
    return CallRecord(**PLAIN | plain | {"model": model, "started_at": at, "outcome": Outcome.OK} | values)


@pytest.mark.parametrize(
    ("values", "percent", "wanted"),
    [([], 50, None), ([7.0], 95, 7.0), ([3.0, 1.0, 2.0], 50, 2.0), ([1.0, 2.0], 50, 1.0)]
    + [([float(n) for n in range(1, 101)], p, float(p)) for p in (1, 50, 95, 100)],
)
def test_a_percentile_is_one_of_the_values(values: list[float], percent: float, wanted: float | None) -> None:
    assert percentile(values, percent) == wanted


def test_ratios_are_of_tokens_and_not_of_calls() -> None:
    found = figures_of(
        [
            call(prefill_tokens=100, cached_tokens=0, cross_model_cached_tokens=0),
            call(prefill_tokens=300, cached_tokens=200, cross_model_cached_tokens=100),
            call(outcome=Outcome.WORKER_FAILED, prefill_tokens=None),
        ]
    )
    assert (found.hit_ratio, found.cross_model_ratio, found.prefill_tokens) == (0.5, 0.25, 400)
    assert (found.calls, found.failed) == (3, 1)


def test_what_nobody_measured_is_nothing_and_not_zero() -> None:
    found = figures_of([call(outcome=Outcome.REJECTED)])
    assert (found.hit_ratio, found.cross_model_ratio, found.ttft_ms_p50, found.e2e_ms_p95) == (None,) * 4
    assert found.failed == 0, "the client's own mistake"


def test_times_are_of_the_answers_that_came_whole() -> None:
    found = figures_of(
        [
            call(ttft_ms=10.0, e2e_ms=100.0),
            call(ttft_ms=20.0, e2e_ms=200.0),
            call(ttft_ms=None, e2e_ms=300.0),
            call(ttft_ms=9000.0, e2e_ms=9000.0, outcome=Outcome.DISCONNECTED),
        ]
    )
    assert (found.ttft_ms_p50, found.ttft_ms_p95, found.e2e_ms_p50, found.e2e_ms_p95) == (10.0, 20.0, 200.0, 300.0)


def test_the_window_is_whole_steps_and_its_modules_are_the_served_ones() -> None:
    records = [
        call(at=939.9),  # before
        call(at=940.0, ttft_ms=5.0),
        call("coder", at=979.0, ttft_ms=7.0, prefill_tokens=10, cached_tokens=4, cross_model_cached_tokens=1),
        call(at=999.0, ttft_ms=9.0),
        call("nobody's", at=999.0),
    ]
    told = summarize(records, modules=["planner", "coder"], now_s=999.5, window_s=60, step_s=20)
    assert told["all"]["calls"] == 3
    assert {name: of["calls"] for name, of in told["modules"].items()} == {"planner": 2, "coder": 1}
    series = told["series"]
    assert series["times"] == [960, 980, 1000]
    assert series["ttft_ms_p50"] == {"planner": [5.0, None, 9.0], "coder": [None, 7.0, None]}
    assert (series["hit_ratio"], series["cross_model_ratio"]) == ([None, 0.4, None], [None, 0.1, None])


def test_a_call_of_this_very_moment_counts_and_one_of_the_future_does_not() -> None:
    told = summarize([call(at=1000.0), call(at=1001.0)], modules=["planner"], now_s=1000.0, window_s=20, step_s=10)
    assert told["all"]["calls"] == 0, "their step begins now"
    told = summarize([call(at=1000.0), call(at=1011.0)], modules=["planner"], now_s=1000.5, window_s=20, step_s=10)
    assert told["all"]["calls"] == 1
