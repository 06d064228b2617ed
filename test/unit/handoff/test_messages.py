"""`handoff/messages.py`: every message survives the wire, and nothing else gets past the decoder."""

from __future__ import annotations

import pickle
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import messages
from sglang_prefillshare.handoff.messages import TAG, Message, decode, encode

KINDS: tuple[type[msgspec.Struct], ...] = typing.get_args(Message)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return structs(kind)
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(each) for each in of])
    if origin is tuple:
        assert of[1:] == (...,), kind
        return st.lists(values(of[0]), max_size=5).map(tuple)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**64 - 1),
        str: st.text(),
        bytes: st.binary(),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return plain[kind]


def structs(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: values(of) for name, of in typing.get_type_hints(kind).items()})


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[msgspec.Struct]:
    kind: type[msgspec.Struct] = request.param
    return kind


def example(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """A message of this kind, as what goes over the wire."""
    plain = {int: 1, str: "x", bytes: b"\1\0\0\0"}

    def of(hint: Any) -> Any:
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            return {name: of(inner) for name, inner in typing.get_type_hints(hint).items()}
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            return of(typing.get_args(hint)[0])
        if typing.get_origin(hint) is tuple:
            return [of(typing.get_args(hint)[0])]
        return plain[hint]

    return {"type": kind.__name__, **{name: of(hint) for name, hint in typing.get_type_hints(kind).items()}}


def wire(value: Any) -> list[bytes]:
    return [TAG, msgspec.msgpack.encode(value)]


@given(message=st.one_of([structs(kind) for kind in KINDS]))
def test_every_message_survives_the_wire(message: Any) -> None:
    frames = encode(message)
    assert all(isinstance(frame, bytes) for frame in frames)
    assert decode(frames) == message
    assert type(decode(frames)) is type(message)


def test_an_example_decodes_so_that_what_follows_fails_for_its_reason(kind: type[msgspec.Struct]) -> None:
    assert type(decode(wire(example(kind)))) is kind


def test_a_missing_field_is_refused(kind: type[msgspec.Struct]) -> None:
    whole = example(kind)
    for name in whole:
        with pytest.raises(HandoffError, match="does not decode"):
            decode(wire({key: value for key, value in whole.items() if key != name}))


def test_a_field_of_another_type_is_refused(kind: type[msgspec.Struct]) -> None:
    whole = example(kind)
    for name in whole:
        with pytest.raises(HandoffError, match="does not decode"):
            decode(wire({**whole, name: 1.5}))


def test_every_truncation_is_refused(kind: type[msgspec.Struct]) -> None:
    tag, payload = wire(example(kind))
    for length in range(len(payload)):
        with pytest.raises(HandoffError, match="does not decode"):
            decode([tag, payload[:length]])
    with pytest.raises(HandoffError, match="does not decode"):
        decode([tag, payload + b"\0"])


@pytest.mark.parametrize("value", [None, 1, "Want", [], {}, {"type": "Nothing"}, {"type": 1}])
def test_what_is_no_message_is_refused(value: Any) -> None:
    with pytest.raises(HandoffError, match="does not decode"):
        decode(wire(value))


@given(payload=st.binary())
def test_any_bytes_behind_our_tag_are_a_message_or_an_error_of_ours(payload: bytes) -> None:
    try:
        message = decode([TAG, payload])
    except HandoffError:
        return
    assert isinstance(message, KINDS)


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_a_damaged_message_is_a_message_or_an_error_of_ours(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    tag, payload = wire(example(kind))
    index = data.draw(st.integers(0, len(payload) - 1))
    byte = data.draw(st.integers(0, 255))
    try:
        message = decode([tag, payload[:index] + bytes([byte]) + payload[index + 1 :]])
    except HandoffError:
        return
    assert isinstance(message, KINDS)


def test_text_that_is_not_utf_8_is_refused() -> None:
    tag, payload = wire({**example(messages.Refused), "reason": "????"})
    with pytest.raises(HandoffError, match="does not decode"):
        decode([tag, payload.replace(b"????", b"\xff\xfe??")])


@pytest.mark.parametrize(
    "frames", [[], [b""], [b"KVPOLL", b"x"], [TAG + b"0", b"x"], [b"x", TAG], [b"None", b"1", b"2"]]
)
def test_frames_of_others_are_left_to_them(frames: list[bytes]) -> None:
    assert decode(frames) is None


@pytest.mark.parametrize("count", [0, 2, 3])
def test_another_number_of_frames_is_refused(count: int) -> None:
    with pytest.raises(HandoffError, match=f"has {count + 1} frames, wanted 2"):
        decode([TAG, *([wire(example(messages.Pulled))[1]] * count)])


class Trap:
    """Unpickling it is noticed."""

    sprung = False

    @staticmethod
    def spring() -> None:
        Trap.sprung = True

    def __reduce__(self) -> Any:
        return Trap.spring, ()


def test_pickles_are_not_opened() -> None:
    payload = pickle.dumps(Trap())
    for frames in ([TAG, payload], wire({**example(messages.Pages), "pages": payload})):
        try:
            decode(frames)
        except HandoffError:
            pass
        else:
            assert frames[1] != payload
    assert not Trap.sprung
    pickle.loads(payload)
    assert Trap.sprung, "the trap works"
