"""How long a benchmark takes: the estimate against runs that were measured, and what is decided from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads import bench
from sglang_prefillshare.workloads.bench import check_room
from sglang_prefillshare.workloads.budget import Machine, decide, estimate, minutes, point_s, scaled
from sglang_prefillshare.workloads.config import Benchmark, Workload, load_benchmark, parse_benchmark
from sglang_prefillshare.workloads.models import ModelFolders
from sglang_prefillshare.workloads.points import points_of

CONFIG = Path(__file__).parents[3] / "benchmark" / "serving" / "serving.yaml"
TOKEN_IDS = (260, 1792)

WITH_BFLOAT16 = Machine("bfloat16", {1: 0.006, 8: 0.011, 64: 0.036}, start_s=25, cores=2)
"""The machine of docs/performance.md: 61 rows in 35 ms, eight workers ready after some 100 s."""
WITH_AVX2 = Machine("float32", {1: 0.056, 8: 0.084, 64: 0.285}, start_s=40, cores=2)
"""Two cores of an AMD EPYC with AVX2 and no AVX-512, as `pass_seconds` measures them with nothing else running."""


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})


def serving(**changes: Any) -> Benchmark:
    return load_benchmark(CONFIG, **changes)


def point_times(machine: Machine) -> dict[tuple[str, Any, int], tuple[float, float]]:
    benchmark = serving()
    return {
        (point.workload, point.request_rate, point.max_sessions): (
            point_s(benchmark, "shared", point, machine),
            point_s(benchmark, "isolated", point, machine),
        )
        for workload in benchmark.workloads
        for point in points_of(benchmark, workload, repeat=0, token_ids=TOKEN_IDS)
    }


def sessions_in_a_pool(benchmark: Benchmark, workload: Workload) -> float:
    [session, *_] = points_of(benchmark, workload, repeat=0, token_ids=TOKEN_IDS)[0].sessions
    pool = benchmark.workers.flags["max-total-tokens"]
    assert isinstance(pool, int)
    return pool / session.total_tokens


def test_the_estimate_is_near_the_runs_that_were_measured():
    found = point_times(WITH_BFLOAT16)
    # 576 calls, one every 65 and 300 ms; 9,792 answer tokens at 289 and 67 a second (docs/performance.md).
    assert found["reflexion", 8, 48] == (pytest.approx(37, rel=0.2), pytest.approx(173, rel=0.2))
    assert found["react", 8, 48] == (pytest.approx(34, rel=0.2), pytest.approx(146, rel=0.2))
    whole = estimate(serving(), WITH_BFLOAT16, token_ids=TOKEN_IDS)
    assert whole.total_s == pytest.approx(35.6 * 60, rel=0.2) and whole.cut_points == 0


def test_a_machine_without_bfloat16_was_estimated_too():
    shared, isolated = point_times(WITH_AVX2)["reflexion", 8, 48]
    assert shared == pytest.approx(256, rel=0.2), "as it was measured there"
    assert isolated > 300, "none of its sessions was finished after 300 s"


def test_a_machine_that_keeps_the_time_runs_it_as_written():
    benchmark, budget = decide(serving(), WITH_BFLOAT16, token_ids=TOKEN_IDS)
    assert benchmark == serving() and budget.scale == 1
    assert budget.describe()["machine"]["pass_s"]["64"] == 0.036


def test_a_machine_that_is_a_little_slower_gets_shorter_lengths_and_pools_with_them():
    slower = Machine("bfloat16", {rows: 1.5 * s for rows, s in WITH_BFLOAT16.pass_s.items()}, start_s=30, cores=2)
    written = serving()
    benchmark, budget = decide(written, slower, token_ids=TOKEN_IDS)
    assert 0.25 <= budget.scale < 1
    assert budget.estimate.total_s <= 2700 < budget.as_written.total_s
    assert [w.length_scale for w in benchmark.workloads] == [w.length_scale * budget.scale for w in written.workloads]
    for before, after in zip(written.workloads, benchmark.workloads, strict=True):
        one, other = (sessions_in_a_pool(b, workload) for b, workload in ((written, before), (benchmark, after)))
        assert other == pytest.approx(one, rel=0.1), "a pool holds as many sessions"
        check_room(benchmark, points_of(benchmark, after, repeat=0, token_ids=TOKEN_IDS))
    assert benchmark.workers.flags["num-reserved-decode-tokens"] == 32


def test_a_machine_that_is_far_too_slow_is_told_so_and_how_to_go_on():
    with pytest.raises(ConfigError) as told:
        decide(serving(), WITH_AVX2, token_ids=TOKEN_IDS)
    message = str(told.value)
    assert "limits.total_s allows 45 min" in message and "points cut" in message
    assert "64 rows takes a core 285 ms in float32, a worker's start 40 s" in message
    assert "--anyway" in message and "--repeats 1" in message
    benchmark, budget = decide(serving(), WITH_AVX2, token_ids=TOKEN_IDS, is_forced=True)
    assert benchmark == serving() and budget.scale == 1 and budget.estimate.cut_points > 0


def test_nothing_promised_is_nothing_to_keep():
    unbound = msgspec.structs.replace(serving(), limits=msgspec.structs.replace(serving().limits, total_s=None))
    assert decide(unbound, WITH_AVX2, token_ids=TOKEN_IDS)[0] == unbound


def test_pools_are_scaled_however_they_are_spelled():
    text = """
models: {agents: [a], random: {}}
workloads: [{preset: react, sweeps: [{arrival_rates: [1], max_sessions: [1]}]}]
workers: {args: {max_total_tokens: 4512, page-size: 1}, decode_args: {max-total-tokens: 8512}}
"""
    half = scaled(parse_benchmark(text), 0.5).workers
    assert half.args == {"max_total_tokens": 512 + 2000, "page-size": 1}
    assert half.decode_args == {"max-total-tokens": 512 + 4000}


def test_times_are_said_as_people_say_them():
    assert [minutes(s) for s in (10, 600, 7100, 8400)] == ["1 min", "10 min", "118 min", "2 h 20 min"]


def test_a_benchmark_that_cannot_keep_its_time_starts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text('{"dtype": "bfloat16"}')
    monkeypatch.setattr(bench, "has_accelerator", lambda: False)
    monkeypatch.setattr(bench, "prepare_models", lambda _: ModelFolders(model, {}, {}))
    monkeypatch.setattr(bench, "measure_machine", lambda benchmark, base, log_dir: WITH_AVX2)
    started: list[str] = []
    monkeypatch.setattr(bench, "_run_topology", lambda run, topology, repeats: started.append(topology))
    benchmark = serving(out=str(tmp_path / "out"), token_ids=TOKEN_IDS)
    with pytest.raises(ConfigError, match="would take about"):
        bench.run_benchmark(benchmark)
    assert not started and not (tmp_path / "out").exists()
    bench.run_benchmark(benchmark, anyway=True)
    assert started == ["shared", "isolated", "shared", "isolated"]
