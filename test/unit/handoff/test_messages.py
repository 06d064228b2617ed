"""`handoff/messages.py`: every message survives the wire, and nothing else gets past the decoder."""

from __future__ import annotations

import pickle
import types
import typing
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import messages
from sglang_prefillshare.handoff.messages import TAG, Message, decode, encode

KINDS: tuple[type[msgspec.Struct], ...] = typing.get_args(Message)


def hints(kind: Any) -> dict[str, Any]:
    """The types of a struct's fields, with their constraints."""
    return typing.get_type_hints(kind, include_extras=True)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return structs(kind)
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        limits = of[1]
        return st.integers(limits.ge, 2**64 - 1 if limits.le is None else limits.le)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(each) for each in of])
    if origin is tuple and of[1:] == (...,):
        return st.lists(values(of[0]), max_size=5).map(tuple)
    if origin is tuple:
        return st.tuples(*[values(each) for each in of])
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**64 - 1),
        str: st.text(),
        bytes: st.binary(),
        type(None): st.none(),
    }
    return plain[kind]


def structs(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: values(of) for name, of in hints(kind).items()})


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[msgspec.Struct]:
    kind: type[msgspec.Struct] = request.param
    return kind


def example(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """A message of this kind, as what goes over the wire; of several types the first."""
    plain = {int: 1, str: "x", bytes: b"\1\0\0\0"}

    def of(hint: Any) -> Any:
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            tag = hint.__struct_config__.tag
            return {
                **({} if tag is None else {"type": tag}),
                **{name: of(inner) for name, inner in hints(hint).items()},
            }
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType, Annotated):
            return of(inner[0])
        if origin is tuple:
            return [of(each) for each in inner if each is not ...]
        return plain[hint]

    whole: dict[str, Any] = of(kind)
    return whole


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
    "frames",
    [
        [],
        [b""],
        [b"STATUS", b"x"],
        [b"ABORT", b"1", b"2"],
        [b"x", TAG],
        [TAG.partition(b"/")[0], b"x"],
        [TAG.lower(), b"x"],
        [b" " + TAG, b"x"],
    ],
)
def test_frames_of_others_are_left_to_them(frames: list[bytes]) -> None:
    assert decode(frames) is None


@pytest.mark.parametrize("count", [0, 2, 3])
def test_another_number_of_frames_is_refused(count: int) -> None:
    with pytest.raises(HandoffError, match=f"has {count + 1} frames, wanted 2"):
        decode([TAG, *([wire(example(messages.Pulled))[1]] * count)])


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        (b"PREFILLSHARE/2", "PREFILLSHARE/2"),
        (b"PREFILLSHARE/30", "PREFILLSHARE/30"),
        (b"PREFILLSHARE/", "PREFILLSHARE/"),
        (b"PREFILLSHARE/4 ", "PREFILLSHARE/4 "),
        (b"PREFILLSHARE/\xff", "PREFILLSHARE/\N{REPLACEMENT CHARACTER}"),
    ],
)
@pytest.mark.parametrize("payload_frames", [0, 1, 2])
def test_a_peer_of_another_version_is_refused_by_both_versions_names(
    tag: bytes, name: str, payload_frames: int
) -> None:
    message = f"a peer speaks {name}, this worker PREFILLSHARE/4. Run the same sglang-prefillshare version"
    with pytest.raises(HandoffError, match=message):
        decode([tag, *([wire(example(messages.Pulled))[1]] * payload_frames)])


# ---- what a field may hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (messages.Pool, "lease_bytes"),
        (messages.Pool, "page_count"),
        (messages.Want, "page_count"),
        (messages.Want, "prefix_tokens"),
        (messages.Pages, "first"),
        (messages.Pages, "lease_slot"),
    ],
)
def test_a_count_is_zero_or_more(kind: type[msgspec.Struct], name: str) -> None:
    assert getattr(decode(wire({**example(kind), name: 0})), name) == 0
    with pytest.raises(HandoffError, match=rf"`int` >= 0 - at `\$\.{name}`"):
        decode(wire({**example(kind), name: -1}))


