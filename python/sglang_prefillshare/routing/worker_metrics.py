"""The workers' handoff metrics as the router shows them: summed over workers, by decode module. Pure functions.

The sums are of the processes that run now: when a worker restarts, or does not answer, its counts are missing and a
sum falls. Prometheus takes that for a counter reset, so a `rate()` across such a moment is too high: for exact rates
scrape the workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

WORKER_METRICS_PATH: Final = "/metrics"

_FAMILY_PREFIXES: Final = ("prefillshare_handoff", "prefillshare_pages")
_LINE_PREFIXES: Final = tuple(start + prefix for start in ("", "# HELP ", "# TYPE ") for prefix in _FAMILY_PREFIXES)
_CREATED: Final = "_created"
"""When a process began to count; a sum of such times means nothing."""


def parse_handoff_families(page: str) -> list[Metric]:
    """The handoff families of one worker's page (Prometheus text). Raises `ValueError` where they are not that.

    SGLang's own families fill most of the page; they are left out before parsing, which is slow.
    """
    lines = [line for line in page.split("\n") if line.startswith(_LINE_PREFIXES)]
    try:
        families = list(text_string_to_metric_families("\n".join(lines)))
    except IndexError as error:  # the parser's, at an empty label name
        raise ValueError(f"not Prometheus text: {error!r}") from error
    return [family for family in families if not family.name.endswith(_CREATED)]


def sum_families(pages: Iterable[tuple[str, Sequence[Metric]]]) -> list[Metric]:
    """Sums over workers; a page is a worker's model name and its families.

    Samples are summed for each set of labels, to which `model` is added. The label `pid`, which tells the processes
    of one worker apart, is summed over. Histograms are sums of their buckets, so all workers must have the same
    ones. A family keeps the type that it had first; of another type it is left out.
    """
    found: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for model, families in pages:
        for family in families:
            first = found.setdefault(family.name, family)
            if family.type != first.type:
                continue
            values = sums.setdefault(family.name, {})
            for sample in family.samples:
                labels = {name: value for name, value in sample.labels.items() if name != "pid"} | {"model": model}
                key = (sample.name, tuple(sorted(labels.items())))
                values[key] = values.get(key, 0.0) + sample.value
    summed = []
    for name, values in sums.items():
        text = f"{found[name].documentation} Summed over the workers that answer; falls when one of them restarts."
        metric = Metric(name, text.lstrip(), found[name].type)
        for (sample_name, labels_of_sample), value in values.items():
            metric.add_sample(sample_name, dict(labels_of_sample), value)
        summed.append(metric)
    return summed
