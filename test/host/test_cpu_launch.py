"""On a CPU host a worker's processes are forked: the composed path is every server of the end-to-end tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from test.support.models import make_base
from test.support.servers import launch_server

ROOT = Path(__file__).parents[2]
ASK = """
import multiprocessing, threading, time
multiprocessing.set_start_method("spawn")
from sglang_prefillshare.host.cpu import launch
{before}
launch.check_server_args(None)
print("start method:", multiprocessing.get_start_method())
"""


@pytest.mark.timeout(300)
def test_a_servers_processes_are_forked_from_the_one_that_was_started(tmp_path: Path) -> None:
    with launch_server(make_base(tmp_path / "base")) as url:
        port = url.rpartition(":")[2]
        server = next(
            process
            for process in psutil.process_iter(["cmdline"])
            if port in (process.info["cmdline"] or ())
            and "sglang.launch_server" in process.info["cmdline"]
            and "sglang_prefillshare.process" not in process.info["cmdline"]
        )
        names = [" ".join(child.cmdline()) for child in server.children(recursive=True)]
        assert len(names) >= 2
        assert not any("resource_tracker" in name or "spawn_main" in name for name in names), names


@pytest.mark.parametrize(
    ("before", "threads", "expected"),
    [
        ("", "1", "fork"),
        ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "1", "spawn"),
        ("", "2", "spawn"),
        ('multiprocessing.set_start_method("forkserver", force=True)', "1", "forkserver"),
    ],
)
def test_it_forks_only_a_process_of_one_thread(before: str, threads: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(before=before)],
        capture_output=True, text=True, timeout=100, cwd=ROOT,
        env={"OMP_NUM_THREADS": threads, "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert f"start method: {expected}" in done.stdout, done.stderr[-2000:]
