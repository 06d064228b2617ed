"""What the storm takes for right: its verdict on an answer, and how it deals out faults."""

from __future__ import annotations

import random

import pytest

from test.soak.storm import DEADLINE_S, HANGS_AFTER_S, Fault, Heard, draw_faults, judge

RIGHT = [5, 6, 7]


def heard(**fields: object) -> Heard:
    return Heard(**{"status": 200, "said": RIGHT, "is_whole": True, "seconds": 1.0, **fields})  # type: ignore[arg-type]


def failed(**fields: object) -> Heard:
    return heard(**{"status": 502, "said": None, "is_whole": False, "error": "The connection broke.", **fields})


def test_a_right_answer_is_right_and_another_one_is_not() -> None:
    assert judge(heard(), RIGHT, fault=None) == ("ok", None)
    for said in ([5, 6], [5, 6, 8], None, "text"):
        _, wrong = judge(heard(said=said), RIGHT, fault=Fault.LINK)
        assert wrong is not None


def test_a_request_that_met_no_fault_must_not_fail_unless_something_was_aborted_beside_it() -> None:
    assert judge(failed(), RIGHT, fault=None)[1] is not None
    assert judge(failed(), RIGHT, fault=Fault.PAUSED)[1] is not None
    assert judge(failed(), RIGHT, fault=None, is_beside_abort=True) == ("failed", None)
    assert judge(failed(), RIGHT, fault=Fault.LINK) == ("failed", None)


@pytest.mark.parametrize(
    "ended",
    [
        failed(error=None),
        failed(status=200, said=RIGHT[:2], error=None),
        failed(status=None, error=None, said="the connection broke"),
        failed(seconds=DEADLINE_S + 6),
        failed(status=500, error="The router failed (KeyError); its log says more."),
    ],
)
def test_a_failure_must_give_a_reason_in_time_and_not_be_the_routers(ended: Heard) -> None:
    assert judge(ended, RIGHT, fault=Fault.LINK)[1] is not None


def test_what_does_not_end_hangs() -> None:
    what, wrong = judge(failed(error=None, seconds=HANGS_AFTER_S + 1), RIGHT, fault=Fault.LINK)
    assert what == "hung" and wrong is not None


def test_a_wrong_request_must_be_refused_as_the_clients_fault() -> None:
    assert judge(failed(status=400), RIGHT, fault=Fault.MALFORMED) == ("failed", None)
    assert judge(failed(status=503), RIGHT, fault=Fault.TOO_LONG)[1] is not None
    assert judge(heard(), RIGHT, fault=Fault.TOO_LONG)[1] is not None


def test_faults_are_as_many_as_asked_for_and_the_same_for_a_seed() -> None:
    drawn = draw_faults(2000, 0.05, random.Random(3))
    assert drawn == draw_faults(2000, 0.05, random.Random(3)) != draw_faults(2000, 0.05, random.Random(4))
    assert len(drawn) == 100 and set(drawn.values()) == set(Fault)
