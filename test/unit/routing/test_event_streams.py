"""Followers over real sockets: batches, gaps that are repeated, restarts, and bytes that are no batch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import zmq.asyncio

from sglang_prefillshare.protocol import EventStream, Role
from sglang_prefillshare.routing.block_index import BlockIndex, Follow, Told
from sglang_prefillshare.routing.event_streams import Follower, Reader, StreamError
from test.unit.routing.publisher import CLEARED, Publisher, removed, stored
from test.unit.routing.routing_harness import info, running_system, until
from test.unit.routing.routing_harness import run as run_system


@contextlib.asynccontextmanager
async def following(**changes: Any) -> AsyncIterator[tuple[Publisher, Follow]]:
    context = zmq.asyncio.Context()
    publisher = Publisher(context, **changes)
    await publisher.start()
    follow = BlockIndex(capacity_bytes=10_000, capacity_blocks=1000).follow("http://p0", ("base", 1))
    port, replay_port = publisher.ports
    stream = EventStream(port=port, replay_port=replay_port)
    follower = Follower(
        follow, stream, url="http://127.0.0.1:1", context=context, replay_timeout_s=0.3, retry_s=0.1
    )  # fmt: skip
    task = asyncio.create_task(follower.run())
    try:
        yield publisher, follow
    finally:
        follower.end()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await publisher.stop()
        context.destroy(linger=0)


def blocks(follow: Follow) -> set[int]:
    return {block for block in range(100) if block in follow.held}


async def subscribed(publisher: Publisher, follow: Follow) -> None:
    """Until what is published arrives: a subscription takes a moment."""
    await until(lambda: follow.is_current)
    for _ in range(100):
        await publisher.publish(stored(None, 99))
        await asyncio.sleep(0.02)
        if 99 in follow.held:
            break
    await publisher.publish(removed(99))
    await until(lambda: 99 not in follow.held)


def test_what_was_published_before_and_after_the_router_came_is_known():
    async def run() -> None:
        async with following() as (publisher, follow):
            await publisher.publish(stored(None, 1, 2, 3))
            await subscribed(publisher, follow)
            await publisher.publish(stored(3, 4), removed(4, 3), stored(None, 50, medium="CPU_PINNED"))
            await until(lambda: blocks(follow) == {1, 2})
            assert follow.held.parent(2) == 1 and follow.held.parent(1) is None
            await publisher.publish(CLEARED, stored(None, 8))
            await until(lambda: blocks(follow) == {8})
            assert follow.is_current

    asyncio.run(run())


def test_a_gap_is_repeated_and_nothing_counts_twice():
    async def run() -> None:
        async with following() as (publisher, follow):
            await subscribed(publisher, follow)
            await publisher.publish(stored(None, 1), is_missed=True)
            await publisher.publish(removed(1), stored(None, 2), is_missed=True)
            await publisher.publish(stored(2, 3))
            await until(lambda: blocks(follow) == {2, 3})
            assert publisher.asked[-1] > 0, "what is known is not asked for again"

    asyncio.run(run())


def test_a_block_that_was_named_and_does_not_come_is_asked_for():
    """The last batch was missed, and no later one shows it."""

    async def run() -> None:
        async with following() as (publisher, follow):
            await subscribed(publisher, follow)
            await publisher.publish(stored(None, 1), is_missed=True)
            follow.computed([b"abcdefgh"], [Told(1, 1)], now_s=time.monotonic())
            await until(lambda: blocks(follow) == {1})
            await until(lambda: follow.expected_tokens([b"abcdefghijkl"]) == 1)
            assert follow.oldest_awaited_s() is None

    asyncio.run(run())


def test_what_cannot_be_repeated_any_more_empties():
    """Its removals were missed: it would be found where it is not."""

    async def run() -> None:
        async with following(buffer=3) as (publisher, follow):
            await subscribed(publisher, follow)
            await publisher.publish(stored(None, 1, 2))
            await until(lambda: blocks(follow) == {1, 2})
            for block in (10, 20, 30, 40):
                await publisher.publish(stored(None, block), is_missed=True)
            await publisher.publish(stored(None, 50))
            await until(lambda: blocks(follow) == {30, 40, 50})
            assert follow.is_current

    asyncio.run(run())


def test_a_replay_in_parts_is_asked_for_part_by_part():
    async def run() -> None:
        async with following(drops_after=4) as (publisher, follow):
            for block in range(1, 11):
                await publisher.publish(stored(None, block), is_missed=True)
            await until(lambda: follow.is_current and blocks(follow) == set(range(1, 11)))

    asyncio.run(run())


@pytest.mark.parametrize("is_noticed", [True, False], ids=["by_the_polls", "by_the_numbers"])
def test_a_worker_that_restarted_holds_what_it_published_since(is_noticed: bool):
    async def run() -> None:
        async with following() as (publisher, follow):
            await subscribed(publisher, follow)
            await publisher.publish(stored(None, 1, 2, 3))
            await until(lambda: blocks(follow) == {1, 2, 3})
            await publisher.restart()
            if is_noticed:
                follow.forget()
                assert not follow.is_current and not blocks(follow)
            await asyncio.sleep(0.5)  # the subscription finds its way back
            await publisher.publish(stored(None, 5))
            await publisher.publish(stored(5, 6))
            await until(lambda: follow.is_current and blocks(follow) == {5, 6})

    asyncio.run(run())


GARBAGE = [
    [b"", b"short", b""],
    [b"", (10**6).to_bytes(8, "big")],
    [b"only one"],
    [b"", (2**63).to_bytes(8, "big"), b"\x93"],
    *([b"", b"%NEXT%", payload] for payload in (
        b"", b"\xc1", os.urandom(64), b"\x93" * 100_000,
        msgspec.msgpack.encode([1.0, [{"type": "BlockStored", "block_hashes": ["x"]}], 0]),
        msgspec.msgpack.encode([1.0, [{"type": "Unheard"}], 0]),
        msgspec.msgpack.encode([1.0, [stored(None, 1, size=77)], 0]),
        msgspec.msgpack.encode([1.0, [stored(None, *range(5000))], 0]),
        msgspec.msgpack.encode([1.0, [stored(None, 2**64 - 1)], None, "more"]),
    )),
]  # fmt: skip


def test_bytes_that_are_no_batch_cost_the_worker_its_place_for_a_moment():
    async def run() -> None:
        async with following() as (publisher, follow):
            await subscribed(publisher, follow)
            for number, frames in enumerate(GARBAGE):
                sent = [publisher.next.to_bytes(8, "big") if frame == b"%NEXT%" else frame for frame in frames]
                await publisher.pub.send_multipart(sent)
                await asyncio.sleep(0.02)
                await publisher.publish(stored(None, number % 90))
                await until(lambda number=number: follow.is_current and number % 90 in follow.held)  # type: ignore[misc]

    asyncio.run(run())


def test_a_worker_that_does_not_repeat_is_guessed_until_it_does():
    async def run() -> None:
        async with following(is_mute=True) as (publisher, follow):
            await publisher.publish(stored(None, 1), is_missed=True)
            await until(lambda: "does not repeat" in (follow.problem or ""))
            assert not follow.is_current
            publisher.is_mute = False
            await until(lambda: follow.is_current and blocks(follow) == {1})
            assert follow.problem is None

    asyncio.run(run())


def test_more_blocks_than_are_kept_of_a_worker_are_guessed():
    reader = Reader(BlockIndex(capacity_bytes=10, capacity_blocks=3).follow("http://p0", ("base", 1)))
    with pytest.raises(StreamError, match="over 3 blocks"):
        reader.take(bytes(8), msgspec.msgpack.encode([1.0, [stored(None, 1, 2, 3, 4)], 0]))


def test_a_router_predicts_by_its_workers_events_and_counts_how_well():
    """A worker that publishes beside one that does not: what the one is expected to hold follows its events."""

    async def scenario() -> None:
        context = zmq.asyncio.Context()
        publisher = Publisher(context)
        await publisher.start()

        def publishes(prefill: list[Any], _decode: Any) -> None:
            port, replay_port = publisher.ports
            prefill[0].info = info(Role.PREFILL, "base", events=EventStream(port=port, replay_port=replay_port))
            prefill[0].told = "40:2"  # two blocks of 16

        try:
            async with running_system(prefill=2, prepare=publishes) as system:
                source, guessed = (worker.url for worker in system.prefill)
                index = system.router.pool.blocks
                await until(lambda: index.current(source) is not None)
                assert index.known(guessed) is None
                events = [w["events"] for w in (await system.get("/workers")).json()["workers"][:2]]
                assert events == [{"is_current": True, "blocks": 0, "problem": None}, None]

                ids, names = list(range(41)), (f"session {number}" for number in itertools.count())
                home = {"x-smg-routing-key": next(names)}

                async def call(prompt: list[int]) -> dict[str, Any]:
                    """What is known of a call that went there: its session's, or, where that has no place or another,
                    that of the first new one which finds its place there."""
                    for _ in range(10):
                        answer = await system.post("/generate", {"model": "planner", "input_ids": prompt}, headers=home)
                        assert answer.status == 200
                        found = await system.last_call()
                        if found["prefill_worker"] == source:
                            return found
                        home["x-smg-routing-key"] = next(names)
                    raise AssertionError("no session found its place there")

                await call(ids)
                await publisher.publish(stored(None, 1, 2, size=16))
                known = index.known(source)
                assert known is not None
                await until(lambda: 2 in known.held)

                async def predicted() -> tuple[int, str]:
                    found = await call([*ids, 5])
                    return found["matched_tokens"], found["matched_by"]

                assert await predicted() == (32, "events")
                await publisher.publish(removed(2))
                await until(lambda: 2 not in known.held)
                system.prefill[0].told = None
                assert await predicted() == (16, "events")
                assert await system.metric('predicted_tokens_total{source="events"}') == 48
                assert await system.metric('found_tokens_total{source="events"}') == 96  # it says 32 each time
                assert await system.metric('prediction_error_tokens_total{source="events"}') == 32 + 0 + 16
                assert await system.metric(f'worker_events_followed{{worker="{source}"}}') == 1
                assert await system.metric(f'worker_events_followed{{worker="{guessed}"}}') == 0

                system.prefill[0].told = "not, this"
                assert (await predicted())[0] == 16, "a header that cannot be read costs nothing"
                assert (await system.post("/flush_cache", b"")).status == 200
                assert len(known.held) == 0 and known.is_current, "before its events say so"
                await publisher.publish(CLEARED, stored(None, 1, size=16))
                await until(lambda: 1 in known.held)
                assert await predicted() == (16, "events")
                await system.prefill[0].stop()
                await until(lambda: not system.router.pool[source].is_ready)
                publisher.is_mute = True
                await system.prefill[0].start()
                await until(lambda: system.router.pool[source].is_ready)
                assert len(known.held) == 0 and await predicted() == (0, "guess"), "nothing is known of it yet"
                publisher.is_mute = False
                await until(lambda: index.current(source) is not None)
        finally:
            await publisher.stop()
            context.destroy(linger=0)

    run_system(scenario())
