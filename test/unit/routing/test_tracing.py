"""Spans of calls and legs, and what of a trace workers are told."""

import subprocess
import sys

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.app import Router
from test.unit.routing.routing_harness import run, running_system, until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


def test_without_an_endpoint_nothing_is_imported_and_a_clients_trace_passes():
    async def scenario():
        async with running_system() as system:
            assert (await system.chat(headers={"traceparent": TRACEPARENT})).status == 200
            for worker in (system.prefill[0], system.decode["planner"][0]):
                assert worker.seen[0].headers["traceparent"] == TRACEPARENT

    run(scenario())
    code = (
        "import sys; from sglang_prefillshare.routing.app import Router\n"
        "from sglang_prefillshare.routing.config import RouterConfig\n"
        "Router(RouterConfig(prefill=['http://a'], decode={'m': ['http://b']}))\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_endpoint_without_the_extra_is_refused_with_what_to_install():
    code = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None\n"
        "from sglang_prefillshare import cli\n"
        "sys.exit(cli.run(['route', '--prefill', 'http://a:1', '--decode', 'm=http://b:2',"
        " '--otlp-endpoint', 'http://c:4318']))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "pip install 'sglang-prefillshare[otel]'" in answer.stderr and "Traceback" not in answer.stderr


def traced(provider):
    from sglang_prefillshare.routing.otel import OtelTracer

    return lambda config: Router(config, tracer=OtelTracer(provider))


@pytest.fixture
def spans():
    reason = "waits for the extra otel: opentelemetry-sdk, opentelemetry-exporter-otlp-proto-http"
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=reason)
    trace = pytest.importorskip("opentelemetry.sdk.trace", reason=reason)
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter, provider


def test_a_call_is_a_span_of_its_clients_trace_with_one_beneath_it_for_each_leg(spans):
    exporter, provider = spans

    async def scenario():
        async with running_system(router=traced(provider)) as system:
            headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1", "x-request-id": "mine"}
            assert (await system.chat(headers=headers)).status == 200
            await until(lambda: len(exporter.get_finished_spans()) == 3)
            by_name = {span.name: span for span in exporter.get_finished_spans()}
            call = by_name["POST /v1/chat/completions"]
            assert f"{call.context.trace_id:032x}" == TRACE and f"{call.parent.span_id:016x}" == PARENT
            assert call.attributes["prefillshare.rid"] == "mine"
            assert call.attributes["prefillshare.outcome"] == "ok"
            assert call.attributes["prefillshare.cross_model_cached_tokens"] == 16
            assert call.attributes["http.response.status_code"] == 200 and call.status.is_ok
            for role, worker in (("prefill", system.prefill[0]), ("decode", system.decode["planner"][0])):
                leg = by_name[f"{role} leg"]
                assert leg.parent.span_id == call.context.span_id
                assert leg.attributes["prefillshare.worker"] == worker.url
                assert (leg.attributes["prefillshare.end"], leg.status.is_ok) == ("whole", True)
                seen = worker.seen[0].headers
                assert seen["traceparent"] == f"00-{TRACE}-{leg.context.span_id:016x}-01"
                assert seen["tracestate"] == "vendor=1"
            assert by_name["prefill leg"].attributes["prefillshare.cached_tokens"] == 32

    run(scenario())


def test_failures_end_their_spans_and_a_request_that_is_refused_has_one_too(spans):
    exporter, provider = spans

    async def scenario():
        async with running_system(router=traced(provider)) as system:
            system.prefill[0].behave, system.decode["planner"][0].behave = "broken", "hang"
            assert (await system.chat()).status == 500
            await until(lambda: len(exporter.get_finished_spans()) == 3)
            by_name = {span.name: span for span in exporter.get_finished_spans()}
            ends = {role: by_name[f"{role} leg"].attributes["prefillshare.end"] for role in ("prefill", "decode")}
            assert ends == {"prefill": "failed", "decode": "left"}
            assert not by_name["prefill leg"].status.is_ok and not by_name["POST /v1/chat/completions"].status.is_ok
            exporter.clear()
            assert (await system.chat("nobody")).status == 404
            (refused,) = exporter.get_finished_spans()
            assert refused.attributes["prefillshare.outcome"] == "rejected" and refused.parent is None

    run(scenario())


def test_a_bad_endpoint_is_refused():
    from sglang_prefillshare.routing.config import RouterConfig

    with pytest.raises(ConfigError, match="otlp_endpoint"):
        RouterConfig(prefill=["http://a"], decode={"m": ["http://b"]}, otlp_endpoint="collector:4318")
