"""What follows from how legs and calls end: every row of the table, and every combination that can occur."""

from itertools import product

import pytest

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.endings import Conclusion, Cut, LegEnd, Said, Step, conclude
from sglang_prefillshare.routing.telemetry import Outcome

BOTH = (Role.PREFILL, Role.DECODE)
PREFILL = (Role.PREFILL,)
NEITHER = ()

FAILURES = {
    # how a leg failed:   recorded as              told, if nothing was said   whose leg is tried again
    LegEnd.UNSENT: (Outcome.UNAVAILABLE, Step.TELL, BOTH),
    LegEnd.DOWN: (Outcome.UNAVAILABLE, Step.TELL, PREFILL),
    LegEnd.BROKEN: (Outcome.WORKER_FAILED, Step.TELL, PREFILL),
    LegEnd.SILENT: (Outcome.WORKER_FAILED, Step.PASS_ON, PREFILL),
    LegEnd.REFUSED: (Outcome.WORKER_REFUSED, Step.PASS_ON, NEITHER),
    LegEnd.FAILED: (Outcome.WORKER_FAILED, Step.PASS_ON, NEITHER),
    LegEnd.CUT_REFUSED: (Outcome.WORKER_REFUSED, Step.TELL, NEITHER),
    LegEnd.CUT_FAILED: (Outcome.WORKER_FAILED, Step.TELL, NEITHER),
}
NO_FAILURES = (LegEnd.WHOLE, LegEnd.LEFT)

CUTS = {
    # what ended the call:  recorded as          and what the client gets, if it was told   nothing, a part, all
    Cut.REJECTED: (Outcome.REJECTED, (Step.TELL, Step.END_STREAM, Step.NOTHING)),
    Cut.UNPLACED: (Outcome.UNAVAILABLE, (Step.TELL, Step.END_STREAM, Step.NOTHING)),
    Cut.OVERLOADED: (Outcome.OVERLOADED, (Step.TELL, Step.END_STREAM, Step.NOTHING)),
    Cut.CLIENT_GONE: (Outcome.DISCONNECTED, (Step.NOTHING, Step.NOTHING, Step.NOTHING)),
    Cut.DEADLINE: (Outcome.TIMEOUT, (Step.TELL, Step.END_STREAM, Step.NOTHING)),
    Cut.CANCELLED: (Outcome.CANCELLED, (Step.NOTHING, Step.NOTHING, Step.NOTHING)),
    Cut.FAULT: (Outcome.INTERNAL, (Step.TELL, Step.END_STREAM, Step.NOTHING)),
}


def ended(failed: Role, end: LegEnd, other: LegEnd) -> dict[str, LegEnd | Role]:
    prefill, decode = (end, other) if failed is Role.PREFILL else (other, end)
    return {"prefill": prefill, "decode": decode, "first": failed}


def test_every_way_to_end_is_in_a_row_here():
    assert {*FAILURES, *NO_FAILURES} == set(LegEnd)
    assert set(CUTS) == set(Cut)


@pytest.mark.parametrize("said", Said)
@pytest.mark.parametrize("cut", Cut)
def test_a_cut_decides_whatever_the_legs_did(cut, said):
    outcome, steps = CUTS[cut]
    if cut is Cut.DEADLINE and said is Said.ALL:
        outcome = Outcome.OK  # the client has its answer, whatever prefill's leg still does
    wanted = Conclusion(steps[list(Said).index(said)], outcome)
    assert conclude(cut=cut, said=said) == wanted
    for prefill, decode, first, may_retry in product(LegEnd, LegEnd, [None, *Role], [False, True]):
        assert wanted == conclude(
            cut=cut, said=said, prefill=prefill, decode=decode, first=first, may_retry=may_retry
        ), (prefill, decode, first)


@pytest.mark.parametrize("may_retry", [False, True])
@pytest.mark.parametrize("first", [None, Role.PREFILL])
@pytest.mark.parametrize("prefill", LegEnd)
def test_a_whole_answer_that_the_client_has_is_well_whatever_prefill_came_to(prefill, first, may_retry):
    assert conclude(
        said=Said.ALL, prefill=prefill, decode=LegEnd.WHOLE, first=first, may_retry=may_retry
    ) == Conclusion(Step.NOTHING, Outcome.OK)


@pytest.mark.parametrize("other", LegEnd)
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("end", FAILURES)
def test_the_leg_that_failed_first_decides(end, role, other):
    outcome, step, retried = FAILURES[end]
    legs = ended(role, end, other)

    again = Conclusion(Step.RETRY, None) if role in retried else Conclusion(step, outcome)
    assert conclude(said=Said.NOTHING, may_retry=True, **legs) == again
    assert conclude(said=Said.NOTHING, may_retry=False, **legs) == Conclusion(step, outcome)
    for may_retry in (False, True):
        told = conclude(said=Said.PART, may_retry=may_retry, **legs)
        assert told == Conclusion(Step.END_STREAM, outcome)
        if legs["decode"] is not LegEnd.WHOLE:  # a whole answer that the client has is another row
            silent = conclude(said=Said.ALL, may_retry=may_retry, **legs)
            assert silent == Conclusion(Step.NOTHING, outcome)


def test_a_decode_leg_that_was_under_way_is_never_tried_again():
    """It may have sampled (contract 3 has prefill compute again, and nothing else)."""
    steps = {
        end: conclude(said=Said.NOTHING, may_retry=True, **ended(Role.DECODE, end, LegEnd.LEFT)) for end in FAILURES
    }
    assert [end for end, conclusion in steps.items() if conclusion.step is Step.RETRY] == [LegEnd.UNSENT]


@pytest.mark.parametrize("said", Said)
@pytest.mark.parametrize("decode", [end for end in LegEnd if end is not LegEnd.WHOLE])
def test_a_pair_without_an_answer_a_failure_or_a_cut_is_our_own_fault(decode, said):
    with pytest.raises(AssertionError):
        conclude(said=said, prefill=LegEnd.WHOLE, decode=decode)


@pytest.mark.parametrize("end", NO_FAILURES)
def test_a_leg_that_did_not_fail_cannot_have_failed_first(end):
    with pytest.raises(AssertionError):
        conclude(said=Said.NOTHING, first=Role.PREFILL, prefill=end)
