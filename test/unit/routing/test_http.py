"""What a client may send beside a body: the head of a request and the framing of chunks, over real sockets."""

import asyncio
import json

import pytest

from sglang_prefillshare.bounded_http import MAX_HEAD_BYTES
from test.unit.routing.routing_harness import run, running_system

BODY = json.dumps({"model": "coder", "messages": [{"role": "user", "content": "x"}]}).encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: r\r\ncontent-type: application/json\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
PIECE = b"a" * 1024


async def _connected(system):
    return await asyncio.open_connection("127.0.0.1", int(system.url.rpartition(":")[2]))


async def _flood(system, start, piece, *, most):
    """Send `start`, then `piece` again and again; returns how many bytes went out and what came back."""
    reader, writer = await _connected(system)
    sent = 0
    try:
        writer.write(start)
        while sent < most and not reader.at_eof():
            writer.write(piece)
            sent += len(piece)
            await writer.drain()
            await asyncio.sleep(0)
    except ConnectionError:
        pass
    try:
        answer = await asyncio.wait_for(reader.read(), timeout=5)
    except ConnectionError:
        answer = b""
    writer.close()
    return sent, answer


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /", PIECE),
        (POST + b"x-long: ", PIECE),
        (POST, b"x-many: " + PIECE + b"\r\n"),
        (CHUNKED + b"0\r\n", b"x-trailer: " + PIECE + b"\r\n"),
        (CHUNKED + b"0\r\nx-trailer: ", PIECE),
        (CHUNKED + b"1;", PIECE),
    ],
    ids=["line", "one header", "many headers", "many trailers", "one trailer", "chunk extension"],
)
def test_what_is_no_body_is_bounded_and_harms_nobody_else(start, piece):
    async def scenario():
        async with running_system() as system:
            most = 64 * MAX_HEAD_BYTES
            sent, answer = await _flood(system, start, piece, most=most)
            assert sent < most, "the router read all of it"
            assert not answer or b" 431 " in answer or b" 400 " in answer, answer[:200]
            assert (await system.chat("coder")).status == 200
            system.assert_idle()

    run(scenario())


def test_a_head_that_is_too_large_is_told_so():
    async def scenario():
        async with running_system() as system:
            reader, writer = await _connected(system)
            writer.write(POST + b"x-long: " + b"a" * (MAX_HEAD_BYTES + 1024))
            answer = await asyncio.wait_for(reader.read(), timeout=5)
            writer.close()
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 431 ") and str(MAX_HEAD_BYTES) in json.loads(body)["error"]["message"]

    run(scenario())


def test_large_heads_small_chunks_and_many_requests_of_one_connection_are_served():
    async def scenario():
        async with running_system() as system:
            reader, writer = await _connected(system)
            large = POST + b"".join(b"x-%d: %b\r\n" % (number, b"a" * 7000) for number in range(MAX_HEAD_BYTES // 7500))
            plain = large + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
            chunked = CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
            for request in (plain, chunked, plain, plain):
                writer.write(request)
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout=5)
                assert head.startswith(b"HTTP/1.1 200 "), head
                lengths = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                size = int(next(lengths).partition(b":")[2])
                await reader.readexactly(size)
            long = json.dumps({"model": "coder", "messages": [{"role": "user", "content": "x" * 30_000}]}).encode()
            writer.write(CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in long) + b"0\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout=5)
            assert head.startswith(b"HTTP/1.1 200 "), head
            writer.close()

    run(scenario())
