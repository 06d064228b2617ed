"""`preload.py` with a small module in SGLang's place: real forks, pipes and signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from sglang_prefillshare.preload import Preloader
from sglang_prefillshare.process import StopGrace, SupervisedProcess
from test.unit.deploying import wait_until

GRACE = StopGrace(interrupt_s=2.0, terminate_s=1.0)

HEAVY = """
import os
IMPORTED_BY = os.getpid()
"""
MAIN = """
import json, os, signal, sys, time
import heavy
if __name__ == "__main__":
    print(json.dumps({
        "imported_here": heavy.IMPORTED_BY == os.getpid(), "args": sys.argv[1:], "name": os.environ.get("NAME"),
        "ours": os.environ.get("PREFILLSHARE_OURS"), "stdin": sys.stdin.read(),
        "leads_a_group": os.getpgid(0) == os.getpid(),
        "open": sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in os.listdir("/proc/self/fd")
                       if os.path.exists(f"/proc/self/fd/{fd}")),
    }), flush=True)
    if "wait" in sys.argv:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    sys.exit(3)
"""


class Worker:
    """One process that is started through `preloader`, and what it said."""

    def __init__(self, preloader: Preloader, env: Mapping[str, str], *args: str) -> None:
        self.ended = threading.Event()
        self.process = SupervisedProcess(
            "worker",
            [sys.executable, "-m", "heavy_main", *args],
            env=env,
            on_line=lambda _: None,
            on_exit=lambda _: self.ended.set(),
            grace=GRACE,
            preloader=preloader,
        )

    def said(self) -> str:
        return "\n".join(self.process.tail(50))

    def until(self, text: str) -> None:
        assert wait_until(lambda: text in self.said(), timeout_s=10), self.said()


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "heavy.py").write_text(HEAVY)
    (tmp_path / "heavy_main.py").write_text(MAIN)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "NAME": "value"}


@pytest.fixture
def preloader(env: dict[str, str]) -> Iterator[Preloader]:
    with Preloader(["heavy"], env, free=("PYTEST_CURRENT_TEST",)) as made:
        yield made


def test_a_worker_is_forked_and_is_otherwise_as_a_new_process(preloader: Preloader, env: dict[str, str]) -> None:
    worker = Worker(preloader, {**env, "PREFILLSHARE_OURS": "1"}, "--flag", "a b")
    assert worker.process.wait(10) and worker.ended.wait(1)
    assert worker.process.status == 3
    said = worker.said()
    assert '"imported_here": false' in said, "the module was imported before the fork"
    assert '"args": ["--flag", "a b"]' in said and '"name": "value"' in said and '"ours": "1"' in said
    assert '"stdin": ""' in said and '"leads_a_group": true' in said
    assert '"open": ["/dev/null", "pipe", "pipe"]' in said, "no descriptor of the supervisor's, or of another worker's"


def test_one_that_is_asked_to_stop_is_interrupted_and_its_command_is_shown(
    preloader: Preloader, env: dict[str, str]
) -> None:
    worker = Worker(preloader, env, "wait")
    worker.until("imported_here")
    assert worker.process.pid is not None
    shown = " ".join(psutil.Process(worker.process.pid).cmdline()).strip()
    assert shown == f"{sys.executable} -m heavy_main wait"
    worker.process.stop()
    assert worker.process.wait(10)
    assert "interrupted" in worker.said() and worker.process.status == 3


@pytest.mark.parametrize("early", [True, False])
def test_one_that_is_killed_is_gone_even_if_it_was_not_there_yet(
    preloader: Preloader, env: dict[str, str], early: bool
) -> None:
    worker = Worker(preloader, env, "wait")
    if not early:
        worker.until("imported_here")
    worker.process.kill()
    assert worker.process.wait(10)
    assert worker.process.status in (3, -signal.SIGINT, -signal.SIGKILL)
    assert worker.process.pid is None or not psutil.pid_exists(worker.process.pid)


def test_a_killed_supervisor_takes_its_worker_along(preloader: Preloader, env: dict[str, str]) -> None:
    worker = Worker(preloader, env, "wait")
    worker.until("imported_here")
    assert worker.process.pid is not None
    main = psutil.Process(worker.process.pid)
    main.parent().kill()  # type: ignore[union-attr]
    assert worker.process.wait(10) and worker.process.status == -signal.SIGKILL
    assert not main.is_running() or main.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("command", [["/bin/true"], [sys.executable, "-c", "pass"], [sys.executable, "-m"]])
def test_only_modules_are_forked(preloader: Preloader, env: dict[str, str], command: list[str]) -> None:
    assert not preloader.can_start(command, env)


def test_another_environment_is_started_anew(preloader: Preloader, env: dict[str, str]) -> None:
    worker = Worker(preloader, {**env, "NAME": "other"})
    assert worker.process.wait(10)
    assert '"imported_here": true' in worker.said() and '"name": "other"' in worker.said()


def test_workers_outlive_it_and_later_ones_are_started_anew(preloader: Preloader, env: dict[str, str]) -> None:
    first = Worker(preloader, env, "wait")
    first.until("imported_here")
    preloader.close()
    later = Worker(preloader, env)
    assert later.process.wait(10) and '"imported_here": true' in later.said()
    assert first.process.status is None
    first.process.stop()
    assert first.process.wait(10) and first.process.status == 3


def test_what_cannot_be_imported_the_worker_says_itself(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("raise RuntimeError('no such library')")
    with Preloader(["heavy"], env, free=("PYTEST_CURRENT_TEST",)) as preloader:
        worker = Worker(preloader, env)
        assert worker.process.wait(10)
        assert worker.process.status == 1 and "RuntimeError: no such library" in worker.said()
