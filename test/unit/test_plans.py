"""What is planned for a topology: commands, ports, environment, and which transfer backend its GPUs allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.config import topology_from
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.handoff import cuda_memory, proof
from sglang_prefillshare.plans import Commands, WorkerPlan, choose_backend, plan_topology
from sglang_prefillshare.ports import FIRST_PORT, PORTS_PER_WORKER, PortBlocks
from sglang_prefillshare.protocol import Role
from test.support.cuda_driver import FakeDriver, PeerInAThread
from test.unit.deploying import topology_data


def plan(
    data: dict[str, Any], directory: Path, *, is_cpu_host: bool = False, environ: dict[str, str] | None = None
) -> tuple[list[WorkerPlan], WorkerPlan]:
    topology = topology_from(data, directory=directory)
    ports = PortBlocks(avoid=topology.router.port)
    try:
        return plan_topology(topology, ports=ports, commands=Commands(), is_cpu_host=is_cpu_host, environ=environ or {})
    finally:
        ports.release()


def flag(worker: WorkerPlan, name: str) -> str | None:
    command = list(worker.command)
    return command[command.index(name) + 1] if name in command else None


def test_each_worker_gets_its_role_model_name_and_ports(tmp_path: Path) -> None:
    workers, router = plan(topology_data(tmp_path, "", base={"workers": 2}, coder={"workers": 2}), tmp_path)

    assert [worker.name for worker in workers] == ["base.0", "base.1", "coder.0", "coder.1"]
    model = str(tmp_path / "model")
    for worker in workers[:2]:
        assert worker.role is Role.PREFILL
        assert flag(worker, "--prefill-share-role") == "prefill"
        assert flag(worker, "--model-path") == model
        assert flag(worker, "--disaggregation-bootstrap-port") == str(worker.bootstrap_port)
        assert flag(worker, "--prefill-share-base") is None
    for worker in workers[2:]:
        assert worker.role is Role.DECODE
        assert flag(worker, "--prefill-share-base") == model
        assert flag(worker, "--served-model-name") == "coder"
        assert worker.bootstrap_port is None
    assert flag(router, "--port") == str(router.port)
    assert [value for value in router.command if value.startswith("coder=")] == [f"coder={w.url}" for w in workers[2:]]
    assert router.command.count("--prefill") == 2


def test_ports_that_sglang_derives_do_not_meet_another_workers(tmp_path: Path) -> None:
    workers, router = plan(topology_data(tmp_path, "", base={"workers": 3}, coder={"workers": 3}), tmp_path)
    taken: list[int] = [router.port]
    for worker in workers:
        nccl_port = flag(worker, "--nccl-port")
        assert nccl_port is not None
        taken += [worker.port, int(nccl_port), *([worker.bootstrap_port] if worker.bootstrap_port else [])]
        taken += range(worker.port + 233, worker.port + 250)  # data-parallel attention: PortArgs.init_new
    assert len(taken) == len(set(taken))
    assert max(taken) < 22000  # SGLang draws random ports from there on


def test_each_prefill_worker_publishes_on_ports_of_its_own(tmp_path: Path) -> None:
    shared = {"kv-events-config": "auto"}
    workers, _ = plan(topology_data(tmp_path, "", base={"workers": 2}, args=shared), tmp_path)
    configs = [json.loads(flag(worker, "--kv-events-config") or "null") for worker in workers]
    assert configs[2] is None, "nobody follows a decode worker"
    ports = [int(config[name].rpartition(":")[2]) for config in configs[:2] for name in ("endpoint", "replay_endpoint")]
    assert len({*ports, *(worker.port for worker in workers), *(w.bootstrap_port for w in workers[:2])}) == 9
    for config, worker in zip(configs[:2], workers, strict=False):
        assert (config["publisher"], config["format"], config["bind"]) == ("zmq", "dynamo", True)
        assert config["endpoint"].startswith(f"tcp://{worker.host}:")
    own = {"publisher": "zmq", "endpoint": "tcp://*:7000"}
    workers, _ = plan(topology_data(tmp_path, "", base={"args": {"kv-events-config": own}}), tmp_path)
    assert json.loads(flag(workers[0], "--kv-events-config") or "null") == own


def test_args_become_flags(tmp_path: Path) -> None:
    args = {"max-total-tokens": 500, "disable-radix-cache": True, "lora-paths": ["a", "b"], "sleep-on-idle": False}
    (base, _), _ = plan(topology_data(tmp_path, "", base={"args": args}), tmp_path)
    assert flag(base, "--max-total-tokens") == "500"
    assert base.command[base.command.index("--lora-paths") :][1:3] == ("a", "b")
    assert "--disable-radix-cache" in base.command
    assert "--sleep-on-idle" not in base.command


def test_args_of_all_workers_give_way_to_a_workers_own(tmp_path: Path) -> None:
    own = {"page-size": 1, "dtype": None, "watchdog-timeout": 9}
    data = topology_data(tmp_path, "", coder={"args": own}, args={"dtype": "float32", "page_size": 16})
    (base, coder), router = plan(data, tmp_path)
    assert (flag(base, "--dtype"), flag(base, "--page-size"), flag(base, "--watchdog-timeout")) == (
        "float32",
        "16",
        None,
    )
    assert (flag(coder, "--dtype"), flag(coder, "--page-size"), flag(coder, "--watchdog-timeout")) == (None, "1", "9")
    assert coder.command.count("--page-size") == 1
    assert "--dtype" not in router.command


@pytest.mark.parametrize("is_cpu_host", [False, True])
def test_workers_on_a_cpu_get_one_openmp_thread(tmp_path: Path, is_cpu_host: bool) -> None:
    data = topology_data(tmp_path, "", base={"args": {"device": "cuda"}}, coder={"args": {"device": "cpu"}})
    data["decode"].append({"name": "twin", "model": "model"})
    (base, coder, twin), _ = plan(data, tmp_path, is_cpu_host=is_cpu_host)
    assert "OMP_NUM_THREADS" not in base.env
    assert coder.env["OMP_NUM_THREADS"] == "1"
    assert twin.env.get("OMP_NUM_THREADS") == ("1" if is_cpu_host else None)


def test_the_workers_key_is_handed_to_the_router_and_not_shown(tmp_path: Path) -> None:
    workers, router = plan(topology_data(tmp_path, "", args={"api-key": "sesame"}), tmp_path)
    assert [flag(worker, "--api-key") for worker in workers] == ["sesame", "sesame"]
    assert router.env["PREFILLSHARE_WORKER_API_KEY"] == "sesame"
    assert "sesame" not in router.command


def test_env_of_the_worker_wins_over_the_topologys_over_ours_over_defaults(tmp_path: Path) -> None:
    data = topology_data(tmp_path, "", coder={"env": {"B": "worker", "GONE": None}}, env={"A": 1, "B": "topology"})
    environ = {"OMP_NUM_THREADS": "8", "GONE": "x", "A": "ours"}
    (base, coder), _ = plan(data, tmp_path, is_cpu_host=True, environ=environ)
    assert (base.env["OMP_NUM_THREADS"], base.env["A"], base.env["B"], base.env["GONE"]) == ("8", "1", "topology", "x")
    assert coder.env["B"] == "worker"
    assert "GONE" not in coder.env


def test_gpus_are_dealt_out_over_the_workers(tmp_path: Path) -> None:
    data = topology_data(tmp_path, "", base={"workers": 2, "gpus": [0, 1, 2, 3]}, coder={"workers": 3, "gpus": [4, 5]})
    workers, _ = plan(data, tmp_path)
    assert [worker.env["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["0,1", "2,3", "4", "5", "4"]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """One GPU, which each of the two trying processes takes for its first."""
    driver = FakeDriver({0: []})
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    monkeypatch.setattr(proof, "Peer", PeerInAThread)
    return driver


def test_workers_on_gpus_that_cannot_read_from_each_other_use_nixl_and_up_says_so(
    tmp_path: Path, driver: FakeDriver, capsys: pytest.CaptureFixture[str]
) -> None:
    data = topology_data(tmp_path, "", base={"gpus": [0]}, coder={"gpus": [1]})
    workers, _ = plan(data, tmp_path)
    assert choose_backend(workers) == workers and driver.exported and driver.mapped
    driver.has_ipc = False
    chosen = choose_backend(workers)
    assert {flag(worker, "--disaggregation-transfer-backend") for worker in chosen} == {"nixl"}
    told = capsys.readouterr().err
    assert "GPU 1 of coder cannot take KV over from GPU 0 of base: " in told and told.endswith(
        "All workers use nixl.\n"
    )
    driver.is_full = True
    assert choose_backend(workers) == workers
    assert "no handoff was tried" in capsys.readouterr().err


def test_a_backend_that_the_topology_names_is_kept_or_refused_before_anything_starts(
    tmp_path: Path, driver: FakeDriver
) -> None:
    driver.has_ipc = False
    for backend in ("nixl", "prefillshare"):
        args = {"disaggregation-transfer-backend": backend}
        data = topology_data(tmp_path, "", base={"gpus": [0], "args": args}, coder={"gpus": [1], "args": args})
        workers, _ = plan(data, tmp_path)
        if backend == "nixl":
            assert choose_backend(workers) == workers
            continue
        with pytest.raises(ConfigError, match=r"offers no CUDA IPC.*The topology asks for prefillshare"):
            choose_backend(workers)


def test_workers_on_one_gpu_or_on_none_are_not_tried_in_pairs(tmp_path: Path, driver: FakeDriver) -> None:
    driver.has_ipc = False
    for gpus in ({"gpus": [0]}, {}):
        workers, _ = plan(topology_data(tmp_path, "", base=gpus, coder=gpus), tmp_path)
        assert choose_backend(workers) == workers


def test_a_block_with_a_taken_port_is_passed_over() -> None:
    blocks = PortBlocks()
    first = blocks.take()
    others = PortBlocks(avoid=first + PORTS_PER_WORKER + 7)
    try:
        assert first >= FIRST_PORT
        # The first block is owned by the other object, the second has the router's port in it.
        assert others.take() >= first + 2 * PORTS_PER_WORKER
    finally:
        blocks.release()
        others.release()
