"""The benchmarks for GPUs, as far as a machine without one can tell: what they would start, with how much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.workloads.config import Benchmark, TopologyName, load_benchmark
from sglang_prefillshare.workloads.models import parameter_count
from sglang_prefillshare.workloads.topologies import make_deployment

SERVING = Path(__file__).parents[3] / "benchmark" / "serving"
CONTEXT_BYTES = 1.0e9
"""Of each process on a GPU: its CUDA context, graphs and scratch memory, about."""


def commands(benchmark: Benchmark, name: TopologyName) -> list[tuple[list[str], dict[str, Any]]]:
    """(command, environment) of every worker of a topology, from the plan that a run starts."""
    models = {model: SERVING / model for model in ("base", *benchmark.models.names)}
    plans, _ = make_deployment(benchmark, name, models)._plan()
    return [(list(plan.command), dict(plan.env)) for plan in plans]


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(f"--{flag}") + 1]


def test_all_topologies_have_the_same_memory_of_one_gpu() -> None:
    benchmark = load_benchmark(SERVING / "gpu.yaml")
    shape = benchmark.models.random
    assert shape is not None
    weights = 2 * parameter_count(shape)
    token_bytes = shape.layers * 2 * shape.kv_heads * (shape.hidden_size // shape.heads) * 2
    totals = {}
    for name in benchmark.topologies:
        pools = [int(value_of(command, "max-total-tokens")) for command, _ in commands(benchmark, name)]
        totals[name] = sum(weights + CONTEXT_BYTES + tokens * token_bytes for tokens in pools)
    assert list(totals) == ["shared", "isolated", "colocated"]
    assert max(totals.values()) < 60e9
    assert max(totals.values()) / min(totals.values()) < 1.01, totals


def test_on_eight_gpus_every_worker_has_one_and_both_topologies_the_same() -> None:
    benchmark = load_benchmark(SERVING / "gpu-8b.yaml")
    dealt = {}
    for name in benchmark.topologies:
        found = [environ["CUDA_VISIBLE_DEVICES"] for _, environ in commands(benchmark, name)]
        dealt[name] = sorted(int(gpu) for gpu in found)
    assert dealt == {"shared": list(range(8)), "isolated": list(range(8))}


@pytest.mark.parametrize("name", ["gpu.yaml", "gpu-8b.yaml"])
def test_sessions_fit_what_a_model_can_hold(name: str) -> None:
    from sglang_prefillshare.workloads.points import points_of

    benchmark = load_benchmark(SERVING / name)
    for workload in benchmark.workloads:
        points = points_of(benchmark, workload, repeat=0, token_ids=(300, 31_000))
        assert max(session.total_tokens for point in points for session in point.sessions) < 8192
