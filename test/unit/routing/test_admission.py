"""Room: nothing is over-committed, nothing that could go waits, and what others hold is seen."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.protocol import Role, Room
from sglang_prefillshare.routing.admission import (
    Pace,
    Stock,
    foreign_tokens,
    has_room,
    output_tokens,
    peak_tokens,
    retry_after_s,
)
from sglang_prefillshare.routing.config import AdmissionConfig

CONFIG = AdmissionConfig()
ROOM = Room(pool_tokens=1000, used_tokens=0)


def stock(role=Role.DECODE, room=ROOM, **changes):
    return Stock(role, room, **changes)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 400)), max_size=60), st.integers(0, 300))
def test_what_is_let_in_never_adds_up_to_more_than_the_pool(events, foreign):
    held = []
    for is_end, need in events:
        if is_end and held:
            held.pop(0)
            continue
        now = stock(held_tokens=sum(held), foreign_tokens=foreign, leg_count=len(held))
        if has_room(now, need, config=CONFIG):
            held.append(need)
        else:
            assert sum(held) + foreign + need > 1000, "it would have fitted"
        assert sum(held) + foreign <= 1000


def test_what_fits_no_pool_goes_alone_for_the_worker_to_refuse():
    assert has_room(stock(), 5000, config=CONFIG)
    assert has_room(stock(foreign_tokens=900), 5000, config=CONFIG)
    assert not has_room(stock(leg_count=1, held_tokens=1), 5000, config=CONFIG)


def test_a_worker_that_says_nothing_has_no_limit_and_one_that_is_full_takes_nothing():
    assert has_room(stock(room=None, held_tokens=10**9, backlog_tokens=10**9), 10**9, config=CONFIG)
    assert not has_room(stock(room=None, is_full=True), 1, config=CONFIG)
    assert not has_room(stock(is_full=True), 5000, config=CONFIG)


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=30), st.integers(1, 5000))
def test_prefill_is_given_work_ahead_by_one_request_at_most(prompts, backlog):
    config = dataclasses.replace(CONFIG, prefill_backlog_tokens=backlog)
    room = Room(pool_tokens=10**9, used_tokens=0)
    queued = 0
    for prompt in prompts:
        if has_room(stock(Role.PREFILL, room, backlog_tokens=queued), prompt, config=config):
            queued += prompt
        else:
            assert queued >= backlog, "it could have had more to do"
    assert queued < backlog + max(prompts)


def test_a_backlog_is_nothing_to_decode():
    assert has_room(stock(backlog_tokens=10**9), 1, config=CONFIG)


def test_what_others_hold_is_what_is_used_beyond_ours():
    busy = Room(pool_tokens=1000, used_tokens=700, running_requests=3)
    assert foreign_tokens(busy, held_tokens=200) == 500
    assert foreign_tokens(busy, held_tokens=800) == 0
    assert foreign_tokens(dataclasses.replace(busy, running_requests=0), held_tokens=0) == 0, "nobody is there"
    assert foreign_tokens(None, held_tokens=0) == 0


ANSWERS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 50)), max_size=12)


def held_at_most(answers):
    """Step by step, until all that end have."""
    answers = [list(answer) for answer in answers]
    most = 0
    for _ in range(61):
        most = max(most, sum(came for came, _ in answers))
        answers = [[came + 1, limit] for came, limit in answers if came != limit]
    return most


@given(ANSWERS, st.integers(0, 4))
def test_answers_hold_no_more_than_their_peak(answers, lag):
    ending = [(min(came, limit), limit) for came, limit in answers]
    peak = peak_tokens(ending)
    further = [(min(came + lag, limit), limit) for came, limit in ending]
    assert held_at_most(further) <= peak, "whatever is on its way"
    assert peak <= held_at_most(ending) + 4 * len(ending)
    assert peak_tokens([(limit, limit) for _, limit in ending]) == sum(limit + 4 for _, limit in ending)


def test_an_answer_past_its_limit_goes_on_for_ever():
    assert peak_tokens([(90, 100), (50, 40)]) >= 100 + 60
    assert peak_tokens([(50, 40)]) == 54
    assert peak_tokens([]) == 0


def test_what_a_worker_keeps_free_for_each_is_part_of_the_peak():
    assert peak_tokens([(10, 20), (10, 20)], reserved_tokens=512) >= 2 * (10 + 512)


def test_answers_count_with_their_limit_or_as_expected_and_as_sglang_clips_them():
    config = dataclasses.replace(CONFIG, expected_output_tokens=300, counted_output_tokens=4096)
    assert output_tokens([None, 0, 7, 100_000], config=config) == [300, 0, 7, 4096]
    half = dataclasses.replace(config, output_share=0.5)
    assert output_tokens([None, 0, 7, 100_000], config=half) == [300, 0, 4, 4096]


def test_when_to_come_again_follows_the_pace_within_bounds():
    assert retry_after_s(100, admitted_per_s=10.0, config=CONFIG) == 10
    assert retry_after_s(1, admitted_per_s=1000.0, config=CONFIG) == 1
    assert retry_after_s(10**6, admitted_per_s=0.001, config=CONFIG) == 60
    assert retry_after_s(10, admitted_per_s=None, config=CONFIG) == 5


@pytest.mark.parametrize("per_s", [0.5, 20.0])
def test_the_pace_is_that_of_late(per_s):
    pace = Pace(half_life_s=5.0)
    assert pace.per_s is None
    now = 0.0
    for step in (1.0, 1 / per_s):  # first one a second, for long; then as asked
        for _ in range(1000):
            now += step
            pace.note(now)
    assert pace.per_s == pytest.approx(per_s, rel=0.2)


def test_two_at_one_moment_say_nothing_of_a_pace():
    pace = Pace()
    pace.note(1.0)
    pace.note(1.0)
    assert pace.per_s is None


@pytest.mark.parametrize(
    "wrong",
    [
        *({"queue_size": -1}, {"queue_timeout_s": 0.0}, {"queue_timeout_s": float("inf")}, {"patience_s": -1.0}),
        *({"output_share": 0.0}, {"output_share": 1.1}),
        *({"expected_output_tokens": 0}, {"counted_output_tokens": 0}, {"prefill_backlog_tokens": 0}),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AdmissionConfig(**wrong)
