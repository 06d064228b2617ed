"""What do clients that misbehave cost the router: that idle, read slowly, send half a request, or never end one?

Stub workers answer at once, a slow reader asks for an answer of some megabytes, and one well-behaved client asks all
the while. The router's memory is looked at before, at its peak, and after all have left; nothing may be in flight
then. Writes out/bench/connections/summary.json; the exit status is 1 if memory grew by more than --limit-mib, the good
client was not answered every time, or something stayed.

    python benchmark/serving/connections.py
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import click
import psutil
import uvloop

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmark.serving.streams import MODULE, generate_request, routed_stubs, until_ready  # noqa: E402
from sglang_prefillshare.environment import describe_environment  # noqa: E402
from sglang_prefillshare.workloads.report import percentile  # noqa: E402

LONG_ANSWER_TOKENS: Final = 3_000
"""Some 3 MB of events."""
LOOK_EVERY_S: Final = 0.25
LEAVES_WITHIN_S: Final = 10.0

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@click.command(help=__doc__)
@click.option("--idle", default=1000, show_default=True, help="Connections over which nothing comes.")
@click.option("--slow", default=100, show_default=True, help="Clients that read a long answer, some bytes a second.")
@click.option("--half", default=200, show_default=True, help="Clients that send half of a request's head and wait.")
@click.option("--endless", default=100, show_default=True, help="Clients whose body comes byte by byte.")
@click.option("--seconds", default=20.0, show_default=True)
@click.option("--limit-mib", default=400.0, show_default=True, help="What the router's memory may grow by.")
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(idle: int, slow: int, half: int, endless: int, seconds: float, limit_mib: float, out: Path) -> None:
    counts = {"idle": idle, "slow": slow, "half": half, "endless": endless}
    with routed_stubs() as (pid, port):
        found = uvloop.run(measure(port, pid, counts, seconds))
    good = found["good"]
    click.echo(
        f"router {found['before_mib']:.0f} MiB before, {found['peak_mib']:.0f} at most, "
        f"{found['after_mib']:.0f} after; left in flight: {found['left']:g}; "
        f"the good client: {good['answers']} answers, {good['failures']} failures, "
        f"p50 {good['p50_ms']:.1f} ms, p99 {good['p99_ms']:.1f} ms"
    )
    summary = {
        "command": " ".join(["python", *sys.argv]),
        "counts": counts,
        **found,
        "environment": describe_environment(),
    }
    target = out / "bench" / "connections" / "summary.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    click.echo(f"written to {target}")
    is_good = found["peak_mib"] - found["before_mib"] <= limit_mib
    sys.exit(0 if is_good and not found["good"]["failures"] and found["left"] == 0 else 1)


async def measure(port: int, pid: int, counts: dict[str, int], seconds: float) -> dict[str, Any]:
    await until_ready(f"http://127.0.0.1:{port}")
    process = psutil.Process(pid)
    latencies_s: list[float] = []
    failures: list[str] = []
    async with aiohttp.ClientSession() as client:
        for _ in range(20):
            await _ask(client, port, latencies_s, failures)
        latencies_s.clear()
        before = peak = _mib(process)
        crowd = await _crowd(port, counts)
        feeding = [asyncio.create_task(_feed(streams)) for streams in crowd["endless"]]
        feeding += [asyncio.create_task(_sip(streams)) for streams in crowd["slow"]]
        ends_at = time.monotonic() + seconds
        looked_at = 0.0
        while time.monotonic() < ends_at:
            await _ask(client, port, latencies_s, failures)
            if time.monotonic() - looked_at >= LOOK_EVERY_S:
                peak, looked_at = max(peak, _mib(process)), time.monotonic()
            await asyncio.sleep(0.02)
        for task in feeding:
            task.cancel()
        for _, writer in [streams for group in crowd.values() for streams in group]:
            writer.transport.abort()
        left = await _left(client, port)
    return {
        "before_mib": before,
        "peak_mib": peak,
        "after_mib": _mib(process),
        "left": left,
        "good": {
            "answers": len(latencies_s),
            "failures": len(failures),
            "first_failure": failures[0] if failures else None,
            **{f"p{share}_ms": 1000 * (percentile(latencies_s, share) or 0.0) for share in (50, 99)},
        },
    }


def _mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


async def _crowd(port: int, counts: dict[str, int]) -> dict[str, list[_Streams]]:
    long = generate_request(prompt_tokens=64, tokens=LONG_ANSWER_TOKENS)
    heads = {"idle": b"", "slow": long, "half": b"POST /generate HTTP/1.1\r\nhost: r\r\nconte"}
    heads["endless"] = b"POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 50000000\r\n\r\n{"
    crowd: dict[str, list[_Streams]] = {}
    for kind, count in counts.items():
        crowd[kind] = []
        for _ in range(count):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**10)
            writer.write(heads[kind])
            crowd[kind].append((reader, writer))
    return crowd


async def _feed(streams: _Streams) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            streams[1].write(b" ")
            await asyncio.sleep(0.5)


async def _sip(streams: _Streams) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            await streams[0].readexactly(64)
            await asyncio.sleep(0.5)


async def _ask(client: aiohttp.ClientSession, port: int, latencies_s: list[float], failures: list[str]) -> None:
    body = {"model": MODULE, "input_ids": [5, 6, 7], "sampling_params": {"temperature": 0, "max_new_tokens": 3}}
    started = time.perf_counter()
    try:
        async with (
            asyncio.timeout(30.0),
            client.post(f"http://127.0.0.1:{port}/generate", json={**body, "stream": True}) as response,
        ):
            answer = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        failures.append(repr(error))
        return
    if response.status == 200 and answer.rstrip().endswith(b"[DONE]"):
        latencies_s.append(time.perf_counter() - started)
    else:
        failures.append(f"{response.status}: {answer[:200]!r}")


async def _left(client: aiohttp.ClientSession, port: int) -> float:
    """Calls in flight once all have left; waited for."""
    deadline = time.monotonic() + LEAVES_WITHIN_S
    while True:
        async with client.get(f"http://127.0.0.1:{port}/metrics") as response:
            page = await response.text()
        left = sum(_values(page, "prefillshare_router_inflight_requests"))
        left += sum(_values(page, "prefillshare_router_worker_inflight_legs"))
        if left == 0 or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


def _values(page: str, name: str) -> Sequence[float]:
    return [float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)]


if __name__ == "__main__":
    main()
