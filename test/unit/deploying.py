"""What the tests of deployments share: topologies of fake workers, and a search for what they left running."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from sglang_prefillshare.config import Topology, topology_from
from sglang_prefillshare.deployment import Deployment, DeploymentOptions
from sglang_prefillshare.plans import Commands
from sglang_prefillshare.process import StopGrace

FAKE_COMMAND = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
_MARK = "PREFILLSHARE_TEST_MARK"


@contextlib.contextmanager
def in_a_thread(deployment: Deployment, wait: Callable[[], None], *, ends_within_s: float) -> Iterator[None]:
    """`wait`, which serves until `deployment` is asked to stop, in a thread of its own; it ends with the block."""
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        deployment.request_stop()
        thread.join(timeout=ends_within_s)
        assert not thread.is_alive()


def fake_options(**changes: Any) -> DeploymentOptions:
    values: dict[str, Any] = {
        "ready_timeout_s": 20.0,
        "grace": StopGrace(interrupt_s=10.0, terminate_s=5.0),
        "poll_interval_s": 0.05,
        "commands": Commands(FAKE_COMMAND, FAKE_COMMAND),
        **changes,
    }
    return DeploymentOptions(**values)


def fake_topology(directory: Path, mark: str, *, base: Any = None, coder: Any = None, **changes: Any) -> Topology:
    """One base worker and one decode module; `base` and `coder` are keys to add, often `args`."""
    return topology_from(topology_data(directory, mark, base=base, coder=coder, **changes), directory=directory)


def topology_data(directory: Path, mark: str, *, base: Any = None, coder: Any = None, **changes: Any) -> dict[str, Any]:
    (directory / "model").mkdir(exist_ok=True)
    return {
        "base": {"model": "model", **(base or {})},
        "decode": [{"name": "coder", "model": "model", **(coder or {})}],
        "env": {_MARK: mark},
        **changes,
    }


def new_mark() -> str:
    return uuid.uuid4().hex


def marked(mark: str) -> list[psutil.Process]:
    """Every process that inherited `mark`: workers, their supervisors and all that they started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            if process.pid != os.getpid() and is_alive and process.environ().get(_MARK) == mark:
                found.append(process)
    return found


@contextlib.contextmanager
def nothing_left(mark: str, *, timeout_s: float = 0.5) -> Iterator[None]:
    """After the block, no marked process is left; one that is, is ended, so that it cannot disturb other tests."""
    try:
        yield
        assert wait_until(lambda: not marked(mark), timeout_s=timeout_s), [p.cmdline() for p in marked(mark)]
    finally:
        for process in marked(mark):
            process.kill()


def wait_until(condition: Any, *, timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
