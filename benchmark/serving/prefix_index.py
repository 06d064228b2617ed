"""What the router spends on knowing what workers hold, with its guess and with their events; no server.

    python -m benchmark.serving.prefix_index

Prompts of token ids in sessions of ten turns; blocks of one token, of which there are the most. Per request, a match
for each of two prefill workers (microseconds, median of 200): of a prompt that goes on from the last turn, of one that
branches off in a third of it, and (`cut`) of one whose last half the workers have given up; beside it the guess,
hashing included, and what is noted after a turn. Per block, what an event costs, decoded and put in, and the memory
that a block takes (bytes, of the whole process).
"""

from __future__ import annotations

import random
import statistics
import struct
import time
from collections.abc import Callable

import click
import msgspec
import psutil

from sglang_prefillshare.routing.block_index import BlockIndex, Told
from sglang_prefillshare.routing.event_streams import Reader
from sglang_prefillshare.routing.prefix_index import PrefixIndex, chain_hashes

WORKERS = ("http://127.0.0.1:1", "http://127.0.0.1:2")
TURNS = 10
REPEATS = 200


def ids_bytes(ids: list[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def median_us(function: Callable[[bytes], object], prompts: list[bytes]) -> float:
    """Each call gets bytes that were not seen before, as those of a request are."""
    found = []
    for number in range(REPEATS):
        prompt = bytes(bytearray(prompts[number % len(prompts)]))
        began = time.perf_counter()
        function(prompt)
        found.append(time.perf_counter() - began)
    return statistics.median(found) * 1e6


def measure(blocks: int) -> None:
    draw = random.Random(blocks)
    ids = [draw.randrange(32_000) for _ in range(blocks + 1)]
    hashes = [draw.randrange(-(2**63), 2**63) for _ in range(blocks)]
    other_ids, other_hashes = ids[: blocks // 3], hashes[: blocks // 3]
    index = BlockIndex(capacity_bytes=16 << 20, capacity_blocks=1 << 20)
    guess = PrefixIndex(capacity_blocks=65_536)
    follows = [index.follow(url, ("base", 1)) for url in WORKERS]
    learned = 0.0
    for follow in follows:
        follow.held.store(None, hashes)
        follow.up_to_date()
        for turn in range(1, TURNS + 1):
            count = blocks * turn // TURNS
            prompt = ids_bytes(ids[: count + 1])
            began = time.perf_counter()
            follow.computed([prompt], [Told(count, hashes[count - 1])], now_s=0.0)
            learned = max(learned, time.perf_counter() - began)
    for url in WORKERS:
        guess.insert(url, chain_hashes(ids_bytes(ids), block_bytes=256))
    longer = [ids_bytes([*ids, *(draw.randrange(32_000) for _ in range(200))]) for _ in range(8)]
    branching = [ids_bytes([*other_ids, *(draw.randrange(32_000) for _ in range(200))]) for _ in range(8)]

    def exact(prompt: bytes) -> int:
        return sum(follow.expected_tokens([prompt]) for follow in follows)

    def guessed(prompt: bytes) -> int:
        chain = chain_hashes(prompt, block_bytes=256)
        return sum(guess.match(url, chain) for url in WORKERS) * 64

    assert exact(longer[0]) == 2 * blocks and exact(branching[0]) >= 2 * len(other_hashes)
    row = {"goes on": median_us(exact, longer), "branches": median_us(exact, branching)}
    row["guess"] = median_us(guessed, longer)
    for follow in follows:
        follow.held.remove(hashes[blocks // 2 :])
    assert exact(longer[0]) == 2 * (blocks // 2)
    row["cut"] = median_us(exact, longer)
    row["noting a turn, at most"] = learned * 1e6
    click.echo(f"{blocks} blocks, us a request: " + ", ".join(f"{name} {value:.1f}" for name, value in row.items()))


def measure_events(blocks: int) -> None:
    draw = random.Random(5)
    process = psutil.Process()
    batches = []
    for start in range(0, blocks, 2000):
        event = {
            "type": "BlockStored",
            "block_hashes": [draw.randrange(-(2**63), 2**63) for _ in range(2000)],
            "parent_block_hash": None,
            "token_ids": list(range(2000)),
            "block_size": 1,
            "lora_id": None,
            "medium": "GPU",
        }
        batches.append(msgspec.msgpack.encode([float(start), [event], 0]))
    reader = Reader(BlockIndex(capacity_bytes=1, capacity_blocks=blocks).follow(WORKERS[0], ("base", 1)))
    before = process.memory_info().rss
    began = time.perf_counter()
    for number, payload in enumerate(batches):
        reader.take(number.to_bytes(8, "big"), payload)
    elapsed = time.perf_counter() - began
    grown = process.memory_info().rss - before
    click.echo(f"{blocks} blocks of events: {elapsed / blocks * 1e6:.2f} us and {grown / blocks:.0f} bytes a block")


@click.command(help=__doc__)
@click.option(
    "--blocks", "sizes", type=int, multiple=True, default=(1_000, 10_000), show_default=True, help="Of a prompt."
)
@click.option("--event-blocks", default=1_000_000, show_default=True, help="That events put in.")
def main(sizes: tuple[int, ...], event_blocks: int) -> None:
    for blocks in sizes:
        measure(blocks)
    measure_events(event_blocks)


if __name__ == "__main__":
    main()
