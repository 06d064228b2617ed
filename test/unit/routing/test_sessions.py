"""Where sessions were last sent."""

from sglang_prefillshare.routing.sessions import SessionMap


def test_the_last_worker_of_a_session_counts():
    sessions = SessionMap(capacity=2, live_s=60)
    assert sessions.worker_of("a") is None
    sessions.assign("a", "w0")
    sessions.assign("a", "w1")
    assert sessions.worker_of("a") == "w1"


def test_the_session_used_least_recently_is_forgotten():
    sessions = SessionMap(capacity=2, live_s=60)
    for key in ("a", "b", "a", "c"):
        sessions.assign(key, f"w-{key}")
    assert [sessions.worker_of(key) for key in "abc"] == ["w-a", None, "w-c"]


def test_a_request_without_a_session_is_nobodys():
    sessions = SessionMap(capacity=1, live_s=60)
    sessions.assign("a", "w0")
    sessions.assign(None, "w1")
    assert sessions.worker_of(None) is None
    assert sessions.worker_of("a") == "w0"


def test_live_sessions_are_counted_by_worker():
    at = [0.0]
    sessions = SessionMap(capacity=9, live_s=60, now=lambda: at[0])
    for key, worker, at[0] in (("a", "w0", 0.0), ("b", "w0", 10.0), ("c", "w1", 20.0), ("a", "w1", 30.0)):
        sessions.assign(key, worker)
    assert sessions.live_counts() == {"w0": 1, "w1": 2}
    at[0] = 75.0
    assert sessions.live_counts() == {"w1": 2}
    assert sessions.live_counts()["w0"] == 0
    assert sessions.worker_of("b") == "w0"  # idle, and still at home there


def test_the_sessions_of_a_worker_that_lost_its_kv_are_new_again():
    sessions = SessionMap(capacity=9, live_s=60)
    sessions.assign("a", "w0")
    sessions.assign("b", "w1")
    sessions.forget({"w0"})
    assert sessions.is_new("a") and sessions.worker_of("a") is None
    assert not sessions.is_new("b") and not sessions.is_new(None)
