"""Counters of a point are differences, summed over workers by side."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from sglang_prefillshare.workloads.report import stage_means
from sglang_prefillshare.workloads.watch import Counters, Loads, cpu_seconds, stages


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


def test_stages_are_sglangs_and_their_means_are_of_a_point_alone():
    def page(forward_s: float, count: int) -> dict[str, float]:
        name = "sglang:per_stage_req_latency_seconds"
        text = f"""# TYPE {name} histogram
{name}_sum{{stage="prefill_forward",tp_rank="0"}} {forward_s}
{name}_count{{stage="prefill_forward",tp_rank="0"}} {count}
{name}_sum{{stage="prefill_bootstrap",tp_rank="0"}} 1.0
{name}_count{{stage="prefill_bootstrap",tp_rank="0"}} 2
# TYPE sglang:queue_time_seconds histogram
sglang:queue_time_seconds_sum{{tp_rank="0"}} {forward_s / 2}
sglang:queue_time_seconds_count{{tp_rank="0"}} {count}
"""
        return stages([sample for family in text_string_to_metric_families(text) for sample in family.samples])

    before, after = Counters({"prefill": page(1.0, 10)}, {}, {}), Counters({"prefill": page(1.5, 30)}, {}, {})
    assert stage_means(after.since(before).by_side["prefill"]) == {"prefill_forward": 25.0, "queue": 12.5}
