"""Where requests go, given a snapshot."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.config import PolicyConfig
from sglang_prefillshare.routing.policy import DecodeSnapshot, PrefillSnapshot, Reason, home, pick_decode, pick_prefill

CONFIG = PolicyConfig(load_margin_tokens=1000, load_margin_requests=10, load_margin_ratio=2.0, min_prefix_tokens=64)
MARGINS = {Role.PREFILL: CONFIG.load_margin_tokens, Role.DECODE: CONFIG.load_margin_requests}

both_roles = pytest.mark.parametrize("role", list(MARGINS))


def pick(
    *workers: tuple[int, ...],
    role: Role = Role.PREFILL,
    session: str | None = None,
    is_new: bool = False,
    turn: int = 0,
    key: str | None = None,
    config: PolicyConfig = CONFIG,
):
    """Workers as (tokens or requests in flight, matched tokens, and sessions if any), named w0, w1, ..."""
    rows = [(f"w{i}", *numbers) for i, numbers in enumerate(workers)]
    if role is Role.PREFILL:
        prefill = [PrefillSnapshot(*row) for row in rows]
        decision = pick_prefill(
            prefill, session_worker=session, is_new_session=is_new, session_key=key, turn=turn, config=config
        )
    else:
        decode = [DecodeSnapshot(*row) for row in rows]
        decision = pick_decode(
            decode, session_worker=session, is_new_session=is_new, session_key=key, turn=turn, config=config
        )
    return decision.worker, decision.reason


@both_roles
def test_a_session_stays_although_another_worker_matches_more(role):
    assert pick((10, 0), (0, 640), role=role, session="w0") == ("w0", Reason.SESSION)


@both_roles
def test_a_new_session_leaves_a_common_prefix_for_a_worker_with_fewer_sessions(role):
    assert pick((0, 640, 1), (0, 0, 0), role=role, is_new=True) == ("w0", Reason.PREFIX)  # within the margin
    assert pick((0, 640, 2), (0, 0, 0), role=role, is_new=True) == ("w1", Reason.NEW_SESSION)
    assert pick((0, 640, 2), (0, 0, 0), (0, 64, 0), role=role, is_new=True) == ("w2", Reason.NEW_SESSION)
    assert pick((0, 640, 9), (0, 0, 0), role=role) == ("w0", Reason.PREFIX)  # no session is named
    assert pick((0, 0, 2), (0, 0, 1), role=role, is_new=True) == ("w1", Reason.NEW_SESSION)  # nobody knows the prefix


def test_new_sessions_under_one_system_prompt_spread_over_all_workers():
    counts, matched = [0] * 4, [0] * 4
    for turn in range(16):
        worker, _ = pick(*[(0, m, n) for m, n in zip(matched, counts, strict=True)], is_new=True, turn=turn)
        counts[int(worker[1])] += 1
        matched[int(worker[1])] = 640
    assert max(counts) - min(counts) <= 2 and sum(counts) == 16


@pytest.mark.parametrize(("margin", "at_first"), [(1, [2, 2, 2, 0]), (8, [6, 0, 0, 0])])
def test_new_sessions_under_one_system_prompt_fill_workers_in_turn_and_then_evenly(margin, at_first):
    """A margin of m lets a worker have m + 1 sessions for each copy of the prefix, as long as others have none."""
    config = dataclasses.replace(CONFIG, session_margin=margin)
    counts, matched = [0] * 4, [0] * 4
    for turn in range(52):
        rows = [(f"w{i}", 0, *numbers) for i, numbers in enumerate(zip(matched, counts, strict=True))]
        workers = [PrefillSnapshot(*row) for row in rows]
        chosen = pick_prefill(workers, session_worker=None, is_new_session=True, turn=turn, config=config).worker
        counts[int(chosen[1])] += 1
        matched[int(chosen[1])] = 640
        if turn == 5:
            assert sorted(counts, reverse=True) == at_first
    assert max(counts) - min(counts) <= 1 and sum(counts) == 52


def test_a_new_session_too_avoids_a_worker_that_is_loaded_beyond_the_margins():
    assert pick((9000, 0, 0), (0, 0, 5), is_new=True) == ("w1", Reason.LOAD)


URLS = st.lists(st.from_regex(r"http://[a-z0-9.]{1,20}:[0-9]{1,5}", fullmatch=True), min_size=1, unique=True)


@given(key=st.text(), urls=URLS)
def test_a_sessions_home_does_not_depend_on_order_and_moves_only_with_its_own_worker(key, urls):
    chosen = home(key, urls)
    assert chosen in urls
    assert home(key, urls[::-1]) == chosen
    for other in set(urls) - {chosen}:
        assert home(key, [url for url in urls if url != other]) == chosen


def test_homes_are_spread():
    urls = [f"http://10.0.0.{i}:30000" for i in range(4)]
    counts = [[home(f"session {i}", urls) for i in range(4000)].count(url) for url in urls]
    assert sum(counts) == 4000 and min(counts) > 850
    assert home("\ud800", urls) in urls, "a lone surrogate, as JSON can have it"


KEYS = [f"s{i}" for i in range(64)]


@both_roles
def test_a_new_session_goes_home_where_others_would_take_turns(role):
    config = dataclasses.replace(CONFIG, home_margin=2, session_margin=2)
    for key in KEYS:
        at = home(key, ["w0", "w1", "w2"])
        for turn in range(3):
            idle = pick((0, 0), (0, 0), (0, 0), role=role, is_new=True, key=key, turn=turn)
            assert idle == (at, Reason.NEW_SESSION)
            near = pick((0, 0, 2), (3, 0, 1), (0, 0, 0), role=role, is_new=True, key=key, turn=turn, config=config)
            assert near == (at, Reason.NEW_SESSION)
        held = pick((0, 640), (0, 640), (0, 640), role=role, is_new=True, key=key)
        assert held == (at, Reason.PREFIX)
        known = pick((0, 0), (0, 0), (0, 0), role=role, session="w1", key=key)
        assert known == ("w1", Reason.SESSION)


@both_roles
def test_a_home_that_has_more_sessions_or_load_than_the_margins_allow_is_passed_over(role):
    load = 5 * MARGINS[role]
    for key in KEYS:
        second = home(key, ["w1", "w2"])
        assert pick((0, 0, 2), (0, 0, 0), (0, 0, 0), role=role, is_new=True, key=key) == (second, Reason.NEW_SESSION)
        even = dataclasses.replace(CONFIG, session_margin=0)
        assert pick((0, 0, 1), (0, 0, 0), (0, 0, 0), role=role, is_new=True, key=key, config=even)[0] == second
        if home(key, ["w0", "w1"]) == "w0":
            assert pick((load, 0), (0, 0), role=role, is_new=True, key=key) == ("w1", Reason.LOAD)
        assert pick((0, 640), (0, 0), role=role, is_new=True, key=key) == ("w0", Reason.PREFIX), "a prefix counts more"


@pytest.mark.parametrize(("margin", "least"), [(1, 0.55), (8, 0.95)])
def test_routers_that_see_sessions_in_different_orders_mostly_agree(margin, least):
    """By chance it would be a quarter; docs/architecture.md names what was found."""
    config = dataclasses.replace(CONFIG, session_margin=margin, home_margin=margin)

    def place(sessions: list[str]) -> dict[str, str]:
        at: dict[str, str] = {}
        for session in sessions:
            counts = [list(at.values()).count(f"w{i}") for i in range(4)]
            at[session], _ = pick(*[(0, 0, n) for n in counts], is_new=True, key=session, config=config)
        return at

    rng = random.Random(1)
    agreed = total = 0
    for run in range(20):
        sessions = [f"session {run}.{i}" for i in range(48)]
        first, second = place(sessions), place(rng.sample(sessions, k=48))
        agreed += sum(first[session] == second[session] for session in sessions)
        total += len(sessions)
    assert agreed / total > least


def test_sessions_with_keys_are_spread_within_the_margin():
    counts = [0] * 4
    for i in range(200):
        worker, _ = pick(*[(0, 640, n) for n in counts], is_new=True, key=f"s{i}")
        counts[int(worker[1])] += 1
        assert max(counts) - min(counts) <= 2


@both_roles
def test_a_session_whose_worker_is_not_ready_follows_its_prefix(role):
    assert pick((0, 0), (5, 128), role=role, session="gone") == ("w1", Reason.PREFIX)


@both_roles
def test_the_longest_prefix_wins_and_short_ones_do_not_count(role):
    assert pick((0, 64), (9, 128), role=role) == ("w1", Reason.PREFIX)
    assert pick((0, 0), (9, 63), role=role) == ("w0", Reason.LEAST_LOADED)


@both_roles
def test_equal_prefixes_go_to_the_least_loaded_holder(role):
    assert pick((5, 128), (1, 128), (0, 0), role=role) == ("w1", Reason.PREFIX)


def test_load_overrides_only_beyond_both_margins():
    assert pick((1001, 640), (0, 0)) == ("w1", Reason.LOAD)
    assert pick((1000, 640), (0, 0)) == ("w0", Reason.PREFIX)  # not beyond the absolute margin
    assert pick((5000, 640), (3000, 0)) == ("w0", Reason.PREFIX)  # beyond it, but not twice as much
    assert pick((7001, 0), (3000, 0), session="w0") == ("w1", Reason.LOAD)


def test_decode_load_is_counted_in_requests():
    assert pick((11, 640), (0, 0), role=Role.DECODE) == ("w1", Reason.LOAD)
    assert pick((10, 640), (0, 0), role=Role.DECODE) == ("w0", Reason.PREFIX)
    assert pick((50, 640), (30, 0), role=Role.DECODE) == ("w0", Reason.PREFIX)
    assert pick((71, 0), (30, 0), role=Role.DECODE, session="w0") == ("w1", Reason.LOAD)


@both_roles
def test_among_equally_idle_workers_an_override_prefers_the_one_that_matches(role):
    assert pick((5000, 640), (0, 0), (0, 128), role=role) == ("w2", Reason.LOAD)


@both_roles
def test_equals_take_turns(role):
    turns = [pick((3, 0), (0, 0), (0, 0), role=role, turn=turn)[0] for turn in range(4)]
    assert turns == ["w1", "w2", "w1", "w2"]


@both_roles
@given(
    workers=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 2_000)), min_size=1, max_size=6),
    session=st.sampled_from([None, "w0", "w3", "gone"]),
    turn=st.integers(0, 100),
)
def test_whoever_is_chosen_is_never_far_more_loaded_than_the_least(role, workers, session, turn):
    worker, reason = pick(*workers, role=role, session=session, turn=turn)
    load = workers[int(worker[1:])][0]
    least = min(load for load, _ in workers)
    assert load - least <= MARGINS[role] or load <= CONFIG.load_margin_ratio * least
    if reason is Reason.SESSION:
        assert worker == session
    if reason is Reason.LOAD:
        assert load == least
    if reason is Reason.PREFIX:
        assert workers[int(worker[1:])][1] == max(matched for _, matched in workers) >= CONFIG.min_prefix_tokens
