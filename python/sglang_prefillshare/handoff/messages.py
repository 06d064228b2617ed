"""Wire messages of the `prefillshare` backend: typed, validated while decoding, never pickled.

    decode → prefill   Register   once per peer: who I am and what my pool looks like
    prefill → decode   Pool       the answer: how to map mine, or Refused with the reason
    decode → prefill   Want       per request: this room's KV goes into so many of my pages
    prefill → decode   Pages      per chunk: these pages of mine hold it; the last one carries SGLang's metadata
    decode → prefill   Pulled     all of it is copied: the pages are yours again

Whether a copy counts is not asked: decode looks at the lease's word in memory that prefill shares (`lease_table.py`).
A message is one msgpack frame behind a tag frame, so that SGLang's own control messages can share the socket.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.geometry import KVGeometry
from sglang_prefillshare.handoff.ranks import Rank

TAG: Final = b"PREFILLSHARE/4"
"""Raised with every change of the messages: peers of two versions do not understand each other, and must not try."""

Count = Annotated[int, msgspec.Meta(ge=0)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
LeaseNumber = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class Register(msgspec.Struct, tag=True, frozen=True):
    """`session` names the decode process for its lifetime; `host` and `port` are where its control socket listens."""

    session: str
    host: str
    port: Port
    pid: int
    started: int
    bootstrap_addr: str
    fingerprint: str
    geometry: KVGeometry


class HostMemory(msgspec.Struct, tag=True, frozen=True):
    """A pool in one shared region of host memory; buffer i starts at byte offsets[i]."""

    fd: int
    region_bytes: Count
    offsets: tuple[Count, ...]


class CudaMemory(msgspec.Struct, tag=True, frozen=True):
    """A pool on a GPU: exported allocations, and for buffer i (allocation, byte offset in it)."""

    device_uuid: str
    handles: tuple[bytes, ...]
    buffers: tuple[tuple[Count, Count], ...]


class Pool(msgspec.Struct, tag=True, frozen=True):
    """The pool of one rank of prefill, of `page_count` pages, and the region with the words of its leases.

    Both are in process `pid`.
    """

    bootstrap_addr: str
    pid: int
    started: int
    lease_fd: int
    lease_bytes: Count
    page_count: Count
    geometry: KVGeometry
    memory: HostMemory | CudaMemory
    rank: Rank


class Refused(msgspec.Struct, tag=True, frozen=True):
    bootstrap_addr: str
    reason: str


class Want(msgspec.Struct, tag=True, frozen=True):
    """`page_count` pages, after the first `prefix_tokens` tokens of the prompt, whose KV decode holds already.

    `readers` ranks of decode want pages of this rank of prefill for the room, each some of its heads.
    """

    room: int
    session: str
    page_count: Count
    prefix_tokens: Count
    readers: Annotated[int, msgspec.Meta(ge=1)]


class Pages(msgspec.Struct, tag=True, frozen=True):
    """Pages [first, first + n) of what decode wants lie in prefill's `pages` (little-endian int32, 4n bytes).

    They stay as they are while the lease's word bears its number. `metadata`, on the last chunk only, is one row of
    each of SGLang's metadata buffers. `sent_ns` is prefill's monotonic clock, which a host's processes share.
    """

    room: int
    pid: int
    first: Count
    pages: bytes
    lease_slot: Count
    lease_number: LeaseNumber
    sent_ns: int
    metadata: tuple[bytes, ...] | None


class Pulled(msgspec.Struct, tag=True, frozen=True):
    room: int
    session: str


Message = Register | Pool | Refused | Want | Pages | Pulled

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> list[bytes]:
    """The frames of a message."""
    return [TAG, _encoder.encode(message)]


def decode(frames: list[bytes]) -> Message | None:
    """The message in `frames`; None if it is not one of ours; `HandoffError` if it is malformed."""
    if not frames or frames[0] != TAG:
        if frames and frames[0].startswith(TAG.partition(b"/")[0] + b"/"):
            raise HandoffError(
                f"a peer speaks {frames[0].decode(errors='replace')}, this worker {TAG.decode()}. "
                "Run the same sglang-prefillshare version on prefill and decode."
            )
        return None
    if len(frames) != 2:
        raise HandoffError(f"a control message has {len(frames)} frames, wanted 2.")
    try:
        return _decoder.decode(frames[1])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HandoffError(f"a control message does not decode: {error}.") from error
