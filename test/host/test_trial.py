"""`prefillshare doctor` as a user runs it: two real processes hand pages over, or it says why they cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.host import trial

pytestmark = pytest.mark.timeout(480)

CLOSED_MEMORY = Path(__file__).parents[1] / "support" / "closed_memory"


def doctor(*flags: str, **env: str) -> tuple[int, str]:
    """Exit status, and what it printed in one line."""
    command = [sys.executable, "-m", "sglang_prefillshare.cli", "doctor", *flags]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=420, check=False)
    return done.returncode, " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "threads",
    [
        pytest.param("1", id="forked"),
        # As with a GPU, and wherever a library has threads: two processes that import SGLang themselves.
        pytest.param("2", id="spawned", marks=pytest.mark.slow),
    ],
)
def test_here_pages_of_every_size_are_handed_over(threads: str) -> None:
    status, printed = doctor(OMP_NUM_THREADS=threads)
    assert status == 0, printed
    ok = r"Handoff .prefillshare, .* ok 72 pages of 1, 16, 64 tokens, .* all bytes equal, in ([\d.]+) s"
    found = re.search(ok, printed)
    assert found is not None and float(found[1]) < 15, printed
    assert printed.endswith("Ready.")


def test_where_no_process_can_map_anothers_memory_it_says_so_and_fails() -> None:
    status, printed = doctor(PYTHONPATH=os.pathsep.join([str(CLOSED_MEMORY), os.environ.get("PYTHONPATH", "")]))
    assert status == 1, printed
    failed = r"failed pages of 1 tokens were not handed over: cannot map .*: Permission denied"
    assert re.search(failed, printed), printed
    assert "--disaggregation-transfer-backend nixl" in printed and printed.endswith("Not ready.")


def test_what_arrives_as_something_else_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's look at it: of a page that is not the one that was sent, no more than a byte differs."""

    class End:
        def __init__(self, content: bytes) -> None:
            self._answers = [None, trial._Done(None, content)]

        def give(self, _task: object) -> None: ...

        def take(self, _deadline: float) -> object:
            return self._answers.pop(0)

    assert trial._hand_over(End(b"abc"), End(b"abc"), 16) == 3  # type: ignore[arg-type]
    with pytest.raises(HandoffError, match=r"pages of 16 tokens arrived with other bytes.*transfer-backend nixl"):
        trial._hand_over(End(b"abc"), End(b"abd"), 16)  # type: ignore[arg-type]
