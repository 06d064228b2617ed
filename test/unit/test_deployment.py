"""`deployment.py` and `process.py`, with fake workers that are real processes on real ports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from sglang_prefillshare.deployment import Deployment, Silent, State, StopRequestedError, Worker, ready_file
from sglang_prefillshare.errors import ConfigError, WorkerError
from sglang_prefillshare.plans import Commands
from sglang_prefillshare.process import ExitStatus, StopGrace, describe_exit
from sglang_prefillshare.restarts import Restart, RestartPolicy
from test.unit.deploying import (
    FAKE_COMMAND,
    fake_options,
    fake_topology,
    in_a_thread,
    marked,
    new_mark,
    nothing_left,
    wait_until,
)


@pytest.fixture
def mark() -> Iterator[str]:
    """Marks a test's processes, and fails the test if one of them outlives it."""
    mark = new_mark()
    with nothing_left(mark):
        yield mark


def test_a_taken_router_port_is_told_before_anything_starts(tmp_path: Path, mark: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        topology = fake_topology(tmp_path, mark, router={"port": taken.getsockname()[1]})
        with pytest.raises(ConfigError, match="port is taken"), Deployment(topology, options=fake_options()):
            pass


def test_inside_with_all_are_ready_and_after_it_none_is_left(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, base={"workers": 2})
    with Deployment(topology, options=fake_options()) as deployment:
        for url in (deployment.router_url, *(worker.url for worker in deployment.workers)):
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                assert answer.status == 200
        assert {worker.state for worker in deployment.workers} == {State.READY}
        pids = {worker.pid for worker in deployment.workers}
        assert pids <= {process.pid for process in marked(mark)}
        deployment.check()
    assert {worker.state for worker in deployment.workers} == {State.ENDED}
    assert deployment.worker("coder").tail()[-1] == "leaving on SIGINT"


def test_the_router_that_it_starts_finds_the_workers(tmp_path: Path, mark: str) -> None:
    options = fake_options(commands=Commands(FAKE_COMMAND))
    with (
        Deployment(fake_topology(tmp_path, mark), options=options) as deployment,
        urllib.request.urlopen(f"{deployment.router_url}/v1/models", timeout=5) as answer,
    ):
        models = json.load(answer)
    assert [model["id"] for model in models["data"]] == ["coder"]
    assert deployment.router is not None
    told = "\n".join(deployment.router.tail())
    assert f"INFO router listens on {deployment.router_url}" in told
    for worker in (
        "prefill worker " + deployment.worker("base").url,
        f"worker {deployment.worker('coder').url} of 'coder'",
    ):
        assert f"INFO {worker}: starting -> ready" in told
    assert "uvicorn" not in told.lower() and "server process" not in told


def test_a_router_is_as_quiet_as_its_log_level(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, router={"args": {"log-level": "error"}})
    with Deployment(topology, options=fake_options(commands=Commands(FAKE_COMMAND))) as deployment:
        pass
    assert deployment.router is not None
    assert deployment.router.tail() == []


def test_workers_with_a_key_become_ready_and_are_found_by_the_router(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, args={"api-key": "sesame"})
    with Deployment(topology, options=fake_options(commands=Commands(FAKE_COMMAND))) as deployment:
        base = deployment.worker("base")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{base.url}/prefill_share", timeout=5)
        with urllib.request.urlopen(f"{deployment.router_url}/health", timeout=5) as answer:
            assert answer.status == 200


def test_a_ready_file_describes_the_deployment_for_as_long_as_it_serves(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "ready.json"
    with Deployment(fake_topology(tmp_path, mark), options=fake_options()) as deployment:
        with ready_file(path, deployment):
            told = json.loads(path.read_text())
            assert told["router_url"] == deployment.router_url
            assert [(w["name"], w["role"], w["pid"]) for w in told["workers"]] == [
                ("base", "prefill", deployment.worker("base").pid),
                ("coder", "decode", deployment.worker("coder").pid),
            ]
        assert not path.exists()


def test_a_unified_server_is_one_process_where_the_router_would_be(tmp_path: Path, mark: str) -> None:
    modules = [{"name": name, "adapter": "model"} for name in ("planner", "coder")]
    topology = fake_topology(tmp_path, mark, unified=True, decode=modules)
    with Deployment(topology, options=fake_options()) as deployment:
        [worker] = deployment.workers
        assert deployment.router is None and deployment.url == worker.url
        assert deployment.describe()["workers"][0]["role"] == "unified" and deployment.describe()["url"] == worker.url
        command = worker.plan.command
        folder = tmp_path / "model"
        start = command.index("--lora-paths")
        assert command[start + 1 : start + 3] == (f"planner={folder}", f"coder={folder}")
        assert command[command.index("--port") + 1] == str(worker.plan.port)


def test_modules_that_are_adapters_share_one_decode_worker(tmp_path: Path, mark: str) -> None:
    adapters = [{"name": name, "adapter": "model"} for name in ("planner", "coder")]
    topology = fake_topology(tmp_path, mark, decode=[*adapters, {"name": "reviewer", "model": "model"}])
    with Deployment(topology, options=fake_options()) as deployment:
        assert [worker.name for worker in deployment.workers] == ["base", "reviewer", "adapters"]
        worker = deployment.worker("adapters")
        command, folder = worker.plan.command, tmp_path / "model"
        start = command.index("--lora-paths")
        assert command[start + 1 : start + 3] == (f"planner={folder}", f"coder={folder}")
        assert command[command.index("--prefill-share-base") + 1] == command[command.index("--model-path") + 1]
        assert deployment.describe()["workers"][-1]["adapters"] == ["planner", "coder"]
        assert deployment.router is not None
        named = [word for word in deployment.router.plan.command if word.endswith(f"={worker.url}")]
        assert named == [f"planner={worker.url}", f"coder={worker.url}"]


def test_two_deployments_stand_side_by_side(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark)
    with (
        Deployment(topology, options=fake_options()) as first,
        Deployment(topology, options=fake_options()) as second,
    ):
        urls = [worker.url for deployment in (first, second) for worker in deployment.workers]
        assert len(set(urls)) == 4
        assert first.router_url != second.router_url


def test_no_more_workers_load_at_once_than_allowed(tmp_path: Path, mark: str) -> None:
    class Counter(Silent):
        most = 0
        starting: set[str] = set()  # noqa: RUF012 - one test, one counter

        def on_state(self, worker: Worker) -> None:
            (self.starting.add if worker.state is State.STARTING else self.starting.discard)(worker.name)
            self.most = max(self.most, len(self.starting))

    topology = fake_topology(tmp_path, mark, base={"workers": 3})
    counter = Counter()
    with Deployment(topology, options=fake_options(start_concurrency=2), observer=counter):
        assert counter.most == 2


def test_logs_go_to_a_file_for_each_worker(tmp_path: Path, mark: str) -> None:
    options = fake_options(log_dir=tmp_path / "logs")
    with Deployment(fake_topology(tmp_path, mark), options=options):
        pass
    assert (tmp_path / "logs" / "coder.log").read_text().splitlines() == ["loading coder", "leaving on SIGINT"]


# ---- failing -------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_at_start_is_named_with_its_status_and_last_lines(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "dies-at-start"}})
    with (
        pytest.raises(WorkerError, match=r"coder ended before it was ready: exit status 3") as caught,
        Deployment(topology, options=fake_options()),
    ):
        pass
    assert "[coder] ERROR: weights are missing" in str(caught.value)


def test_a_command_that_does_not_exist_is_told(tmp_path: Path, mark: str) -> None:
    options = fake_options(commands=Commands(("no-such-command",)))
    with (
        pytest.raises(WorkerError, match="cannot start no-such-command: No such file"),
        Deployment(fake_topology(tmp_path, mark), options=options),
    ):
        pass


def test_a_worker_that_dies_later_ends_the_wait(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "dies-later"}})
    with Deployment(topology, options=fake_options()) as deployment:
        with pytest.raises(WorkerError, match="coder ended while it served: exit status 4"):
            deployment.wait()
        with pytest.raises(WorkerError, match="coder"):
            deployment.check()
        assert deployment.worker("base").state is State.READY


