"""Where requests go, given a snapshot."""

from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.routing.config import PolicyConfig
from sglang_prefillshare.routing.policy import DecodeSnapshot, PrefillSnapshot, Reason, pick_decode, pick_prefill

CONFIG = PolicyConfig(load_margin_tokens=1000, load_margin_ratio=2.0, min_prefix_tokens=64)


def pick(*workers: tuple[int, int], session: str | None = None, turn: int = 0):
    """Workers as (tokens in flight, matched tokens), named p0, p1, ..."""
    snapshots = [PrefillSnapshot(f"p{i}", load, matched) for i, (load, matched) in enumerate(workers)]
    decision = pick_prefill(snapshots, session_worker=session, turn=turn, config=CONFIG)
    return decision.worker, decision.reason


def test_a_session_stays_although_another_worker_matches_more():
    assert pick((10, 0), (0, 640), session="p0") == ("p0", Reason.SESSION)


def test_a_session_whose_worker_is_not_ready_follows_its_prefix():
    assert pick((0, 0), (5, 128), session="gone") == ("p1", Reason.PREFIX)


def test_the_longest_prefix_wins_and_short_ones_do_not_count():
    assert pick((0, 64), (900, 128)) == ("p1", Reason.PREFIX)
    assert pick((0, 0), (900, 63)) == ("p0", Reason.LEAST_LOADED)


def test_equal_prefixes_go_to_the_least_loaded_holder():
    assert pick((50, 128), (10, 128), (0, 0)) == ("p1", Reason.PREFIX)


def test_load_overrides_only_beyond_both_margins():
    assert pick((1001, 640), (0, 0)) == ("p1", Reason.LOAD)
    assert pick((1000, 640), (0, 0)) == ("p0", Reason.PREFIX)  # not beyond the absolute margin
    assert pick((5000, 640), (3000, 0)) == ("p0", Reason.PREFIX)  # beyond it, but not twice as much
    assert pick((7001, 0), (3000, 0), session="p0") == ("p1", Reason.LOAD)


def test_among_equally_idle_workers_an_override_prefers_the_one_that_matches():
    assert pick((5000, 640), (0, 0), (0, 128)) == ("p2", Reason.LOAD)


def test_equals_take_turns():
    assert [pick((0, 0), (0, 0), (0, 0), turn=turn)[0] for turn in range(4)] == ["p0", "p1", "p2", "p0"]


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 2_000)), min_size=1, max_size=6),
    st.sampled_from([None, "p0", "p3", "gone"]),
    st.integers(0, 100),
)
def test_whoever_is_chosen_is_never_far_more_loaded_than_the_least(workers, session, turn):
    worker, reason = pick(*workers, session=session, turn=turn)
    load = workers[int(worker[1:])][0]
    least = min(load for load, _ in workers)
    assert load - least <= CONFIG.load_margin_tokens or load <= CONFIG.load_margin_ratio * least
    if reason is Reason.SESSION:
        assert worker == session
    if reason is Reason.LOAD:
        assert load == least
    if reason is Reason.PREFIX:
        assert workers[int(worker[1:])][1] == max(matched for _, matched in workers) >= CONFIG.min_prefix_tokens


def test_decode_takes_the_least_busy_and_rotates_among_equals():
    busy, idle, idle_too = DecodeSnapshot("d0", 3), DecodeSnapshot("d1", 1), DecodeSnapshot("d2", 1)
    assert [pick_decode([busy, idle, idle_too], turn=turn).worker for turn in range(3)] == ["d1", "d2", "d1"]
