"""Counters of a point are differences, summed over workers by side."""

from __future__ import annotations

from sglang_prefillshare.workloads.watch import Counters, Loads, cpu_seconds


def test_what_was_there_before_does_not_count():
    before = Counters({"prefill": {"evicted_tokens": 5.0}}, {"prompt_tokens": 100.0}, {"prefill": 1.0})
    after = Counters({"prefill": {"evicted_tokens": 7.0}}, {"prompt_tokens": 130.0}, {"prefill": 1.5, "router": 2.0})
    found = after.since(before)
    assert found.by_side == {"prefill": {"evicted_tokens": 2.0}}
    assert found.router == {"prompt_tokens": 30.0} and found.cpu_s == {"prefill": 0.5, "router": 2.0}


def test_loads_keep_each_workers_peak():
    loads = Loads()
    for tokens, usage in ((5, 0.2), (9, 0.1), (3, 0.3)):
        loads.note("coder", tokens, usage)
    loads.note("planner", 1, 0.0)
    assert loads.peak_tokens == {"coder": 9, "planner": 1} and loads.peak_usage == {"coder": 0.3, "planner": 0.0}


def test_a_process_that_is_gone_has_used_no_time():
    assert cpu_seconds(2**22 - 1) == 0.0
