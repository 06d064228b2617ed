"""Wire messages of the `prefillshare` backend: typed, validated while decoding, never pickled.

    decode → prefill   Register   once per peer: who I am and what my pool looks like
    prefill → decode   Pool       the answer: how to map mine, or Refused with the reason
    decode → prefill   Want       per request: this room's KV goes into so many of my pages
    prefill → decode   Pages      per chunk: these pages of mine hold it; the last one carries SGLang's metadata
    decode → prefill   Pulled     all of it is copied
    prefill → decode   Sealed     the pages were the room's until then: decode may use its copy

A message is one msgpack frame behind a tag frame, so that SGLang's own control messages can share the socket.
"""

from __future__ import annotations

from typing import Final

import msgspec

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.geometry import KVGeometry

TAG: Final = b"PREFILLSHARE/2"
"""Raised with every change of the messages: peers of two versions do not understand each other, and must not try."""


class Register(msgspec.Struct, tag=True, frozen=True):
    """`session` names the decode process for its lifetime; `host` and `port` are where its control socket listens."""

    session: str
    host: str
    port: int
    pid: int
    started: int
    bootstrap_addr: str
    fingerprint: str
    geometry: KVGeometry


class Pool(msgspec.Struct, tag=True, frozen=True):
    """`offsets[i]` is where buffer i starts in the region; it holds `page_count` pages."""

    bootstrap_addr: str
    pid: int
    started: int
    fd: int
    region_bytes: int
    page_count: int
    offsets: tuple[int, ...]
    geometry: KVGeometry


class Refused(msgspec.Struct, tag=True, frozen=True):
    bootstrap_addr: str
    reason: str


class Want(msgspec.Struct, tag=True, frozen=True):
    room: int
    session: str
    page_count: int
    prefix_tokens: int


class Pages(msgspec.Struct, tag=True, frozen=True):
    """Pages [first, first + n) of the room lie in prefill's `pages` (little-endian int32, 4n bytes).

    `metadata`, on the last chunk only, is one row of each of SGLang's metadata buffers.
    """

    room: int
    pid: int
    first: int
    pages: bytes
    metadata: tuple[bytes, ...] | None


class Pulled(msgspec.Struct, tag=True, frozen=True):
    room: int
    session: str


class Sealed(msgspec.Struct, tag=True, frozen=True):
    """Without it decode could use a copy that it took while prefill, aborted, was already giving the pages away."""

    room: int


Message = Register | Pool | Refused | Want | Pages | Pulled | Sealed

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> list[bytes]:
    """The frames of a message."""
    return [TAG, _encoder.encode(message)]


def decode(frames: list[bytes]) -> Message | None:
    """The message in `frames`; None if it is not one of ours; `HandoffError` if it is malformed."""
    if not frames or frames[0] != TAG:
        return None
    if len(frames) != 2:
        raise HandoffError(f"a control message has {len(frames)} frames, wanted 2.")
    try:
        return _decoder.decode(frames[1])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HandoffError(f"a control message does not decode: {error}.") from error
