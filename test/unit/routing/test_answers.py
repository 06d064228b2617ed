"""What a client sees of a worker's words: its own ids, whole answers, one form of error, no paths."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.routing.answers import Events, client_error, failure_in, failure_in_events, without_paths
from sglang_prefillshare.routing.request import Endpoint


@given(st.lists(st.binary(max_size=6).filter(lambda part: b"\n" not in part), max_size=6), st.data())
def test_events_come_out_whole_however_they_were_cut(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(part + b"\n\n" for part in parts) + b"rest"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    events, pieces = Events(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        piece = events.feed(stream[start:end])
        assert piece == b"" or piece.endswith(b"\n\n")
        pieces.append(piece)
    assert b"".join(pieces) + events.rest() == stream


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"choices": [{"finish_reason": "stop"}, {"finish_reason": "abort"}]}, 503),
        ([{"meta_info": {"finish_reason": None}}, {"meta_info": {"finish_reason": {"type": "abort"}}}], 503),
        ({"error": {"message": "no", "code": 400}}, 400),
        ({"object": "chat.completion", "choices": [{"message": {"content": '"abort" "error"'}}]}, None),
        ({"text": 'say "abort"', "meta_info": {"finish_reason": {"type": "stop", "matched": "abort"}}}, None),
        ({"choices": [], "error": {"message": "a field of somebody's own"}}, None),
    ],
)
def test_only_what_says_so_is_no_answer(answer: object, status: int | None) -> None:
    found = failure_in(json.dumps(answer).encode())
    assert (found.status if found else None) == status


def test_events_before_the_failure_pass() -> None:
    good = b'data: {"choices":[{"delta":{"content":"abort"}}]}\n\n'
    bad = b'data: {"error": {"message": "gone", "code": 500}}\n\n'
    passed, failure = failure_in_events(good + bad + b"data: [DONE]\n\n")
    assert passed == good
    assert failure is not None and (failure.status, failure.message) == (500, "gone")
    assert failure_in_events(good) == (good, None)


@pytest.mark.parametrize(
    "body",
    [
        {"object": "error", "message": "wrong", "type": "BadRequestError", "param": "top_k", "code": 400},
        {"error": {"message": "wrong", "type": "BadRequestError", "param": "top_k", "code": 400}},
    ],
)
def test_openai_errors_have_one_form(body: object) -> None:
    kind, found = client_error(Endpoint.CHAT, 400, b"application/json", json.dumps(body).encode())
    wanted = {"object": "error", "message": "wrong", "type": "BadRequestError", "param": "top_k", "code": 400}
    assert (kind, json.loads(found)) == (b"application/json", {"error": wanted})


@pytest.mark.parametrize(
    "body", [b"Internal Server Error", b'{"detail": [{"loc": ["body"], "msg": "Field required"}]}', b""]
)
def test_what_is_no_error_of_sglangs_becomes_one(body: bytes) -> None:
    _, found = client_error(Endpoint.COMPLETIONS, 500, b"text/plain", body)
    error = json.loads(found)["error"]
    assert error["code"] == 500 and error["message"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cannot read /root/models/base/config.json: no", "cannot read config.json: no"),
        ('File "/usr/lib/python3/x.py", line 3', 'File "x.py", line 3'),
        ("see http://127.0.0.1:30000/v1/models and /v1/chat/completions", None),
        ("The router has no /m/planner/x.", None),
        ("5/7 of 3/4", None),
        ("Oh: Traceback (most recent call last): secrets", "Oh:"),
    ],
)
def test_file_paths_stay_behind(text: str, wanted: str | None) -> None:
    assert without_paths(text) == (wanted if wanted is not None else text)
