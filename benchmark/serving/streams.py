"""How many short streams a second does one router process pass on, and how long does it take for its part?

The router has a core to itself, between stub workers that answer at once and clients that ask again as soon as they
have their answer; both are a few lines over plain sockets, on the other cores. So what is measured is the router: a
request read and checked, its workers chosen, both legs sent, the answer's ids changed and passed on. Writes
out/bench/streams/summary.json.

    python benchmark/serving/streams.py --clients 1 --clients 16 --clients 64
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, cast

import aiohttp
import click
import psutil
import uvloop

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sglang_prefillshare.environment import describe_environment  # noqa: E402
from sglang_prefillshare.protocol import BOUNDARY_RULE, Role, WorkerInfo  # noqa: E402
from sglang_prefillshare.workloads.report import percentile  # noqa: E402

MODULE: Final = "coder"
READY_S: Final = 30.0
TOKENS: Final = 3
"""Of a streamed answer, an event each."""

_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_TOKENS: Final = re.compile(rb'"max_new_tokens": ?(\d+)')
_RID: Final = re.compile(rb'"rid": ?"([^"]+)"')


@click.command(help=__doc__)
@click.option("--clients", "sizes", type=int, multiple=True, default=(1, 16, 64, 256), show_default=True)
@click.option("--seconds", default=8.0, show_default=True, help="For each number of clients.")
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(sizes: Sequence[int], seconds: float, prompt_tokens: int, out: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    ours, routers = (cores[1:], cores[:1]) if len(cores) > 1 else (cores, cores)
    os.sched_setaffinity(0, ours)  # the stubs inherit it
    with routed_stubs() as (pid, port):
        psutil.Process(pid).cpu_affinity(routers)
        rows = uvloop.run(measure(port, sizes, seconds, prompt_tokens))
    for row in rows:
        click.echo(
            f"{row['clients']:4} clients {row['streams_per_s']:8.0f} streams/s   "
            f"latency p50 {row['latency_ms']['p50']:7.2f} p99 {row['latency_ms']['p99']:7.2f} ms   "
            f"to both legs sent: mean {row['router_ms']['mean']:.2f}, p99 below {row['router_ms']['p99_below']:g} ms   "
            f"router's core {100 * row['router_cpu']:.0f}% busy"
        )
    summary = {
        "command": " ".join(["python", *sys.argv]),
        "prompt_tokens": prompt_tokens,
        "answer_tokens": TOKENS,
        "rows": rows,
        "environment": describe_environment(),
    }
    target = out / "bench" / "streams" / "summary.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    click.echo(f"written to {target}")


# ---- stub workers --------------------------------------------------------------------------------------------------


class Stub(asyncio.Protocol):
    """One connection to a worker that answers `/generate` at once."""

    def __init__(self, info: WorkerInfo) -> None:
        self._info = json.dumps(info.to_json()).encode()
        self._role = info.role
        self._data = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self._data, 0, end)
            size = end + 4 + (int(found.group(1)) if found else 0)
            if len(self._data) < size:
                return
            request = bytes(self._data[:size])
            del self._data[:size]
            assert self._transport is not None
            self._transport.write(self._answer(request))

    def _answer(self, request: bytes) -> bytes:
        if request.startswith(b"GET"):
            return _whole(self._info)
        if self._role is Role.PREFILL:
            counts = b"x-prefill-share-prompt-tokens: 63\r\nx-prefill-share-cached-tokens: 0\r\n"
            return _whole(b'{"text": "", "meta_info": {}}', counts)
        rid, asked = _RID.search(request), _TOKENS.search(request)
        name = rid.group(1) if rid else b"?"
        last = int(asked.group(1)) if asked else TOKENS
        events = [_event(name, count, last=last) for count in range(1, last + 1)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in (*events, b"data: [DONE]\n\n"))
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        return head + body + b"0\r\n\r\n"


def _whole(body: bytes, headers: bytes = b"") -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n" % (headers, len(body))
    return head + body


def _event(rid: bytes, count: int, *, last: int) -> bytes:
    reason = b'{"type": "length", "length": %d}' % count if count == last else b"null"
    meta = b'{"id": "%b", "finish_reason": %b, "prompt_tokens": 64, "completion_tokens": %d}' % (rid, reason, count)
    text = b"hello" if last <= TOKENS else b"hello" * 200  # long answers are long, and quickly made
    return b'data: {"text": "%b", "output_ids": [%d], "meta_info": %b}\n\n' % (text, count, meta)


def start_stubs() -> tuple[multiprocessing.Process, dict[Role, int]]:
    """A prefill and a decode worker in one process; returns their ports."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve_stubs, args=(there,), daemon=True)
    process.start()
    if not here.poll(READY_S):
        raise click.ClickException(f"the stub workers did not start within {READY_S:g} s.")
    return process, here.recv()  # type: ignore[return-value]


def _serve_stubs(pipe: Connection) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        prefill = WorkerInfo(
            role=Role.PREFILL,
            model="base",
            base_fingerprint="stub",
            boundary=BOUNDARY_RULE,
            trained=True,
            transfer_backend="prefillshare",
            page_size=1,
            kv_dtype="float32",
            max_total_tokens=10**9,
            max_running_requests=10**6,
            context_length=8192,
            bootstrap_port=1,
            version="stub",
        )
        infos = {Role.PREFILL: prefill}
        infos[Role.DECODE] = replace(prefill, role=Role.DECODE, model=MODULE, bootstrap_port=None)
        ports = {}
        for role, info in infos.items():
            server = await loop.create_server(functools.partial(Stub, info), "127.0.0.1", 0)
            ports[role] = server.sockets[0].getsockname()[1]
        pipe.send(ports)
        await asyncio.Event().wait()

    uvloop.run(serve())


