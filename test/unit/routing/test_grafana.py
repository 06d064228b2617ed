"""The board in examples/grafana: every metric and label that it names is on the router's page."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from sglang_prefillshare.host.transfer import metrics as handoff_metrics
from test.unit.routing.routing_harness import run, running_system

BOARD = Path(__file__).parents[3] / "examples" / "grafana" / "prefillshare.json"
METRIC = re.compile(r"\bprefillshare_[a-z0-9_]+")
SELECTED = re.compile(r"(prefillshare_[a-z0-9_]+)\{([^}]*)\}")
LABEL = re.compile(r"([a-z_]+)(?:=~|!=|=)")
GROUPED = re.compile(r"\bby \(([^)]*)\)")
LEGEND = re.compile(r"\{\{(\w+)\}\}")


def expressions(board):
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"], target["legendFormat"]


def worker_page():
    """A worker's own, as its registry shows them, with one handoff counted on each side."""
    from prometheus_client import REGISTRY, generate_latest

    for side in ("prefill", "decode"):
        handoff_metrics.prepare(side)
        handoff_metrics.observe(side, "ok", moved_tokens=1, moved_bytes=1, seconds=0.1)
    return generate_latest(REGISTRY).decode()


def test_every_metric_and_label_that_the_board_names_is_on_the_routers_page():
    page = worker_page()
    found: dict[str, set[str]] = {}

    def prepare(prefill, decode):
        for worker in (*prefill, *(worker for group in decode.values() for worker in group)):
            worker.metrics = page

    async def scenario():
        async with running_system(prepare=prepare) as system:
            assert (await system.chat(stream=True)).status == 200
            metrics = system.router.metrics
            # What happens seldom has no series yet: its names are the registry's.
            metrics.legs_aborted.labels("decode", "client").inc(0)
            metrics.retries.labels("prefill").inc(0)
            metrics.abort_failures.labels("decode").inc(0)
            metrics.refusals.labels("planner", "full").inc(0)
            metrics.prefix_waits.labels("planner").inc(0)
            metrics.session_holds.labels("planner").inc(0)
            metrics.queued.labels("planner").inc(0)
            for family in text_string_to_metric_families((await system.get("/metrics")).body.decode()):
                for sample in family.samples:
                    found.setdefault(sample.name, set()).update(sample.labels)

    run(scenario())
    board = json.loads(BOARD.read_text())
    seen = set()
    for expression, legend in expressions(board):
        names = METRIC.findall(expression)
        assert names, expression
        for name in names:
            assert name in found, f"{name} is on the board and not on the router's page"
            seen.add(name)
        for name, selector in SELECTED.findall(expression):
            assert set(LABEL.findall(selector)) <= found[name], (name, selector)
        grouped = {label.strip() for labels in GROUPED.findall(expression) for label in labels.split(",")}
        everywhere = set.intersection(*(found[name] for name in names))
        assert grouped <= everywhere, expression
        assert set(LEGEND.findall(legend)) <= (grouped or everywhere), (expression, legend)
    ours = {name for name in found if name.startswith("prefillshare_router_") and not name.endswith("_created")}
    assert {name for name in ours if not name.endswith(("_sum", "_count", "_bucket"))} <= seen, "a metric is not shown"


def test_panels_lie_side_by_side_and_have_names_of_their_own():
    panels = json.loads(BOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
