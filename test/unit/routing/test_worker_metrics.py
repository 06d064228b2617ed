"""Sums of worker pages, against numbers added by hand; the pages come from prometheus_client itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sglang_prefillshare.routing.telemetry import Metrics
from sglang_prefillshare.routing.worker_metrics import parse_handoff_families, sum_families

BUCKETS = (0.1, 1.0)


def page(handoffs: dict[str, int], seconds: list[float], pages: dict[str, int]) -> str:
    """A worker's page: handoffs by outcome, durations, leased pages by process."""
    registry = CollectorRegistry()
    counter = Counter("prefillshare_handoffs", "Handoffs.", ("side", "outcome"), registry=registry)
    for outcome, count in handoffs.items():
        counter.labels("decode", outcome).inc(count)
    histogram = Histogram("prefillshare_handoff_seconds", "Times.", ("side",), buckets=BUCKETS, registry=registry)
    for value in seconds:
        histogram.labels("decode").observe(value)
    gauge = Gauge("prefillshare_pages_leased", "Pages.", ("side", "pid"), registry=registry)
    for pid, count in pages.items():
        gauge.labels("decode", pid).set(count)
    Counter("sglang:requests", "Theirs.", registry=registry).inc(99)
    Gauge("prefillshare_other", "Not about handoffs.", registry=registry).set(1)
    return generate_latest(registry).decode()


def summed(*pages: tuple[str, str]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What is on the router's page, read back: values by sample name and labels, of our families only."""
    families = sum_families((model, parse_handoff_families(text)) for model, text in pages)
    text = Metrics().exposition(families)[0].decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not family.name.startswith("prefillshare_router_")
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_counters_histograms_and_gauges_are_summed_by_model():
    found = summed(
        ("coder", page({"ok": 3, "failed": 1}, [0.05, 0.5], {"7": 10, "8": 5})),
        ("coder", page({"ok": 4}, [5.0], {"7": 1})),
        ("planner", page({"ok": 100}, [], {})),
    )
    coder = {"side": "decode", "model": "coder"}
    assert found == {
        key("prefillshare_handoffs_total", outcome="ok", **coder): 7,
        key("prefillshare_handoffs_total", outcome="failed", **coder): 1,
        key("prefillshare_handoffs_total", outcome="ok", side="decode", model="planner"): 100,
        key("prefillshare_handoff_seconds_bucket", le="0.1", **coder): 1,
        key("prefillshare_handoff_seconds_bucket", le="1.0", **coder): 2,
        key("prefillshare_handoff_seconds_bucket", le="+Inf", **coder): 3,
        key("prefillshare_handoff_seconds_count", **coder): 3,
        key("prefillshare_handoff_seconds_sum", **coder): 5.55,
        key("prefillshare_pages_leased", **coder): 16,
    }


counts = st.dictionaries(
    st.sampled_from(
        ["ok", "failed", 'odd "\\ \n {name}=,'],
    ),
    st.integers(0, 10**12),
)


@given(st.lists(st.tuples(st.sampled_from(["coder", "org/it's"]), counts), max_size=5))
def test_no_count_is_lost_or_made_up(workers):
    expected: dict[object, float] = {}
    for model, handoffs in workers:
        for outcome, count in handoffs.items():
            name = key("prefillshare_handoffs_total", side="decode", outcome=outcome, model=model)
            expected[name] = expected.get(name, 0) + count
    assert summed(*((model, page(handoffs, [], {})) for model, handoffs in workers)) == expected


def test_labels_may_stand_in_any_order():
    start = "# TYPE prefillshare_handoffs_total counter\nprefillshare_handoffs_total"
    pages = [start + '{side="d",outcome="ok"} 1\n', start + '{outcome="ok",side="d"} 2\n']
    assert list(summed(*(("m", text) for text in pages)).values()) == [3]


def test_a_page_of_other_families_has_none_of_ours():
    assert parse_handoff_families("# TYPE sglang:x gauge\nsglang:x 1\nhello prefillshare_handoffs_total\n") == []


def test_a_family_of_another_type_is_left_out():
    pages = [f"# TYPE prefillshare_pages_leased {kind}\nprefillshare_pages_leased 1\n" for kind in ("gauge", "untyped")]
    assert list(summed(*(("m", text) for text in pages)).values()) == [1]


@pytest.mark.parametrize("rest", ['{a="x"', '{a="x", ="y"} 3', " many", ""])
def test_what_is_not_prometheus_text_is_a_value_error(rest):
    with pytest.raises(ValueError):
        parse_handoff_families("prefillshare_handoffs_total" + rest)
