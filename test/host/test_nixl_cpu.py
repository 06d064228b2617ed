"""NIXL on a CPU host does not keep a core busy while nobody talks to it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

pytestmark = pytest.mark.nixl

PROGRAM = """
import time
from sglang_prefillshare.host.cpu.nixl import let_progress_thread_sleep
{patch}
from nixl._api import nixl_agent, nixl_agent_config
agent = nixl_agent("idle", nixl_agent_config(backends=[]))
agent.create_backend("UCX", {{}})
time.sleep(0.3)
before = time.process_time()
time.sleep(1.0)
print("used", time.process_time() - before)
"""


def used_s(patch: str) -> float:
    """Processor seconds of an agent in a second in which nothing happens."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(patch=patch)], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return float(ran.stdout.rpartition("used ")[2])


def test_the_progress_thread_sleeps() -> None:
    if importlib.util.find_spec("nixl") is None:
        pytest.skip("waits for a machine with the packages nixl and nixl-cu13")
    assert used_s("let_progress_thread_sleep(); let_progress_thread_sleep()") < 0.1
