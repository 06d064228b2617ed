"""Spans of calls and legs, over OpenTelemetry's SDK: the extra `otel`, imported only where an endpoint is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import urlsplit

from sglang_prefillshare import __version__
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.telemetry import CallRecord, Outcome
from sglang_prefillshare.routing.tracing import Attributes, CallTrace, Headers, LegTrace, Tracer

try:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ConfigError(
        f"--otlp-endpoint needs OpenTelemetry ({error}). Install it: pip install 'sglang-prefillshare[otel]'."
    ) from error

_EXPORT_TIMEOUT_S: Final = 5
_TRACES_PATH: Final = "/v1/traces"
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_PROPAGATED: Final = frozenset({"traceparent", "tracestate"})
_GOOD_LEG_ENDS: Final = frozenset({"whole", "left"})


def otlp_tracer(endpoint: str) -> OtelTracer:
    """Sends to a collector; `endpoint` is its address, or the whole URL that takes traces."""
    url = endpoint if urlsplit(endpoint).path else endpoint + _TRACES_PATH
    provider = TracerProvider(
        resource=Resource.create({"service.name": "prefillshare-router", "service.version": __version__})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=_EXPORT_TIMEOUT_S)))
    return OtelTracer(provider)


class OtelTracer(Tracer):
    """A span for each call, beneath it one for each leg. A call is part of its client's trace, where it names one."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("sglang_prefillshare", __version__)

    def call(self, endpoint: str, headers: Sequence[tuple[str, str]]) -> CallTrace:
        carrier = {name: value for name, value in headers if name in _PROPAGATED}
        parent = _PROPAGATOR.extract(carrier, context=Context())
        return _Call(self, self._tracer.start_span(f"POST {endpoint}", context=parent, kind=SpanKind.SERVER))

    def leg(self, call: Span, role: str, worker: str) -> LegTrace:
        span = self._tracer.start_span(
            f"{role} leg",
            context=set_span_in_context(call, Context()),
            kind=SpanKind.CLIENT,
            attributes={"prefillshare.role": role, "prefillshare.worker": worker},
        )
        return _Leg(span)

    def close(self) -> None:
        self._provider.shutdown()


class _Call(CallTrace):
    def __init__(self, tracer: OtelTracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span

    def leg(self, role: str, worker: str) -> LegTrace:
        return self._tracer.leg(self._span, role, worker)

    def end(self, record: CallRecord) -> None:
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            if value is not None:
                self._span.set_attribute(f"prefillshare.{field.name}", value)
        if record.status is not None:
            self._span.set_attribute("http.response.status_code", record.status)
        if record.outcome is not Outcome.OK:
            self._span.set_status(Status(StatusCode.ERROR, record.error or record.outcome))
        self._span.end()


class _Leg(LegTrace):
    def __init__(self, span: Span) -> None:
        self._span = span

    def carried(self, headers: Headers) -> Headers:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, context=set_span_in_context(self._span, Context()))
        return [*((name, value) for name, value in headers if name not in _PROPAGATED), *carrier.items()]

    def end(self, end: str, attributes: Callable[[], Attributes]) -> None:
        self._span.set_attributes({"prefillshare.end": end, **attributes()})
        if end not in _GOOD_LEG_ENDS:
            self._span.set_status(Status(StatusCode.ERROR, end))
        self._span.end()