def test_a_router_that_dies_is_named(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, router={"args": {"fake": "dies-at-start"}})
    with pytest.raises(WorkerError, match="router ended"), Deployment(topology, options=fake_options()):
        pass


def test_only_workers_that_are_not_ready_in_time_are_named(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "never-ready"}})
    with (
        pytest.raises(
            WorkerError, match=r"not ready within 1 s: coder \(last: status 503 at /prefill_share\)"
        ) as caught,
        Deployment(topology, options=fake_options(ready_timeout_s=1.0)),
    ):
        pass
    assert "base" not in str(caught.value)


def test_a_worker_that_can_hand_nothing_over_is_not_waited_for(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "cannot-hand-over"}})
    with (
        pytest.raises(WorkerError, match=r"coder can hand no KV over: its memory is closed; choose nixl"),
        Deployment(topology, options=fake_options(ready_timeout_s=120.0)),
    ):
        pass


def test_waiting_ends_when_a_stop_is_requested(tmp_path: Path, mark: str) -> None:
    with Deployment(fake_topology(tmp_path, mark), options=fake_options()) as deployment:
        deployment.request_stop()
        with pytest.raises(StopRequestedError):
            deployment.wait()


# ---- restarting ----------------------------------------------------------------------------------------------------

QUICK = RestartPolicy(first_delay_s=0.05)


