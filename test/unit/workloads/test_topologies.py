"""What is started for each topology: equal where they can be, and stock where they must be. Nothing runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sglang_prefillshare.deployment import Deployment
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.plans import WorkerPlan
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.workloads.config import Benchmark, TopologyName, Workers, parse_benchmark
from sglang_prefillshare.workloads.topologies import make_deployment, pin_workers

TEXT = """\
models: {agents: [planner, coder, reviewer], random: {}}
workloads: [{preset: react, sweeps: [{arrival_rates: [1], max_sessions: [1]}]}]
workers:
  args: {dtype: float32, max_total_tokens: 4096}
  decode_args: {max-running-requests: 5}
  env: {A: b}
"""


def plans(name: TopologyName, folder: Path, text: str = TEXT) -> tuple[list[WorkerPlan], WorkerPlan | None]:
    benchmark: Benchmark = parse_benchmark(text)
    models = {model: folder / model for model in ("base", *benchmark.models.names)}
    deployment: Deployment = make_deployment(benchmark, name, models)
    try:
        return deployment._plan()
    finally:
        deployment._ports.release()


def flags(plan: WorkerPlan) -> dict[str, Any]:
    words = plan.command[plan.command.index("sglang.launch_server") + 1 :]
    found: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--")
            found[name] = True
        else:
            found[name] = word
    return found


def test_shared_and_isolated_have_as_many_workers_of_each_kind_and_equal_pools(tmp_path: Path):
    (shared, _), (isolated, _) = (plans(name, tmp_path) for name in ("shared", "isolated"))
    assert len(shared) == len(isolated) == 6
    for workers in (shared, isolated):
        modes = [flags(plan).get("disaggregation-mode") or flags(plan)["prefill-share-role"] for plan in workers]
        assert sorted(modes) == ["decode"] * 3 + ["prefill"] * 3
        for plan in workers:
            assert flags(plan)["max-total-tokens"] == "4096" and flags(plan)["dtype"] == "float32"
            assert plan.env["A"] == "b"
        assert sum(flags(plan).get("max-running-requests") == "5" for plan in workers) == 3
    assert {flags(plan)["model-path"] for plan in shared if plan.module is None} == {str(tmp_path / "base")}


def test_isolated_workers_are_stock_and_each_model_prefills_for_itself(tmp_path: Path):
    workers, router = plans("isolated", tmp_path)
    for plan in workers:
        assert not [flag for flag in flags(plan) if flag.startswith("prefill-share")]
        assert flags(plan)["disaggregation-transfer-backend"] == "nixl"
        assert flags(plan)["model-path"] == str(tmp_path / (plan.module or ""))
        assert flags(plan)["enable-metrics"] is True
        assert "disable-radix-cache" not in flags(plan)
        is_decode = flags(plan)["disaggregation-mode"] == "decode"
        assert ("disaggregation-decode-enable-radix-cache" in flags(plan)) is is_decode
    assert router is not None and "sglang_prefillshare.routing.pairs" in router.command
    for plan in workers:
        assert f"{plan.module}={plan.url}" in router.command
    ports = [plan.bootstrap_port for plan in workers if plan.bootstrap_port is not None]
    assert len(set(ports)) == 3


def test_flags_of_the_shared_router_are_not_the_isolated_ones(tmp_path: Path):
    text = TEXT + "  router_args: {request-timeout: 9}\n  shared_router_args: {session-margin: 7}\n"
    (_, shared), (_, isolated) = (plans(name, tmp_path, text) for name in ("shared", "isolated"))
    assert shared is not None and isolated is not None
    assert "--request-timeout" in shared.command and "--request-timeout" in isolated.command
    assert shared.command[shared.command.index("--session-margin") + 1] == "7"
    assert "--session-margin" not in isolated.command


def test_colocated_is_one_ordinary_server_for_each_model_without_a_router(tmp_path: Path):
    workers, router = plans("colocated", tmp_path)
    assert [plan.name for plan in workers] == ["planner", "coder", "reviewer"] and router is None
    assert not [
        flag for plan in workers for flag in flags(plan) if flag.startswith(("disaggregation", "prefill-share"))
    ]


def test_adapters_are_served_by_one_server_ours_and_stock_alike(tmp_path: Path):
    (ours, our_router), (stock, stock_router) = (plans(name, tmp_path) for name in ("unified", "stock_lora"))
    assert our_router is None and stock_router is None and len(ours) == len(stock) == 1
    own, other = flags(ours[0]), flags(stock[0])
    assert own["prefill-share-role"] == "unified" and not [flag for flag in other if flag.startswith("prefill-share")]
    assert other["enable-lora"] and other["enable-metrics"]
    assert own["model-path"] == other["model-path"] == str(tmp_path / "base")
    assert own["max-total-tokens"] == other["max-total-tokens"] == "4096"
    for plan in (ours[0], stock[0]):
        start = plan.command.index("--lora-paths") + 1
        assert plan.command[start : start + 3] == tuple(
            f"{name}={tmp_path / name}" for name in ("planner", "coder", "reviewer")
        )


def test_shared_adapters_are_all_on_one_decode_worker(tmp_path: Path):
    workers, router = plans("shared_lora", tmp_path)
    assert [flags(plan)["prefill-share-role"] for plan in workers] == ["prefill"] * 3 + ["decode"]
    assert router is not None and sum(workers[-1].url in word for word in router.command) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_shared_prefill_workers_can_be_fewer(tmp_path: Path, count: int):
    workers, _ = plans("shared", tmp_path, TEXT + f"  shared_prefill: {count}\n")
    assert sum(plan.module is None for plan in workers) == count


def test_a_pinned_worker_stays_on_its_cores_with_all_its_threads_and_children():
    program = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    process = subprocess.Popen([sys.executable, "-c", f"{program}; print('ready', flush=True); time.sleep(60)"],
                               stdout=subprocess.PIPE)  # fmt: skip
    core = min(os.sched_getaffinity(0))
    try:
        assert process.stdout is not None and process.stdout.readline()
        worker = SimpleNamespace(plan=SimpleNamespace(role=Role.PREFILL), pid=process.pid)
        free = SimpleNamespace(plan=SimpleNamespace(role=Role.DECODE), pid=os.getpid())
        before = os.sched_getaffinity(0)
        deployment: Any = SimpleNamespace(workers=[worker, free])
        pin_workers(deployment, Workers(prefill_cores=(core,)))
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(family) == 2 and all(member.cpu_affinity() == [core] for member in family)
        assert os.sched_getaffinity(0) == before
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def test_cores_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"decode_cores is \[4096\], wanted of"):
        Workers(decode_cores=(4096,))