@pytest.mark.parametrize(
    "memory",
    [
        {"type": "HostMemory", "fd": 3, "region_bytes": -1, "offsets": [0]},
        {"type": "HostMemory", "fd": 3, "region_bytes": 64, "offsets": [0, -64]},
        {"type": "CudaMemory", "device_uuid": "x", "handles": [b"x"], "buffers": [[0, 0], [-1, 0]]},
        {"type": "CudaMemory", "device_uuid": "x", "handles": [b"x"], "buffers": [[0, 0], [0, -1]]},
    ],
)
def test_no_buffer_of_a_pool_begins_before_its_memory(memory: dict[str, Any]) -> None:
    with pytest.raises(HandoffError, match="`int` >= 0 - at"):
        decode(wire({**example(messages.Pool), "memory": memory}))


@pytest.mark.parametrize(("port", "is_one"), [(1, True), (65535, True), (0, False), (65536, False), (-1, False)])
def test_a_port_is_one_that_can_be_listened_on(port: int, is_one: bool) -> None:
    frames = wire({**example(messages.Register), "port": port})
    if is_one:
        message = decode(frames)
        assert isinstance(message, messages.Register) and message.port == port
    else:
        with pytest.raises(HandoffError, match=r"does not decode.*at `\$\.port`"):
            decode(frames)


@pytest.mark.parametrize(
    "memory",
    [
        messages.HostMemory(fd=7, region_bytes=8192, offsets=(0, 4096)),
        messages.CudaMemory(device_uuid="GPU-1", handles=(b"h" * 64,), buffers=((0, 0), (0, 1 << 40))),
    ],
)
def test_a_pool_is_in_host_memory_or_on_a_gpu_and_arrives_as_the_one_it_is(memory: Any) -> None:
    sent = msgspec.structs.replace(decode(wire(example(messages.Pool))), memory=memory)
    got = decode(encode(sent))
    assert isinstance(got, messages.Pool)
    assert (type(got.memory), got.memory) == (type(memory), memory)


HOST_MEMORY = {"type": "HostMemory", "fd": 3, "region_bytes": 64, "offsets": [0]}
CUDA_MEMORY = {"type": "CudaMemory", "device_uuid": "x", "handles": [b"x"], "buffers": [[0, 0]]}


@pytest.mark.parametrize(
    "memory",
    [
        None,
        {key: value for key, value in HOST_MEMORY.items() if key != "type"},
        {**HOST_MEMORY, "type": "FloppyDisk"},
        {**HOST_MEMORY, "type": "CudaMemory"},
        {**CUDA_MEMORY, "type": "HostMemory"},
        {**CUDA_MEMORY, "buffers": [[0]]},
        {**CUDA_MEMORY, "buffers": [[0, 0, 0]]},
        {**CUDA_MEMORY, "handles": [3]},
    ],
)
def test_a_pool_in_memory_of_no_known_kind_is_refused(memory: Any) -> None:
    for whole in (HOST_MEMORY, CUDA_MEMORY):
        assert decode(wire({**example(messages.Pool), "memory": whole})) is not None
    with pytest.raises(HandoffError, match=r"does not decode.*at `\$\.memory"):
        decode(wire({**example(messages.Pool), "memory": memory}))


def test_no_metadata_empty_metadata_and_empty_rows_are_told_apart() -> None:
    for metadata in (None, (), (b"",), (b"a", b"bc")):
        sent = msgspec.structs.replace(decode(wire(example(messages.Pages))), metadata=metadata)
        got = decode(encode(sent))
        assert isinstance(got, messages.Pages) and got.metadata == metadata


# ---- no code comes over the wire -----------------------------------------------------------------------------------


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
