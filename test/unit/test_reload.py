"""A deployment whose topology is read anew while it serves: fake workers, which are real processes, and our router."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare import deployment as deployment_module
from sglang_prefillshare.config import Topology, topology_from
from sglang_prefillshare.deployment import Deployment, Silent, State, StopRequestedError, Worker
from sglang_prefillshare.errors import ConfigError, WorkerError
from sglang_prefillshare.plans import Commands, plan_workers
from sglang_prefillshare.ports import GivenPorts
from sglang_prefillshare.process import StopGrace
from sglang_prefillshare.restarts import RestartPolicy
from test.unit.deploying import (
    FAKE_COMMAND,
    fake_options,
    in_a_thread,
    marked,
    new_mark,
    nothing_left,
    topology_data,
    wait_until,
)


@pytest.fixture
def mark() -> Iterator[str]:
    mark = new_mark()
    with nothing_left(mark):
        yield mark


class Told(Silent):
    """What an observer is told."""

    def __init__(self) -> None:
        self.reloads: list[tuple[str, bool]] = []
        self.states: list[tuple[str, State, int]] = []

    def on_reload(self, told: str, *, is_refused: bool) -> None:
        self.reloads.append((told, is_refused))

    def on_state(self, worker: Worker) -> None:
        self.states.append((worker.name, worker.state, worker.plan.port))

    @property
    def ended(self) -> int:
        """How many reloads have ended."""
        return sum(
            is_refused or not told.startswith("the topology was read anew: ") for told, is_refused in self.reloads
        )


class Running:
    """A deployment that waits in a thread of its own, and the topology that it will read next."""

    def __init__(self, deployment: Deployment, told: Told, data: dict[str, Any], directory: Path) -> None:
        self.deployment, self.told, self.data = deployment, told, data
        self.restored: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self._directory = directory

    def read(self) -> Topology:
        return topology_from(self.data, directory=self._directory)

    def wait(self) -> None:
        try:
            self.deployment.wait(
                on_restored=lambda: self.restored.append(self.deployment.describe()), read_topology=lambda: self.read()
            )
        except (StopRequestedError, WorkerError) as error:
            self.error = error

    def reload(self, *decode: dict[str, Any], **changes: Any) -> tuple[str, bool]:
        """Ask for it, with these decode modules; what was told at its end."""
        self.data = {**self.data, **({"decode": list(decode)} if decode else {}), **changes}
        count = self.told.ended
        self.deployment.request_reload()
        assert wait_until(lambda: self.told.ended > count or self.error is not None, timeout_s=40.0), self.told.reloads
        assert self.error is None, self.error
        return self.told.reloads[-1]

    def pids(self) -> dict[str, int | None]:
        return {worker.name: worker.pid for worker in self.deployment.workers}

    def models(self) -> list[str]:
        with urllib.request.urlopen(f"{self.deployment.router_url}/v1/models", timeout=5) as answer:
            return [model["id"] for model in json.load(answer)["data"]]

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.deployment.router_url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextlib.contextmanager
def running(directory: Path, mark: str, data: dict[str, Any] | None = None, **options: Any) -> Iterator[Running]:
    data = data or topology_data(directory, mark)
    told = Told()
    values = {"commands": Commands(FAKE_COMMAND), "restarts": RestartPolicy(first_delay_s=0.05), **options}
    topology = topology_from(data, directory=directory)
    with Deployment(topology, options=fake_options(**values), observer=told) as deployment:
        found = Running(deployment, told, data, directory)
        with in_a_thread(deployment, found.wait, ends_within_s=30.0):
            yield found


def module(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "model": "model", **keys}


def test_what_is_new_comes_what_is_gone_goes_and_the_rest_is_not_touched(tmp_path: Path, mark: str) -> None:
    data = {**topology_data(tmp_path, mark), "decode": [module("coder"), module("twin")]}
    with running(tmp_path, mark, data) as up:
        before, urls = up.pids(), {worker.name: worker.url for worker in up.deployment.workers}
        router_pid = up.deployment.router.pid  # type: ignore[union-attr]
        assert up.models() == ["coder", "twin"]
        told = up.reload(module("tester"), module("coder"))
        assert told == ("now as the topology says: added tester, removed twin; 2 as they were", False)
        assert sorted(up.models()) == ["coder", "tester"] and up.is_healthy()
        after = up.pids()
        assert list(after) == ["base", "tester", "coder"], "in the topology's order"
        assert (after["base"], after["coder"]) == (before["base"], before["coder"])
        assert up.deployment.worker("coder").url == urls["coder"]
        assert up.deployment.router.pid == router_pid  # type: ignore[union-attr]
        assert before["twin"] not in {process.pid for process in marked(mark)}
        assert wait_until(lambda: bool(up.restored))
        assert [worker["name"] for worker in up.restored[-1]["workers"]] == ["base", "tester", "coder"]

        # Back again: the name of a module that went for good is one again, and its old address is nobody else's.
        up.reload(module("coder"), module("twin"))
        assert sorted(up.models()) == ["coder", "twin"] and up.is_healthy()
        assert up.deployment.worker("twin").url not in urls.values()
        assert up.pids()["coder"] == before["coder"]


def test_a_router_that_dies_after_a_reload_comes_back_with_those_who_serve_now(tmp_path: Path, mark: str) -> None:
    data = {**topology_data(tmp_path, mark), "decode": [module("coder"), module("twin")]}
    with running(tmp_path, mark, data) as up:
        up.reload(module("coder"), module("tester"))
        router, count = up.deployment.router, len(up.restored)
        assert router is not None and router.pid is not None
        os.kill(router.pid, signal.SIGKILL)
        assert wait_until(lambda: len(up.restored) > count)
        assert up.models() == ["coder", "tester"] and up.is_healthy()
        # What the first router's flags held is free again.
        count = len(up.deployment._ports.taken)
        up.reload(module("coder"))
        up.reload(module("coder"), module("third"))
        assert len(up.deployment._ports.taken) <= count


def test_a_changed_worker_is_replaced_by_one_that_is_ready_before_it_ends(tmp_path: Path, mark: str) -> None:
    with running(tmp_path, mark, log_dir=tmp_path / "logs") as up:
        before, old_url = up.pids(), up.deployment.worker("coder").url
        unhealthy: list[float] = []
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                if not up.is_healthy():
                    unhealthy.append(time.monotonic())
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        told, _ = up.reload(module("coder", args={"max-total-tokens": 7}))
        done.set()
        watcher.join()
        assert told == "now as the topology says: replaced coder; 1 as they were"
        assert not unhealthy
        after = up.pids()
        assert after["coder"] != before["coder"] and after["base"] == before["base"]
        assert "--max-total-tokens" in up.deployment.worker("coder").plan.command
        new = up.deployment.worker("coder").plan.port
        states = [(state, port) for name, state, port in up.told.states if name == "coder"]
        old = next(port for _, port in states if port != new)
        assert states.index((State.READY, new)) < states.index((State.STOPPING, old)), states
        assert old_url.endswith(str(old))
    log = (tmp_path / "logs" / "coder.log").read_text().splitlines()
    assert log == ["loading coder", "loading coder", "leaving on SIGINT", "leaving on SIGINT"]


def test_more_and_fewer_workers_of_the_base_and_of_a_module(tmp_path: Path, mark: str) -> None:
    with running(tmp_path, mark) as up:
        before = up.pids()
        up.reload(module("coder", workers=2), base={"model": "model", "workers": 2})
        more = up.pids()
        assert list(more) == ["base", "base.1", "coder", "coder.1"]
        assert {name: more[name] for name in before} == before
        assert up.models() == ["coder"] and up.is_healthy()
        up.reload(module("coder"), base={"model": "model"})
        assert up.pids() == before


def test_a_new_worker_that_does_not_start_leaves_everything_as_it_was(tmp_path: Path, mark: str) -> None:
    with running(tmp_path, mark, ready_timeout_s=4.0) as up:
        before, taken = up.pids(), up.deployment._ports.taken
        for fake, reason in (
            ("dies-at-start", "tester ended before it was ready: exit status 3"),
            ("never-ready", "not ready within 4 s: tester"),
            ("cannot-hand-over", "tester can hand no KV over"),
        ):
            told, is_refused = up.reload(module("tester", args={"fake": fake}))
            assert is_refused and told.startswith(f"nothing changed: {reason}"), told
            assert up.pids() == before and up.models() == ["coder"] and up.is_healthy()
            assert up.deployment._ports.taken == taken
            assert len(marked(mark)) == 4, "two workers and their supervisors"
        assert not up.reload(module("tester"))[1]
        assert up.models() == ["tester"]


def test_a_worker_that_the_router_refuses_leaves_everything_as_it_was(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_module, "ADMIT_TIMEOUT_S", 2.0)
    with running(tmp_path, mark) as up:
        before = up.pids()
        told, is_refused = up.reload(module("coder"), module("tester", args={"fake-base": "another"}))
        assert is_refused and "the router sends tester no requests: it is refused: it reads the KV of the base" in told
        assert up.pids() == before and up.models() == ["coder"] and up.is_healthy()


def test_a_file_that_cannot_be_used_changes_nothing_and_is_told(tmp_path: Path, mark: str) -> None:
    with running(tmp_path, mark) as up:
        before = up.pids()

        def broken(error: Exception) -> Callable[[], Topology]:
            def read() -> Topology:
                raise error

            return read

        good = up.read
        for error, says in ((ConfigError("t.yaml:2: decode[0] lacks x."), "t.yaml:2: decode[0] lacks x."),
                            (OSError("no disk"), "OSError: no disk")):  # fmt: skip
            up.read = broken(error)  # type: ignore[method-assign]
            assert up.reload() == (f"the topology was read anew, and nothing changed: {says}", True)
        up.read = good  # type: ignore[method-assign]
        told, is_refused = up.reload(router={"port": 1})
        assert is_refused and "router.port is 1 and was 0" in told
        assert up.reload(router={}) == ("the topology was read anew, and asks for what runs", False)
        assert up.pids() == before and up.models() == ["coder"]


def test_requests_while_it_starts_or_reloads_are_one_more_reload(tmp_path: Path, mark: str) -> None:
    told, seen = Told(), list[list[str]]()
    data = topology_data(tmp_path, mark, coder={"args": {"fake-ready-after": 1.0}})
    options = fake_options(commands=Commands(FAKE_COMMAND), restarts=RestartPolicy())
    deployment = Deployment(topology_from(data, directory=tmp_path), options=options, observer=told)
    deployment.request_reload()
    deployment.request_reload()
    texts = iter(["first", "second"])

    def read() -> Topology:
        seen.append([worker.name for worker in deployment.workers])
        name = next(texts)
        if name == "first":  # while this one is under way
            for _ in range(3):
                deployment.request_reload()
        return topology_from({**data, "decode": [module(name)]}, directory=tmp_path)

    with deployment:
        assert not seen, "not before all are ready"
        found = Running(deployment, told, data, tmp_path)
        found.read = read  # type: ignore[method-assign]
        thread = threading.Thread(target=found.wait)
        thread.start()
        assert wait_until(lambda: told.ended == 2)
        time.sleep(0.5)
        assert seen == [["base", "coder"], ["base", "first"]] and found.models() == ["second"]
        deployment.request_stop()
        thread.join(20.0)
        assert isinstance(found.error, StopRequestedError)


@pytest.mark.parametrize("fake", ["never-ready", "ignores-signals"])
def test_a_stop_in_the_middle_of_a_reload_leaves_nothing(tmp_path: Path, mark: str, fake: str) -> None:
    data = {**topology_data(tmp_path, mark), "decode": [module("coder"), module("twin", args={"fake": fake})]}
    if fake == "never-ready":  # who comes
        data["decode"].pop()
    with running(tmp_path, mark, data, grace=StopGrace(interrupt_s=0.5, terminate_s=0.3)) as up:
        wanted = (
            [module("coder")] if fake == "ignores-signals" else [module("coder"), module("twin", args={"fake": fake})]
        )
        up.data = {**up.data, "decode": wanted}
        up.deployment.request_reload()
        state = State.STOPPING if fake == "ignores-signals" else State.STARTING
        assert wait_until(lambda: up.told.states[-1][:2] == ("twin", state)), up.told.states
    assert isinstance(up.error, StopRequestedError)


def test_one_that_crashes_again_and_again_is_replaced_by_what_was_mended(tmp_path: Path, mark: str) -> None:
    spoilt = tmp_path / "spoilt"
    data = topology_data(tmp_path, mark, coder={"args": {"fake-if": [str(spoilt), "never-ready"]}})
    with running(tmp_path, mark, data) as up:
        before = up.pids()
        spoilt.touch()
        assert before["coder"] is not None
        os.kill(before["coder"], signal.SIGKILL)
        assert wait_until(lambda: up.deployment.worker("coder").launch_count == 2)
        assert not up.reload(module("coder"))[1]
        assert up.is_healthy() and up.pids()["base"] == before["base"]


def test_the_router_and_a_worker_that_die_meanwhile_come_back_and_the_reload_goes_on(tmp_path: Path, mark: str) -> None:
    data = {**topology_data(tmp_path, mark), "decode": [module("coder"), module("twin")]}
    with running(tmp_path, mark, data) as up:
        router, coder = up.deployment.router, up.deployment.worker("coder")
        assert router is not None and router.pid is not None and coder.pid is not None
        pids = {router.pid, coder.pid}
        up.data = {**data, "decode": [module("coder"), module("tester", args={"fake-ready-after": 1.5})]}
        up.deployment.request_reload()
        assert wait_until(lambda: up.told.states[-1][:2] == ("tester", State.STARTING))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: up.told.ended == 1, timeout_s=40.0)
        assert up.told.reloads[-1] == ("now as the topology says: added tester, removed twin; 2 as they were", False)
        assert wait_until(up.is_healthy)
        assert sorted(up.models()) == ["coder", "tester"]
        assert wait_until(lambda: bool(up.restored))
        assert not pids & {router.pid, coder.pid} and coder.launch_count == router.launch_count == 2


def test_a_unified_server_stays_as_it_is(tmp_path: Path, mark: str) -> None:
    modules = [{"name": name, "adapter": "model"} for name in ("planner", "coder")]
    data = {**topology_data(tmp_path, mark), "unified": True, "decode": modules}
    with running(tmp_path, mark, data) as up:
        before = up.pids()
        told, is_refused = up.reload(modules[0])
        assert is_refused and "a unified server is one process" in told
        assert up.reload(*modules) == ("the topology was read anew, and asks for what runs", False)
        assert up.pids() == before


# ---- on GPUs, of which there are none: what is planned and in which order it runs ----------------------------------


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment_module, "has_accelerator", lambda: True)


def test_on_one_gpu_a_replacement_starts_when_the_one_before_has_ended(
    tmp_path: Path, mark: str, accelerator: None
) -> None:
    data = {**topology_data(tmp_path, mark, base={"gpus": [0]}), "decode": [module("coder", gpus=[0])]}
    with running(tmp_path, mark, data) as up:
        told, _ = up.reload(module("coder", gpus=[0], args={"page-size": 1}))
        assert told == "now as the topology says: replaced coder; 1 as they were"
        new = up.deployment.worker("coder").plan.port
        states = [(state, port) for name, state, port in up.told.states if name == "coder"]
        old = next(port for _, port in states if port != new)
        assert states.index((State.ENDED, old)) < states.index((State.STARTING, new)), states
        assert up.models() == ["coder"] and up.is_healthy()


def test_where_that_does_not_start_the_one_before_comes_back(tmp_path: Path, mark: str, accelerator: None) -> None:
    data = {**topology_data(tmp_path, mark, base={"gpus": [0]}), "decode": [module("coder", gpus=[0])]}
    with running(tmp_path, mark, data) as up:
        plan = up.deployment.worker("coder").plan
        told, is_refused = up.reload(module("coder", gpus=[0], args={"fake": "dies-at-start"}))
        assert is_refused and told.startswith("coder will be as before: coder ended before it was ready: exit status 3")
        assert wait_until(lambda: up.deployment.worker("coder").state is State.READY)
        assert wait_until(up.is_healthy)
        assert up.deployment.worker("coder").plan == plan and up.models() == ["coder"]


def test_workers_on_different_gpus_do_not_wait_for_each_other(tmp_path: Path, mark: str) -> None:
    plans = {}
    for gpus in ([0], [1], [0, 1], []):
        data = {**topology_data(tmp_path, mark), "decode": [module("coder", gpus=gpus)]}
        topology = topology_from(data, directory=tmp_path)
        (_, plans[tuple(gpus)]) = plan_workers(
            topology,
            ports=GivenPorts(iter([1, 2])),
            commands=fake_options().commands,
            is_cpu_host=False,
            environ={},
        )
    assert not plans[0,].shares_a_gpu_with(plans[1,])
    for gpus in plans:
        assert plans[gpus].shares_a_gpu_with(plans[gpus])
        assert plans[gpus].shares_a_gpu_with(plans[()]) and plans[gpus].shares_a_gpu_with(plans[0, 1])