class Restarts(Silent):
    """Keeps what an observer is told of restarts, with the worker's last lines at that moment."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, str]] = []
        self.tails: list[list[str]] = []

    def on_restart(self, worker: Worker, restart: Restart, reason: str) -> None:
        self.seen.append((worker.name, restart.number, reason))
        self.tails.append(worker.tail())


@contextlib.contextmanager
def waiting(deployment: Deployment, restored: list[str] | None = None) -> Iterator[list[BaseException]]:
    """`deployment.wait()` in a thread of its own; the list gets what it ends with."""
    ended_with: list[BaseException] = []

    def wait() -> None:
        try:
            deployment.wait(on_restored=lambda: None if restored is None else restored.append("restored"))
        except (StopRequestedError, WorkerError) as error:
            ended_with.append(error)

    with in_a_thread(deployment, wait, ends_within_s=20.0):
        yield ended_with


def kill(worker: Worker) -> int:
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def test_what_dies_while_it_serves_is_restarted_as_it_was_and_the_others_go_on(tmp_path: Path, mark: str) -> None:
    options = fake_options(restarts=QUICK, log_dir=tmp_path / "logs")
    told, restored = Restarts(), list[str]()
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "forks"}})
    with Deployment(topology, options=options, observer=told) as deployment, waiting(deployment, restored):
        assert deployment.router is not None
        base_pid = deployment.worker("base").pid
        for name, worker in (("coder", deployment.worker("coder")), ("router", deployment.router)):
            process_count, pid, count = len(marked(mark)), kill(worker), len(restored)
            assert wait_until(lambda: len(restored) > count)  # noqa: B023 - called at once
            assert worker.state is State.READY and worker.pid != pid
            with urllib.request.urlopen(f"{worker.url}/health", timeout=5) as answer:  # the port is the same
                assert answer.status == 200
            assert wait_until(lambda: len(marked(mark)) == process_count, timeout_s=2.0)  # noqa: B023
            assert told.seen[-1] == (name, 1, "ended while it served: killed by SIGKILL (out of memory?)")
        assert deployment.worker("base").pid == base_pid
    assert told.tails == [["loading coder"], ["loading router"]]
    log = (tmp_path / "logs" / "coder.log").read_text().splitlines()
    assert log == ["loading coder", "loading coder", "leaving on SIGINT"]


def test_what_dies_more_often_ends_the_wait_with_the_reason_and_the_log(tmp_path: Path, mark: str) -> None:
    told = Restarts()
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "dies-later"}})
    options = fake_options(restarts=QUICK, log_dir=tmp_path / "logs")
    with (
        Deployment(topology, options=options, observer=told) as deployment,
        pytest.raises(
            WorkerError,
            match=r"coder ended while it served: exit status 4. It was restarted 3 times within 10 minutes; that is "
            rf"the limit. Its log is {tmp_path}/logs/coder.log. Last lines:\n  \[coder\] loading coder",
        ),
    ):
        deployment.wait()
    assert told.seen == [("coder", number, "ended while it served: exit status 4") for number in (1, 2, 3)]


def test_a_restart_that_fails_or_is_not_ready_in_time_counts_as_a_death(tmp_path: Path, mark: str) -> None:
    for mode, reason in (
        ("dies-at-start", "ended before it was ready: exit status 3"),
        ("never-ready", "was ended: not ready within 5 s (last: status 503 at /prefill_share)"),
        ("cannot-hand-over", "was ended: can hand no KV over: its memory is closed; choose nixl"),
    ):
        told, restored, spoilt = Restarts(), list[str](), tmp_path / mode
        topology = fake_topology(tmp_path, mark, coder={"args": {"fake-if": [str(spoilt), mode]}})
        options = fake_options(restarts=QUICK, ready_timeout_s=5.0)
        with Deployment(topology, options=options, observer=told) as deployment, waiting(deployment, restored):
            spoilt.touch()
            kill(deployment.worker("coder"))
            assert wait_until(lambda told=told: len(told.seen) == 2)
            spoilt.unlink()
            assert wait_until(lambda restored=restored: restored == ["restored"]), told.seen
        assert told.seen[1] == ("coder", 2, reason)


@pytest.mark.parametrize("fake", ["dies-at-start", "dies-later"])
def test_what_dies_before_all_were_ready_once_is_not_restarted(tmp_path: Path, mark: str, fake: str) -> None:
    told = Restarts()
    topology = fake_topology(tmp_path, mark, base={"args": {"fake": fake}}, coder={"args": {"fake-ready-after": 10.0}})
    options = fake_options(restarts=QUICK)
    began = time.monotonic()
    with pytest.raises(WorkerError, match="base ended"), Deployment(topology, options=options, observer=told):
        pass
    assert time.monotonic() - began < 9.0
    assert told.seen == []


def test_a_stop_ends_the_wait_for_a_restart_and_its_loading(tmp_path: Path, mark: str) -> None:
    slow, mode = tmp_path / "slow", "never-ready"
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake-if": [str(slow), mode]}})
    for policy, state in ((RestartPolicy(first_delay_s=60.0), State.WAITING), (QUICK, State.STARTING)):
        slow.unlink(missing_ok=True)
        with Deployment(topology, options=fake_options(restarts=policy)) as deployment:
            with waiting(deployment) as ended_with:
                slow.touch()
                kill(deployment.worker("coder"))
                assert wait_until(lambda deployment=deployment, state=state: deployment.worker("coder").state is state)
                began = time.monotonic()
            assert [type(error) for error in ended_with] == [StopRequestedError]
        assert time.monotonic() - began < 5.0
        assert {worker.state for worker in deployment.workers} == {State.ENDED}


def test_the_children_of_a_killed_supervisor_are_gone_when_its_worker_starts_again(tmp_path: Path, mark: str) -> None:
    restored = list[str]()
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "ignores-signals"}})
    options = fake_options(restarts=QUICK, grace=StopGrace(interrupt_s=0.2, terminate_s=0.2))
    with Deployment(topology, options=options) as deployment, waiting(deployment, restored):
        pid = deployment.worker("coder").pid
        assert pid is not None
        supervisor = psutil.Process(pid).parent()
        assert supervisor is not None
        supervisor.kill()
        assert wait_until(lambda: restored == ["restored"])
        assert pid not in {process.pid for process in marked(mark)}
        assert deployment.worker("coder").launch_count == 2


# ---- ending --------------------------------------------------------------------------------------------------------


def test_a_worker_that_ignores_signals_is_killed_when_its_grace_is_over(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "ignores-signals"}})
    options = fake_options(grace=StopGrace(interrupt_s=0.5, terminate_s=0.3))
    with Deployment(topology, options=options) as deployment:
        began = time.monotonic()
    assert time.monotonic() - began >= 0.8
    coder = deployment.worker("coder")
    assert coder.tail()[-3:] == ["ignoring 2", "ignoring 2", "ignoring 15"]
    assert coder.process is not None
    assert coder.process.status == -signal.SIGKILL


def test_a_workers_children_are_left_to_it_for_as_long_as_it_may_end_by_itself(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "parent"}})
    with Deployment(topology, options=fake_options()) as deployment:
        assert wait_until(lambda: "child is here" in deployment.worker("coder").tail())
    told = deployment.worker("coder").tail()
    assert told[-1] == "leaving on SIGINT after its child was ended by SIGKILL"
    assert not [line for line in told if line.startswith("child got")]


def test_what_a_worker_forked_ends_with_it(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "forks"}})
    with Deployment(topology, options=fake_options()) as deployment:
        # two workers with a supervisor each, and the three that one of them forked; the router bears no mark
        assert wait_until(lambda: len(marked(mark)) == 7, timeout_s=2.0)
        pid = deployment.worker("coder").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="coder ended while it served: killed by SIGKILL"):
            deployment.wait()
        assert wait_until(lambda: len(marked(mark)) == 2, timeout_s=2.0)


def test_a_killed_supervisor_takes_its_worker_with_it(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark, coder={"args": {"fake": "ignores-signals"}})
    with Deployment(topology, options=fake_options()) as deployment:
        pid = deployment.worker("coder").pid
        assert pid is not None
        supervisor = psutil.Process(pid).parent()
        assert supervisor is not None
        supervisor.kill()
        with pytest.raises(WorkerError, match="coder ended while it served"):
            deployment.wait()
        assert pid not in {process.pid for process in marked(mark)}


def test_a_caller_that_fails_leaves_nothing(tmp_path: Path, mark: str) -> None:
    topology = fake_topology(tmp_path, mark)
    with pytest.raises(ZeroDivisionError), Deployment(topology, options=fake_options()):
        raise ZeroDivisionError


def test_an_observer_sees_every_state_in_order(tmp_path: Path, mark: str) -> None:
    class Recorder(Silent):
        def __init__(self) -> None:
            self.seen: list[tuple[str, State]] = []

        def on_state(self, worker: Worker) -> None:
            self.seen.append((worker.name, worker.state))

        def on_wait(self, workers: Sequence[Worker]) -> None: ...

    recorder = Recorder()
    with Deployment(fake_topology(tmp_path, mark), options=fake_options(), observer=recorder):
        pass
    for name in ("base", "coder", "router"):
        states = [state for seen, state in recorder.seen if seen == name]
        assert states == [State.WAITING, State.STARTING, State.READY, State.STOPPING, State.ENDED]


def test_exits_are_described() -> None:
    assert describe_exit(ExitStatus(3)) == "exit status 3"
    assert describe_exit(ExitStatus(-9)) == "killed by SIGKILL (out of memory?)"
    assert describe_exit(ExitStatus(-15)) == "killed by SIGTERM"
