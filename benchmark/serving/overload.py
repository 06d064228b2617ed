"""What does a deployment give when four times the load comes that fits its decode pool, with admission and without?

One prefill worker, one decode worker with a small pool, tiny models, and two routers before them, of which one sends
everything at once (`--no-admission`). Each client asks one prompt after another, all different, and comes again when an
answer of 429 or 503 says. With `--stream` the router knows how far each answer is. First as many clients as fit (the
knee), then four times as many through either router. Three quarters of what fits may wait: the longer the queue, the
longer an answer takes, and nothing else.
Writes out/bench/overload/summary.json.

    python benchmark/serving/overload.py --minutes 3
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmark.serving.streams import until_ready  # noqa: E402
from sglang_prefillshare.config import RouterSettings, topology_from  # noqa: E402
from sglang_prefillshare.deployment import Deployment  # noqa: E402
from sglang_prefillshare.display import Display  # noqa: E402
from sglang_prefillshare.environment import describe_environment  # noqa: E402
from sglang_prefillshare.plans import Commands, router_command  # noqa: E402
from sglang_prefillshare.ports import PortBlocks  # noqa: E402
from test.support.models import make_base, make_decode_module  # noqa: E402

MODULE = "coder"
WORKER_ARGS = {"dtype": "float32", "page-size": 1}
RESERVED_TOKENS = 8
"""What decode keeps free for each request: less than an answer, so that without admission it has to retract."""
REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """What each request asks for."""

    prompt_tokens: int
    new_tokens: int
    is_streamed: bool
    is_varied: bool

    def draw(self, rng: random.Random) -> dict[str, Any]:
        longest = rng.randint(self.new_tokens // 8, self.new_tokens * 15 // 8) if self.is_varied else self.new_tokens
        return {
            "model": MODULE,
            "input_ids": [rng.randrange(10, 500) for _ in range(self.prompt_tokens)],
            "sampling_params": {"temperature": 0, "max_new_tokens": longest, "ignore_eos": True},
            "stream": self.is_streamed,
        }


@dataclass(slots=True)
class Variant:
    """One way to run, and what came of it."""

    name: str
    clients: int
    seconds: float
    statuses: Counter[str] = field(default_factory=Counter)
    e2e_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    in_time: int = 0
    """Answers that came before the end of the load; what was under way then runs with ever fewer beside it."""
    tokens_in_time: int = 0
    retractions: int = 0

    def row(self) -> dict[str, Any]:
        """Times are those of the answers with 200; p95 is `None` where there are too few."""
        return {
            "variant": self.name,
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "statuses": dict(self.statuses),
            "answers_per_s": round(self.in_time / self.seconds, 2),
            "tokens_per_s": round(self.tokens_in_time / self.seconds, 1),
            "e2e_p50_ms": _percentile_ms(self.e2e_s, 50),
            "e2e_p95_ms": _percentile_ms(self.e2e_s, 95),
            "queue_p95_ms": _percentile_ms(self.queue_s, 95),
            "retractions": self.retractions,
        }


@click.command(help=__doc__)
@click.option("--minutes", default=3.0, show_default=True, help="Of load; the crowd with admission gets three fifths.")
@click.option("--rounds", default=1, show_default=True, help="Stretches that the load comes in, the three in turn.")
@click.option("--load", default=4.0, show_default=True, help="Clients, as a multiple of those that fit.")
@click.option("--stream", is_flag=True, help="Have answers streamed.")
@click.option("--vary", is_flag=True, help="Have answers of an eighth to fifteen eighths of --new-tokens.")
@click.option("--prompt-tokens", default=200, show_default=True)
@click.option("--new-tokens", default=96, show_default=True)
@click.option("--pool-tokens", default=4096, show_default=True, help="Of the decode worker.")
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(
    minutes: float,
    rounds: int,
    load: float,
    stream: bool,
    vary: bool,
    prompt_tokens: int,
    new_tokens: int,
    pool_tokens: int,
    out: Path,
) -> None:
    fitting = max(1, pool_tokens // (prompt_tokens + new_tokens + 1))
    crowd = max(1, round(load * fitting))
    base = make_base(out / "models" / "tiny-base")
    module = make_decode_module(out / "models" / f"tiny-{MODULE}", base, seed=2)
    described = {
        "base": {"model": str(base), "args": {**WORKER_ARGS, "max-total-tokens": 65536}},
        "decode": [
            {
                "name": MODULE,
                "model": str(module),
                "args": {
                    **WORKER_ARGS,
                    "max-total-tokens": pool_tokens,
                    "num-reserved-decode-tokens": RESERVED_TOKENS,
                    "max-running-requests": crowd,
                },
            }
        ],
        "router": {"args": {"queue-size": max(1, fitting * 3 // 4)}},
    }
    fifth_s = minutes * 60 / 5
    with (
        Deployment(topology_from(described, directory=ROOT), observer=Display()) as deployment,
        second_router(deployment, "--no-admission") as without_url,
    ):
        variants = [
            (Variant("knee", fitting, fifth_s), deployment.router_url),
            (Variant("overload, admission", crowd, 3 * fifth_s), deployment.router_url),
            (Variant("overload, none", crowd, fifth_s), without_url),
        ]
        asks = Load(prompt_tokens, new_tokens, is_streamed=stream, is_varied=vary)
        asyncio.run(run_all(variants, rounds=rounds, asks=asks))
    rows = [variant.row() for variant, _ in variants]
    summary: dict[str, Any] = {
        "question": "What does a deployment give under more load than fits, with admission and without?",
        **describe_environment(("sglang", "sglang-prefillshare", "torch", "aiohttp", "uvicorn")),
        "config": {
            "minutes": minutes,
            "rounds": rounds,
            "load": load,
            "stream": stream,
            "vary": vary,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "pool_tokens": pool_tokens,
            "fitting": fitting,
        },
        "rows": rows,
    }
    target = out / "bench" / "overload" / "summary.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    show(rows)
    click.echo(f"written to {target}")


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("answers_per_s", "tokens_per_s", "e2e_p50_ms", "e2e_p95_ms", "queue_p95_ms", "retractions")
    click.echo(f"{'':22}{'clients':>8}" + "".join(f"{name:>15}" for name in columns) + "  statuses")
    for row in rows:
        values = "".join(f"{'-' if row[name] is None else row[name]:>15}" for name in columns)
        click.echo(f"{row['variant']:22}{row['clients']:>8}{values}  {row['statuses']}")


@contextlib.contextmanager
def second_router(deployment: Deployment, *flags: str) -> Iterator[str]:
    """Another router before the same workers; yields its URL once it is ready."""
    ports = PortBlocks()
    port = ports.take()
    plans = [worker.plan for worker in deployment.workers]
    command = router_command(RouterSettings(), plans, port=port, commands=Commands())
    process = subprocess.Popen([*command, "--log-level", "warning", *flags], env=os.environ)
    try:
        url = f"http://127.0.0.1:{port}"
        asyncio.run(until_ready(url))
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)
        ports.release()


async def run_all(variants: list[tuple[Variant, str]], *, rounds: int, asks: Load) -> None:
    rng = random.Random(7)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as client:
        for variant, url in variants * rounds:
            end_s = time.monotonic() + variant.seconds / rounds
            async with asyncio.TaskGroup() as group:
                for _ in range(variant.clients):
                    seed = rng.getrandbits(32)
                    group.create_task(ask_until(client, url, variant, end_s, seed, asks))


async def ask_until(
    client: aiohttp.ClientSession, url: str, variant: Variant, end_s: float, seed: int, asks: Load
) -> None:
    """One client: the next request when the last one is answered, or when its answer says to come again."""
    rng = random.Random(seed)
    while time.monotonic() < end_s:
        began = time.monotonic()
        try:
            async with client.post(f"{url}/generate", json=asks.draw(rng)) as response:
                is_whole = not asks.is_streamed or response.status != 200
                answer = await response.json() if is_whole else await last_event(response)
                variant.statuses[str(response.status)] += 1
                if response.status == 200:
                    variant.e2e_s.append(time.monotonic() - began)
                    variant.queue_s.append(int(response.headers["x-prefillshare-queue-ms"]) / 1000)
                    if time.monotonic() <= end_s:
                        variant.in_time += 1
                        variant.tokens_in_time += answer["meta_info"]["completion_tokens"]
                    variant.retractions += int(answer["meta_info"].get("num_retractions") or 0)
                    continue
                pause_s = float(response.headers.get("retry-after", 1))
        except (aiohttp.ClientError, TimeoutError) as error:
            variant.statuses[type(error).__name__] += 1
            pause_s = 1.0
        await asyncio.sleep(min(pause_s * rng.uniform(0.5, 1.5), max(0.0, end_s - time.monotonic())))


async def last_event(response: aiohttp.ClientResponse) -> Any:
    """Of a stream of `/generate`, which says all in each event. Raises `ClientPayloadError` where it was cut."""
    last = b""
    async for line in response.content:
        if line.startswith(b"data: {"):
            last = line
    answer = json.loads(last.removeprefix(b"data: ") or b"{}")
    if not answer.get("meta_info", {}).get("finish_reason"):
        raise aiohttp.ClientPayloadError("a stream was cut")
    return answer


def _percentile_ms(values: list[float], percent: int) -> float | None:
    return round(statistics.quantiles(values, n=100)[percent - 1] * 1000, 1) if len(values) > 1 else None


if __name__ == "__main__":
    main()
