"""What handoffs cost, at a worker's `/metrics`: counted where they end, in the scheduler's process.

SGLang serves the metrics of all its processes from files (Prometheus' multiprocess mode), so what is counted here
appears at the worker's HTTP server without further ado. `side` is prefill or decode; `source` says where decode has the
KV from: `moved` by this handoff, or `held` since an earlier one; `outcome` is ok, failed, aborted (by the client, or
with its other leg) or refused (the receipt did not match).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

OUTCOMES: Final = ("ok", "failed", "aborted", "refused")
SOURCES: Final = ("moved", "held")
_SECONDS: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)


@dataclass(frozen=True, slots=True)
class _Metrics:
    handoffs: Any
    tokens: Any
    bytes: Any
    seconds: Any
    pages: Any


@cache
def _metrics() -> _Metrics:
    # Imported here: the library decides at import, by an environment variable that SGLang sets, where counts go.
    from prometheus_client import Counter, Gauge, Histogram

    return _Metrics(
        handoffs=Counter("prefillshare_handoffs", "Handoffs that ended.", ("side", "outcome")),
        tokens=Counter(
            "prefillshare_handoff_tokens",
            "Prompt tokens whose base KV decode needed, by where it had it from; prefill counts whole pages.",
            ("side", "source", "outcome"),
        ),
        bytes=Counter(
            "prefillshare_handoff_bytes", "Bytes of KV of those tokens, in whole pages.", ("side", "source", "outcome")
        ),
        seconds=Histogram(
            "prefillshare_handoff_seconds",
            "decode: from the last page lent to decode having taken its KV over; prefill: pages kept after the last "
            "one was lent.",
            ("side", "outcome"),
            buckets=_SECONDS,
        ),
        pages=Gauge(
            "prefillshare_pages_leased",
            "prefill: pages on loan to decode; decode: pages of its own that wait for KV.",
            ("side",),
            multiprocess_mode="livesum",
        ),
    )


def prepare(side: str) -> None:
    """Have all series of this side there from the start, at zero; before threads count."""
    metrics = _metrics()
    for outcome in OUTCOMES:
        metrics.handoffs.labels(side, outcome)
        metrics.seconds.labels(side, outcome)
        for source in SOURCES:
            metrics.tokens.labels(side, source, outcome)
            metrics.bytes.labels(side, source, outcome)
    set_pages(side, 0)


def observe(
    side: str,
    outcome: str,
    *,
    moved_tokens: int,
    moved_bytes: int,
    held_tokens: int = 0,
    held_bytes: int = 0,
    seconds: float | None = None,
) -> None:
    """Count one handoff that ended."""
    metrics = _metrics()
    metrics.handoffs.labels(side, outcome).inc()
    for source, tokens, size in zip(SOURCES, (moved_tokens, held_tokens), (moved_bytes, held_bytes), strict=True):
        metrics.tokens.labels(side, source, outcome).inc(tokens)
        metrics.bytes.labels(side, source, outcome).inc(size)
    if seconds is not None:
        metrics.seconds.labels(side, outcome).observe(seconds)


def set_pages(side: str, page_count: int) -> None:
    """Say how many pages are tied up in handoffs now."""
    _metrics().pages.labels(side).set(page_count)
    _leased_pages[side] = page_count


def leased_pages() -> int:
    """What `set_pages` was told last; 0 where nothing counts them."""
    return sum(_leased_pages.values())


_leased_pages: Final[dict[str, int]] = {}
