"""Processes that die or hang at every state of a handoff: the other side hears of it in time, and keeps nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang_prefillshare.host.transfer.rig import Handoff, Outcome, PoolShape, new_room
from test.support.handoff_pair import DecodeProcess, HandoffPair, Pending, PrefillProcess, WorkerProcess

pytestmark = pytest.mark.timeout(240)

SHAPE = PoolShape(layers=2, kv_heads=2, head_dim=16, page_count=129)
BACKEND = "prefillshare"
LEASE_TIMEOUT_S = 3.0
WAITING_TIMEOUT_S = 4
COPY_PAUSE_S = 1.0
NOTICED_S = 8.0
"""By then a side must have noticed the death of its peer; it takes some 10 ms, and longer on a busy machine."""

SOURCE = np.random.default_rng(1).permutation(np.arange(1, SHAPE.page_count, dtype=np.int32))[:24]
TARGET = np.random.default_rng(2).permutation(np.arange(1, SHAPE.page_count, dtype=np.int32))[:24]


def prefill_process(*, base: str = "base", port: int | None = None) -> PrefillProcess:
    env = {"SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(WAITING_TIMEOUT_S)}
    return PrefillProcess(
        BACKEND, SHAPE, base=base, port=port, env=env, lease_timeout_s=LEASE_TIMEOUT_S, reuses_pages=True
    )


def decode_process(*, copy_pause_s: float = 0.0) -> DecodeProcess:
    env = {"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(WAITING_TIMEOUT_S)}
    return DecodeProcess(BACKEND, SHAPE, env=env, copy_pause_s=copy_pause_s)


def ready(process: WorkerProcess) -> None:
    process.wait_ready()
    if isinstance(process, PrefillProcess):
        process.fill(SOURCE, seed=3)


def a_handoff(*, chunk_pages: int = 8, stop_after_chunks: int | None = None) -> Handoff:
    return Handoff(new_room(), SOURCE, TARGET, chunk_pages=chunk_pages, stop_after_chunks=stop_after_chunks)


@dataclass(frozen=True, slots=True)
class InFlight:
    """A handoff that has come so far and no farther."""

    receiving: Pending[list[Outcome]]
    sending: Pending[list[Outcome]] | None


def begin(pair: HandoffPair, handoff: Handoff, *, lent_pages: int) -> InFlight:
    in_flight = InFlight(
        pair.decode.receive([handoff], bootstrap_addr=pair.prefill.bootstrap_addr), pair.prefill.send([handoff])
    )
    pair.prefill.wait_held(transfer_infos=1, pages_on_loan=lent_pages)
    return in_flight


def asked_for(pair: HandoffPair) -> InFlight:
    """Decode wants a room that prefill has not heard of."""
    in_flight = InFlight(pair.decode.receive([a_handoff()], bootstrap_addr=pair.prefill.bootstrap_addr), None)
    pair.prefill.wait_held(transfer_infos=1)
    return in_flight


def open_on_both_sides(pair: HandoffPair) -> InFlight:
    return begin(pair, a_handoff(stop_after_chunks=0), lent_pages=0)


def partly_lent(pair: HandoffPair) -> InFlight:
    return begin(pair, a_handoff(stop_after_chunks=1), lent_pages=8)


def being_copied(pair: HandoffPair) -> InFlight:
    """All is lent, and decode is in the middle of its copy."""
    return begin(pair, a_handoff(chunk_pages=24), lent_pages=24)


STATES: tuple[Callable[[HandoffPair], InFlight], ...] = (asked_for, open_on_both_sides, partly_lent, being_copied)


def works(pair: HandoffPair) -> None:
    """The pair hands over the right bytes, and neither side holds anything afterwards."""
    pair.prefill.fill(SOURCE, seed=3)
    [ended] = pair.hand_over([a_handoff(chunk_pages=24)], timeout_s=10.0)
    assert ended.failure is None
    assert pair.decode.checksum(TARGET) == pair.prefill.checksum(SOURCE)
    holds_nothing(pair.prefill)
    holds_nothing(pair.decode)


def holds_nothing(process: WorkerProcess) -> None:
    assert set(process.held().values()) == {0}, process.held()


@pytest.fixture(scope="module")
def victims() -> Iterator[tuple[list[PrefillProcess], list[DecodeProcess]]]:
    """Processes to be killed, one per state and one to go on with; started together, which is quickest."""
    with ExitStack() as stack:
        prefills = [stack.enter_context(closing(prefill_process())) for _ in range(len(STATES) + 1)]
        decodes = [
            stack.enter_context(closing(decode_process(copy_pause_s=COPY_PAUSE_S if i == 0 else 0.0)))
            for i in range(len(STATES) + 1)
        ]
        for process in (*prefills, *decodes):
            ready(process)
        yield prefills, decodes


def test_a_killed_decode_worker_is_noticed_in_every_state_and_prefill_keeps_nothing(
    victims: tuple[list[PrefillProcess], list[DecodeProcess]],
) -> None:
    prefill, decodes = victims[0][-1], victims[1]
    for state, decode in zip(reversed(STATES), decodes, strict=False):  # the slow one copies first
        pair = HandoffPair(prefill, decode)
        in_flight = state(pair)
        decode.kill()
        if in_flight.sending is not None:
            [sent] = in_flight.sending.result(NOTICED_S)
            assert sent.failure == "the decode worker died", state.__name__
        prefill.wait_held(**dict.fromkeys(prefill.held(), 0))
        works(HandoffPair(prefill, decodes[-1]))


def test_a_killed_prefill_worker_is_noticed_in_every_state_and_decode_keeps_nothing(
    victims: tuple[list[PrefillProcess], list[DecodeProcess]],
) -> None:
    prefills = victims[0]
    with closing(decode_process(copy_pause_s=COPY_PAUSE_S)) as decode:
        ready(decode)
        for state, prefill in zip(STATES, prefills, strict=False):
            pair = HandoffPair(prefill, decode)
            works(pair)  # decode knows the process from then on; one that dies before it says who it is, it waits for
            wanted = prefill.checksum(SOURCE)
            in_flight = state(pair)
            prefill.kill()
            [received] = in_flight.receiving.result(NOTICED_S)
            if received.failure is None:
                # All was lent. Nobody has written into the pages of a dead process: the copy is good, and counts.
                assert state is being_copied and decode.checksum(TARGET) == wanted
            else:  # or what prefill had to say died with it
                assert "prefill" in received.failure.lower(), state.__name__
            holds_nothing(decode)
        works(HandoffPair(prefills[-1], decode))


def test_stuck_peers_are_given_up_and_what_they_do_later_does_not_count() -> None:
    with closing(prefill_process()) as prefill, closing(decode_process()) as decode:
        ready(prefill)
        ready(decode)
        pair = HandoffPair(prefill, decode)
        works(pair)

        # Decode hangs while everything is on loan to it: prefill takes its pages back, and writes into them.
        handoff = a_handoff(chunk_pages=24)
        receiving = decode.receive([handoff], bootstrap_addr=prefill.bootstrap_addr)
        prefill.wait_held(transfer_infos=1)
        decode.pause()
        started = time.monotonic()
        [sent] = prefill.send([handoff]).result(LEASE_TIMEOUT_S + NOTICED_S)
        assert sent.failure is not None and "has not confirmed its copy of 24 pages" in sent.failure
        assert time.monotonic() - started >= LEASE_TIMEOUT_S * 0.9
        holds_nothing(prefill)
        # It wakes up with the offer in its socket: what it copies now is another request's.
        decode.resume()
        [received] = receiving.result(NOTICED_S)
        assert received.failure is not None, "decode took pages for its own that prefill had given away"
        works(pair)

        # Prefill hangs: decode waits no longer than it was told to.
        in_flight = partly_lent(pair)
        prefill.pause()
        [received] = in_flight.receiving.result(WAITING_TIMEOUT_S + NOTICED_S)
        assert received.failure is not None and "timed out" in received.failure
        prefill.resume()
        assert in_flight.sending is not None
        [sent] = in_flight.sending.result(NOTICED_S)
        assert sent.failure == "decode gave the request up"
        works(pair)

        # A room that nobody asks for ends by itself.
        [sent] = prefill.send([a_handoff()]).result(WAITING_TIMEOUT_S + NOTICED_S)
        assert sent.failure is not None and "timed out" in sent.failure
        holds_nothing(prefill)


def test_a_prefill_worker_that_comes_back_with_another_base_is_refused(
    victims: tuple[list[PrefillProcess], list[DecodeProcess]],
) -> None:
    decode = victims[1][-1]
    with closing(prefill_process()) as first:
        ready(first)
        works(HandoffPair(first, decode))
        port = first.spec.bootstrap_port
        first.kill()
    with closing(prefill_process(base="other", port=port)) as other:
        ready(other)
        [received] = decode.receive([a_handoff()], bootstrap_addr=other.bootstrap_addr).result(NOTICED_S)
        assert received.failure is not None and "serves base psk1-" in received.failure
        holds_nothing(decode)
        other.kill()
    with closing(prefill_process(port=port)) as again:
        ready(again)
        works(HandoffPair(again, decode))
