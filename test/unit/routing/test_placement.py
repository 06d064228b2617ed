"""Choosing the workers of a request: what a second attempt keeps, and what it says when there is nobody."""

import json

import pytest

from sglang_prefillshare.request_fields import NO_LIMITS
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.placement import Placer, UnplacedError
from sglang_prefillshare.routing.prefix_index import PrefixIndex
from sglang_prefillshare.routing.request import Endpoint, parse_request
from sglang_prefillshare.routing.telemetry import Metrics
from sglang_prefillshare.routing.verdicts import Status, Verdict
from sglang_prefillshare.routing.workers import WorkerPool

READY = Verdict(Status.READY, None)
DOWN = Verdict(Status.DOWN, "does not answer")


@pytest.fixture
def pool():
    config = RouterConfig(prefill=["http://p:1", "http://p:2"], decode={"planner": ["http://d:1", "http://d:2"]})
    pool = WorkerPool(config, index=PrefixIndex(capacity_blocks=100))
    for worker in pool:
        worker.verdict = READY
    pool.config = config
    return pool


@pytest.fixture
def placer(pool):
    return Placer(pool.config, pool=pool, index=PrefixIndex(capacity_blocks=100), metrics=Metrics())


@pytest.fixture
def request_():
    raw = json.dumps({"model": "planner", "text": "hello", "user": "s"}).encode()
    return parse_request(
        Endpoint.GENERATE, raw, headers={}, modules=["planner"], path_module=None, limits_of=lambda _: NO_LIMITS
    )


def test_only_the_worker_that_failed_is_replaced(placer, request_):
    first = placer.place(request_, [])
    again = placer.place(request_, [], before=first, instead_of=[first.prefill.worker])
    assert again.prefill.worker is not first.prefill.worker
    assert again.decode is first.decode
    again = placer.place(request_, [], before=first, instead_of=[first.decode.worker])
    assert again.prefill is first.prefill
    assert again.decode.worker is not first.decode.worker


def test_a_worker_that_is_not_ready_any_more_is_replaced_too(placer, request_):
    first = placer.place(request_, [])
    first.decode.worker.verdict = DOWN
    again = placer.place(request_, [], before=first, instead_of=[first.prefill.worker])
    assert again.prefill.worker is not first.prefill.worker
    assert again.decode.worker is not first.decode.worker


def test_where_nobody_is_left_it_says_so(pool, placer, request_):
    first = placer.place(request_, [])
    other = next(worker for worker in pool.prefill if worker is not first.prefill.worker)
    assert placer.can_replace_prefill(first.prefill.worker)
    other.verdict = DOWN
    assert not placer.can_replace_prefill(first.prefill.worker)
    with pytest.raises(UnplacedError, match=r"No other prefill worker is ready\."):
        placer.place(request_, [], before=first, instead_of=[first.prefill.worker])
    first.prefill.worker.verdict = DOWN
    with pytest.raises(UnplacedError, match="No prefill worker is ready: http://p:"):
        placer.place(request_, [])


def test_a_router_that_stops_places_nothing(pool, placer, request_):
    placer.is_stopping = True
    assert not placer.can_replace_prefill(pool.prefill[0])
    with pytest.raises(UnplacedError, match=r"The router is stopping\."):
        placer.place(request_, [])
