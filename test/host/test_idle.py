"""The thread that computes asks for whole slices of a core, and no other thread of its process does."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang_prefillshare.host.cpu.idle import compute_in_whole_slices


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="waits for Linux: SCHED_BATCH is its own")
def test_only_the_thread_that_asks_is_changed() -> None:
    def ask() -> int:
        compute_in_whole_slices()
        return os.sched_getscheduler(0)

    before = os.sched_getscheduler(0)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask).result() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before == os.SCHED_OTHER
