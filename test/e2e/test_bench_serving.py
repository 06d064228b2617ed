"""The benchmark in miniature through real servers: what it claims of both topologies holds, whatever the times are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.workloads.bench import run_benchmark
from sglang_prefillshare.workloads.config import load_benchmark

CONFIG = Path(__file__).parents[2] / "benchmark" / "serving" / "smoke.yaml"
pytestmark = pytest.mark.nixl


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("nixl", reason="waits for the packages nixl and nixl-cu13: run `make setup`")
    out = tmp_path_factory.mktemp("bench")
    return run_benchmark(load_benchmark(CONFIG, out=str(out))).parent


@pytest.fixture(scope="module")
def rows(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def calls(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / "samples.jsonl").read_text().splitlines()]


def points(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["workload"], row["request_rate"], row["max_sessions"])
        found.setdefault(key, {})[row["topology"]] = row
    return found


def test_everything_was_answered_on_both_sides(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 8
    for row in rows:
        assert (row["failed"], row["sessions_unfinished"], row["is_cut"]) == (0, 0, False), row["errors"]
        assert row["transfer_failures"] == 0 and row["handoffs"] == row["completed"] > 0
        assert row["config"]["seed"] == 0 and row["environment"]["versions"]["sglang"]
        assert row["dtype"] == "float32" and row["environment"]["device"]["instruction_sets"]


def test_both_topologies_saw_the_same_sessions(calls: list[dict[str, Any]]) -> None:
    def seen(topology: str) -> list[tuple[Any, ...]]:
        names = ("workload", "request_rate", "max_sessions", "session", "turn", "call", "agent")
        keys = (*names, "prompt_tokens", "output_tokens")
        return sorted(tuple(call[key] for key in keys) for call in calls if call["topology"] == topology)

    assert seen("shared") == seen("isolated") != []


def test_shared_computes_each_context_once_and_isolated_once_per_model(
    rows: list[dict[str, Any]], calls: list[dict[str, Any]]
) -> None:
    for both in points(rows).values():
        shared, isolated = both["shared"], both["isolated"]
        assert shared["unique_context_tokens"] == isolated["unique_context_tokens"]
        assert shared["hit_ratio"] > isolated["hit_ratio"]
        assert shared["hit_ratio_other_model"] > 0.2 and isolated["hit_ratio_other_model"] == 0
        assert isolated["recompute_factor"] > 1.4
        # The prefix that all sessions share is computed by each of two prefill workers, and once more by a session
        # that begins while another's first prefill is still under way there. Nothing else is computed again.
        again = shared["computed_tokens"] - shared["unique_context_tokens"]
        cold = cold_sessions(calls, shared)
        assert 1 <= cold <= max(2, shared["max_sessions"])
        assert again <= 0.05 * shared["unique_context_tokens"] + (cold - 1) * shared_prefix_tokens(shared)


def cold_sessions(calls: list[dict[str, Any]], row: dict[str, Any]) -> int:
    """How many sessions of a row found less than half of the shared prefix at their first call."""
    names = ("topology", "workload", "request_rate", "max_sessions")
    first = [
        call for call in calls if call["turn"] == call["call"] == 0 and all(call[name] == row[name] for name in names)
    ]
    assert len(first) == len({call["session"] for call in first}) > 0
    return sum(call["cached_tokens"] < shared_prefix_tokens(row) / 2 for call in first)


def shared_prefix_tokens(row: dict[str, Any]) -> float:
    scale = {w["preset"]: w["length_scale"] for w in row["config"]["workloads"]}[row["workload"]]
    return {"react": 776, "reflexion": 798}[row["workload"]] * float(scale)


def test_the_report_is_written_with_its_pictures(results: Path) -> None:
    summary = json.loads((results / "summary.json").read_text())
    for workload in ("react", "reflexion"):
        for point in summary["workloads"][workload]["points"]:
            ratios = point["ratios"]["shared"]
            assert ratios["p95_e2e_ratio"]["median"] > 0 and ratios["throughput_ratio"]["median"] > 0
            assert point["topologies"]["shared"]["hit_ratio"]["median"] > 0
            assert point["topologies"]["isolated"]["recompute_factor"]["median"] > 1
    for name in ("figure3.png", "figure4.png"):
        assert (results / name).stat().st_size > 10_000
