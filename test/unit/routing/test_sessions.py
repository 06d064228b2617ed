"""Where sessions were last sent."""

from sglang_prefillshare.routing.sessions import SessionMap


def test_the_last_worker_of_a_session_counts():
    sessions = SessionMap(capacity=2)
    assert sessions.worker_of("a") is None
    sessions.assign("a", "w0")
    sessions.assign("a", "w1")
    assert sessions.worker_of("a") == "w1"


def test_the_session_used_least_recently_is_forgotten():
    sessions = SessionMap(capacity=2)
    for key in ("a", "b", "a", "c"):
        sessions.assign(key, f"w-{key}")
    assert [sessions.worker_of(key) for key in "abc"] == ["w-a", None, "w-c"]


def test_a_request_without_a_session_is_nobodys():
    sessions = SessionMap(capacity=1)
    sessions.assign("a", "w0")
    sessions.assign(None, "w1")
    assert sessions.worker_of(None) is None
    assert sessions.worker_of("a") == "w0"