# ---- the router ----------------------------------------------------------------------------------------------------


def start_router(ports: dict[Role, int]) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "sglang_prefillshare.cli", "route", "--port", str(port)]
    command += ["--prefill", f"http://127.0.0.1:{ports[Role.PREFILL]}"]
    command += ["--decode", f"{MODULE}=http://127.0.0.1:{ports[Role.DECODE]}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL), port


@contextlib.contextmanager
def routed_stubs() -> Iterator[tuple[int, int]]:
    """A router before stub workers; yields its process id and its port."""
    stubs, ports = start_stubs()
    try:
        router, port = start_router(ports)
        try:
            yield router.pid, port
        finally:
            router.terminate()
            router.wait(timeout=30)
    finally:
        stubs.terminate()
        stubs.join(timeout=30)


# ---- clients -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    latencies_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Client(asyncio.Protocol):
    """One connection that asks, reads to the stream's end, and asks again until `stop`."""

    def __init__(self, request: bytes, tally: Tally) -> None:
        self._request = request
        self._tally = tally
        self._data = bytearray()
        self._began_s = 0.0
        self._is_stopped = False
        self._transport: asyncio.Transport | None = None
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._ask()

    def stop(self) -> None:
        self._is_stopped = True

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._data.endswith(b"0\r\n\r\n"):
            return
        if b"data: [DONE]" in self._data:
            self._tally.latencies_s.append(time.perf_counter() - self._began_s)
        else:
            self._tally.errors.append(self._data[:300].decode("utf-8", "replace"))
        self._data.clear()
        assert self._transport is not None
        if self._is_stopped:
            self._transport.close()
        else:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._is_stopped:
            self._tally.errors.append(f"the router closed the connection: {error}")
        self.ended.set_result(None)

    def _ask(self) -> None:
        assert self._transport is not None
        self._began_s = time.perf_counter()
        self._transport.write(self._request)


def generate_request(*, prompt_tokens: int, tokens: int) -> bytes:
    """A whole HTTP request for a streamed answer of so many tokens."""
    body = {"model": MODULE, "input_ids": list(range(10, 10 + prompt_tokens)), "stream": True}
    raw = json.dumps({**body, "sampling_params": {"temperature": 0, "max_new_tokens": tokens}}).encode()
    head = b"POST /generate HTTP/1.1\r\nhost: r\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(raw) + raw


async def measure(port: int, sizes: Sequence[int], seconds: float, prompt_tokens: int) -> list[dict[str, Any]]:
    """A row for each number of clients."""
    await until_ready(f"http://127.0.0.1:{port}")
    request = generate_request(prompt_tokens=prompt_tokens, tokens=TOKENS)
    await _run(port, request, clients=4, seconds=1.0)  # connections, and what is compiled at its first use
    rows = []
    for clients in sizes:
        before, started = await _router_metrics(port), time.perf_counter()
        tally = await _run(port, request, clients=clients, seconds=seconds)
        elapsed = time.perf_counter() - started
        after = await _router_metrics(port)
        if tally.errors:
            raise click.ClickException(f"{len(tally.errors)} streams failed, the first: {tally.errors[0]}")
        rows.append(
            {
                "clients": clients,
                "streams": len(tally.latencies_s),
                "streams_per_s": len(tally.latencies_s) / elapsed,
                "latency_ms": {f"p{share}": 1000 * (percentile(tally.latencies_s, share) or 0.0) for share in (50, 99)},
                "router_ms": _own_ms(before, after),
                "router_cpu": (after["cpu"] - before["cpu"]) / elapsed,
            }
        )
    return rows


async def until_ready(url: str) -> None:
    """Wait until the router at `url` answers that all is ready."""
    deadline = time.monotonic() + READY_S
    async with aiohttp.ClientSession() as client:
        while time.monotonic() < deadline:
            try:
                async with client.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
    raise click.ClickException(f"the router was not ready within {READY_S:g} s.")


async def _run(port: int, request: bytes, *, clients: int, seconds: float) -> Tally:
    tally = Tally()
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Client(request, tally), "127.0.0.1", port) for _ in range(clients)]
    await asyncio.sleep(seconds)
    for _, client in made:
        client.stop()
    await asyncio.wait_for(asyncio.gather(*(client.ended for _, client in made)), timeout=READY_S)
    return tally


async def _router_metrics(port: int) -> dict[str, float]:
    """The router's own account of its time, cumulative, and its processor seconds."""
    async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{port}/metrics") as response:
        page = await response.text()
    found = {}
    for line in page.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("prefillshare_router_overhead_seconds"):
            found[name.removeprefix("prefillshare_router_overhead_seconds")] = float(value)
    [router] = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr and c.laddr.port == port]
    found["cpu"] = sum(psutil.Process(router.pid).cpu_times()[:2])
    return found


def _own_ms(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """From a request's body read to both its legs sent: the mean, and the first bucket that holds 99 of 100."""
    new = {name: value - before.get(name, 0.0) for name, value in after.items()}
    count = next(value for name, value in new.items() if name.startswith("_count"))
    total = next(value for name, value in new.items() if name.startswith("_sum"))
    bounds = sorted(
        (float(match.group(1)), value)
        for name, value in new.items()
        if name.startswith("_bucket") and (match := re.search(r'le="([^"]+)"', name)) and match.group(1) != "+Inf"
    )
    below = next((bound for bound, value in bounds if value >= 0.99 * count), float("inf"))
    return {"mean": 1000 * total / count, "p99_below": 1000 * below}


if __name__ == "__main__":
    main()
