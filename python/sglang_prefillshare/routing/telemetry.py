"""What the router remembers and counts about its calls: Prometheus metrics and the recent-call log."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric

call_logger = logging.getLogger("sglang_prefillshare.calls")


class Outcome(StrEnum):
    """How a call ended; a label of the request counter."""

    OK = "ok"
    REJECTED = "rejected"  # by the router: the request itself
    UNAVAILABLE = "unavailable"  # a worker that the call needs is missing or was lost
    WORKER_REFUSED = "worker_refused"  # a worker answered 4xx
    WORKER_FAILED = "worker_failed"  # a worker answered 5xx, or its connection broke
    DISCONNECTED = "disconnected"  # the client left
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"  # no worker had room for it in time
    CANCELLED = "cancelled"  # the router was made to stop at once
    INTERNAL = "internal"  # a bug of ours


@dataclass(slots=True)
class Timings:
    """When what happened to a call: `started_at` by the clock on the wall, the rest by `time.perf_counter`; `None` is
    not yet, or never."""

    started_at: float = field(default_factory=time.time)
    began_s: float = field(default_factory=time.perf_counter)
    received_s: float | None = None  # its body was read
    sent_s: float | None = None  # its last leg was sent off
    first_byte_s: float | None = None  # of a stream
    answered_s: float | None = None  # decode's answer was read to its end

    queue_ms: float = 0.0  # how long it waited for room

    @property
    def overhead_ms(self) -> float | None:
        """Without the wait for room."""
        if self.sent_s is None or self.received_s is None:
            return None
        return (self.sent_s - self.received_s) * 1000 - self.queue_ms

    @property
    def ttft_ms(self) -> float | None:
        return None if self.first_byte_s is None else (self.first_byte_s - self.began_s) * 1000

    @property
    def e2e_ms(self) -> float:
        """Until decode's answer, or until now."""
        return ((self.answered_s if self.answered_s is not None else time.perf_counter()) - self.began_s) * 1000


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One finished call. Times in milliseconds; what was never measured is `None`.

    The token counts come from the prefill worker: what the base had to hold, what it found, and what of that
    was first computed for another decode module. `decision` is why the prefill worker was chosen, `matched_tokens`
    what it was expected to hold, by `matched_by` (its events, or a guess); `decode_decision` and
    `decode_matched_tokens` are the same of the decode worker.
    `queue_ms` is how long it waited for room, which `overhead_ms` leaves out.
    `rid` is the client's name of the call, `worker_rids` the workers'. `attempts` counts the pairs of legs; all else
    is the last pair's. `caller` names the client's key, where keys are asked for.
    """

    rid: str
    worker_rids: tuple[str, ...]
    model: str
    endpoint: str
    prefill_worker: str | None
    decode_worker: str | None
    decision: str | None
    matched_tokens: int | None
    decode_decision: str | None
    decode_matched_tokens: int | None
    attempts: int
    prefill_tokens: int | None
    cached_tokens: int | None
    cross_model_cached_tokens: int | None
    queue_ms: float
    overhead_ms: float | None
    ttft_ms: float | None
    e2e_ms: float
    status: int | None
    outcome: Outcome
    error: str | None
    started_at: float
    caller: str | None = None
    matched_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _RECORDED}


_RECORDED: Final = tuple(known.name for known in dataclasses.fields(CallRecord))


def log_call(record: CallRecord) -> None:
    """A line for a finished call, with the whole record for whoever writes lines of fields (`json_logs`)."""
    call_logger.info("%s %s: %s", record.endpoint, record.rid, record.outcome, extra={"call": record.to_json()})


class CallLog:
    """The last calls, oldest first, bounded."""

    def __init__(self, *, size: int) -> None:
        self._records: deque[CallRecord] = deque(maxlen=size)

    def add(self, record: CallRecord) -> None:
        self._records.append(record)

    def find(self, *, rid: str | None = None, limit: int | None = None) -> list[CallRecord]:
        records = [r for r in self._records if rid is None or rid == r.rid or rid in r.worker_rids]
        return records if limit is None else records[max(0, len(records) - limit) :]


_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_QUEUE_BUCKETS_S = (0.0005, *_LATENCY_BUCKETS_S)
_OVERHEAD_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


M = TypeVar("M", Counter, Gauge, Histogram)


class Family(Generic[M]):
    """A metric with a child for each set of labels, none of which is ever taken away.

    The library makes strings of the labels and takes a lock each time that it is asked for a child, which was more than
    half of what counting a call took: here it is asked once for each.
    """

    def __init__(self, metric: M) -> None:
        self.labels: Callable[..., M] = functools.cache(metric.labels)


class Metrics:
    """The router's counters, in a registry of its own so that several routers can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Family[Counter]:
            return Family(Counter(f"prefillshare_router_{name}", text, labels, registry=self.registry))

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"prefillshare_router_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Family[Histogram]:
            found = Histogram(f"prefillshare_router_{name}", text, ("model",), buckets=buckets, registry=self.registry)
            return Family(found)

        self.requests = counter("requests", "Finished calls.", "model", "endpoint", "outcome")
        self.inflight = Family(gauge("inflight_requests", "Calls in flight.", "model"))
        self.prefill_tokens = counter("prefill_tokens", "Prompt tokens that the base had to hold.", "model")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens whose base KV was already there.", "model")
        self.cross_model_cached_tokens = counter(
            "cross_model_cached_tokens", "Cached tokens first computed for another decode module.", "model"
        )
        self.predicted_tokens = counter(
            "predicted_tokens", "Prompt tokens that the prefill worker was expected to hold.", "source"
        )
        self.found_tokens = counter(
            "found_tokens", "Prompt tokens of the same calls that it then found in its tree.", "source"
        )
        self.prediction_error_tokens = counter(
            "prediction_error_tokens", "By how many tokens the two differ, added up call by call.", "source"
        )
        self.decisions = counter("decisions", "Choices of a worker, by reason.", "role", "reason")
        self.legs_aborted = counter("legs_aborted", "Legs ended before their answer was complete.", "role", "cause")
        self.abort_failures = counter("abort_failures", "Abort messages that no worker confirmed.", "role")
        self.retries = counter(
            "retries", "Calls tried again: a worker of that role refused the connection, or was lost.", "role"
        )
        self.queued = Family(gauge("queued_requests", "Calls that wait for room.", "model"))
        self.session_holds = counter(
            "session_holds", "Calls that waited because other sessions' contexts fill the pools.", "model"
        )
        self.prefix_waits = counter(
            "prefix_waits", "Calls that waited for a prefix that another one was having computed.", "model"
        )
        self.refusals = counter("refusals", "Calls turned away, as no worker had room for them.", "model", "reason")
        self.worker_ready = gauge("worker_ready", "1 if the worker takes requests.", "role", "model", "worker")
        self.worker_breaker_open = gauge(
            "worker_breaker_open",
            "1 if it failed several times in a row and others get its requests.",
            *("role", "model", "worker"),
        )
        self.worker_metrics_missing = gauge(
            "worker_metrics_missing",
            "1 if the sums of the workers' prefillshare_handoff and prefillshare_pages metrics on this page lack the "
            "worker's: it is down, did not answer at /metrics in time, or shows none there.",
            *("role", "model", "worker"),
        )
        self.worker_events_followed = gauge(
            "worker_events_followed",
            "1 if the worker's own events say what its tree holds; else it is guessed.",
            "worker",
        )
        self.worker_inflight = gauge("worker_inflight_legs", "Legs in flight.", "role", "model", "worker")
        self.worker_inflight_tokens = gauge(
            "worker_inflight_prefill_tokens", "Estimated tokens that prefill legs in flight have to compute.", "worker"
        )
        self.ttft_s = histogram("ttft_seconds", "Request in to first streamed byte of decode.", _LATENCY_BUCKETS_S)
        self.e2e_s = histogram("e2e_seconds", "Request in to last byte out, if it ended ok.", _LATENCY_BUCKETS_S)
        self.overhead_s = histogram(
            "overhead_seconds", "Request body in to both legs sent off, without the wait for room.", _OVERHEAD_BUCKETS_S
        )
        self.queue_s = histogram("queue_seconds", "Wait for room, of calls that were sent off.", _QUEUE_BUCKETS_S)

    def forget_workers(self) -> None:
        """Drop what is shown of each worker, before it is set again for those that there are."""
        for gauge in (
            *(self.worker_ready, self.worker_breaker_open, self.worker_metrics_missing),
            *(self.worker_inflight, self.worker_inflight_tokens, self.worker_events_followed),
        ):
            gauge.clear()

    def observe(self, record: CallRecord) -> None:
        """Count one finished call."""
        self.requests.labels(record.model, record.endpoint, record.outcome).inc()
        if record.prefill_tokens is not None:
            self.prefill_tokens.labels(record.model).inc(record.prefill_tokens)
        if record.cached_tokens is not None:
            self.cached_tokens.labels(record.model).inc(record.cached_tokens)
        if record.cross_model_cached_tokens is not None:
            self.cross_model_cached_tokens.labels(record.model).inc(record.cross_model_cached_tokens)
        if None not in (record.matched_by, record.matched_tokens, record.cached_tokens):
            assert record.matched_tokens is not None and record.cached_tokens is not None
            self.predicted_tokens.labels(record.matched_by).inc(record.matched_tokens)
            self.found_tokens.labels(record.matched_by).inc(record.cached_tokens)
            error = abs(record.matched_tokens - record.cached_tokens)
            self.prediction_error_tokens.labels(record.matched_by).inc(error)
        if record.overhead_ms is not None:
            self.overhead_s.labels(record.model).observe(record.overhead_ms / 1000)
            self.queue_s.labels(record.model).observe(record.queue_ms / 1000)
        if record.ttft_ms is not None:
            self.ttft_s.labels(record.model).observe(record.ttft_ms / 1000)
        if record.outcome is Outcome.OK:
            self.e2e_s.labels(record.model).observe(record.e2e_ms / 1000)

    def exposition(self, of_workers: Sequence[Metric] = ()) -> tuple[bytes, str]:
        """Our own metrics and those of workers, which share no name."""
        return generate_latest(self.registry) + generate_latest(_collected(of_workers)), CONTENT_TYPE_LATEST


class _Families:
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _collected(families: Sequence[Metric]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return registry
