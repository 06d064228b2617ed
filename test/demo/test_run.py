"""What `make demo` runs, in its smallest form and to its last line.

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
def test_one_turn_of_few_tokens(tmp_path: Path) -> None:
    command = [sys.executable, "examples/demo/run.py", "--turns", "1", "--max-new-tokens", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "report.json").read_text())["oracle_equal"] == 2 * 3
