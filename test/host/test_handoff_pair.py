"""Pages handed over between two real processes arrive bit for bit, and nothing but them; over each backend we claim."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang_prefillshare.handoff.pool import PageList
from sglang_prefillshare.host.transfer.rig import Handoff, PoolShape, new_room
from test.support.handoff_pair import HandoffPair, handoff_pair

SHAPE = PoolShape(layers=4, kv_heads=2, head_dim=16, page_count=257)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA device")]
PAIRS = [
    pytest.param(("prefillshare", 1, "cpu"), id="prefillshare-1"),
    pytest.param(("prefillshare", 16, "cpu"), id="prefillshare-16"),
    pytest.param(("nixl", 16, "cpu"), id="nixl-16", marks=pytest.mark.nixl),
    pytest.param(("prefillshare", 1, "cuda"), id="prefillshare-1-cuda", marks=on_gpu),
    pytest.param(("prefillshare", 64, "cuda"), id="prefillshare-64-cuda", marks=on_gpu),
]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Iterator[HandoffPair]:
    backend, page_size, device = request.param
    if backend == "nixl" and importlib.util.find_spec("nixl") is None:
        pytest.skip("waits for a machine with the packages nixl and nixl-cu13")
    with handoff_pair(backend, dataclasses.replace(SHAPE, page_size=page_size, device=device)) as started:
        yield started


def random_pages(count: int, *, seed: int) -> PageList:
    return np.random.default_rng(seed).permutation(np.arange(1, SHAPE.page_count, dtype=np.int32))[:count]


@pytest.mark.parametrize("chunk_pages", [None, 7])
def test_scattered_pages_arrive_and_no_other_page_changes(pair: HandoffPair, chunk_pages: int | None) -> None:
    source, target = random_pages(100, seed=1), random_pages(100, seed=2)
    others = np.setdiff1d(np.arange(SHAPE.page_count, dtype=np.int32), target)
    pair.prefill.fill(source, seed=3)
    pair.decode.fill(np.arange(SHAPE.page_count, dtype=np.int32), seed=4)
    before = pair.decode.checksum(others)
    assert pair.decode.checksum(target) != pair.prefill.checksum(source)

    [ended] = pair.hand_over([Handoff(new_room(), source, target, chunk_pages=chunk_pages)])

    assert ended.failure is None
    assert 0 < ended.seconds < 10
    assert pair.decode.checksum(target) == pair.prefill.checksum(source)
    assert pair.decode.checksum(others) == before


@pytest.mark.parametrize("prefix_pages", [3, 40])
def test_what_decode_holds_already_does_not_move(pair: HandoffPair, prefix_pages: int) -> None:
    """With 40 of 40 pages held, nothing moves but the metadata row."""
    source, target = random_pages(40, seed=5), random_pages(40, seed=6)
    pair.prefill.fill(source, seed=7)
    pair.decode.fill(target, seed=8)
    held, missing = target[:prefix_pages], target[prefix_pages:]
    before = pair.decode.checksum(held)
    prefix_tokens = prefix_pages * pair.decode.spec.shape.page_size

    [ended] = pair.hand_over([Handoff(new_room(), source, target, prefix_tokens=prefix_tokens)])

    assert ended.failure is None
    assert pair.decode.checksum(held) == before
    assert pair.decode.checksum(missing) == pair.prefill.checksum(source[prefix_pages:])


def test_many_at_once_do_not_mix_and_leave_nothing_behind(pair: HandoffPair) -> None:
    sources, targets = random_pages(240, seed=9).reshape(48, 5), random_pages(240, seed=10).reshape(48, 5)
    pair.prefill.fill(sources.ravel(), seed=11)
    handoffs = [Handoff(new_room(), *lists, chunk_pages=2) for lists in zip(sources, targets, strict=True)]

    ended = pair.hand_over(handoffs)

    assert [both.failure for both in ended] == [None] * len(handoffs)
    assert [both.received.room for both in ended] == [one.room for one in handoffs]
    assert pair.decode.checksum(targets.ravel()) == pair.prefill.checksum(sources.ravel())
    assert set(pair.prefill.held().values()) == set(pair.decode.held().values()) == {0}


def test_a_handoff_that_decode_gives_up_ends_on_both_sides(pair: HandoffPair) -> None:
    handoff = Handoff(new_room(), random_pages(5, seed=12), random_pages(5, seed=13))
    forgets = pair.prefill.spec.backend == "nixl"
    """SGLang's own prefill side there: an abort of a room it has not heard of is lost, and what it hears of a room
    after the end of it stays in its tables."""
    receiving = pair.decode.receive([handoff], bootstrap_addr=pair.prefill.bootstrap_addr)
    if forgets:
        pair.prefill.wait_held(timeout_s=10.0, transfer_infos=1)
    assert pair.decode.abort(handoff.room)
    assert receiving.result(10.0)[0].failure is not None
    if forgets:
        pair.prefill.wait_held(timeout_s=10.0, failure_records=1)
    sending = pair.prefill.send([handoff])
    assert sending.result(10.0)[0].failure is not None
    assert not pair.decode.abort(handoff.room)
    assert set(pair.prefill.held().values()) == set(pair.decode.held().values()) == {0}
