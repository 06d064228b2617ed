"""What `make demo` and `make demo-disaggregated` run, in their smallest form and to the last line.

In a folder of its own: pytest comes here before any other test has servers up, and there is room for the demo's four.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "servers"),
    [
        pytest.param((), 1, id="unified"),
        pytest.param(("--disaggregated",), 5, id="disaggregated", marks=pytest.mark.slow),
    ],
)
def test_one_turn_of_few_tokens(tmp_path: Path, layout: tuple[str, ...], servers: int) -> None:
    command = [sys.executable, "examples/demo/run.py", "--turns", "1", "--max-new-tokens", "4", "--out", str(tmp_path)]
    command += layout
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["servers"], report["oracle_equal"]) == (servers, 2 * 3)
    assert (report["handoff_moved_bytes"] == 0) == (servers == 1)
