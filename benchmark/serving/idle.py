"""What does an idle deployment cost, and how long does a request wait for a sleeping loop?

Starts the demo's topology (one prefill worker, three decode workers, the router) with tiny models. First nobody asks
anything and the CPU time of all its processes is counted. Then single requests come after a pause, taking turns with
requests that follow one another at once: the difference of their times to first token is what waking up costs. Writes
out/bench/idle/summary.json.

    python benchmark/serving/idle.py --seconds 30 --requests 40
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import click
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmark.serving.router import spread, ttft_ms  # noqa: E402
from sglang_prefillshare.config import topology_from  # noqa: E402
from sglang_prefillshare.deployment import Deployment  # noqa: E402
from sglang_prefillshare.display import Display  # noqa: E402
from sglang_prefillshare.environment import describe_environment  # noqa: E402
from test.support.models import make_base, make_decode_module  # noqa: E402

PAUSE_S = 1.5


@click.command(help=__doc__)
@click.option("--seconds", default=30.0, show_default=True, help="How long nobody asks anything.")
@click.option("--requests", "request_count", default=40, show_default=True, help="Timed requests of each kind.")
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(seconds: float, request_count: int, out: Path) -> None:
    models = out / "models"
    base = make_base(models / "tiny-base")
    modules = {
        name: make_decode_module(models / f"tiny-{name}", base, seed=seed)
        for seed, name in enumerate(("planner", "coder", "reviewer"), start=2)
    }
    args = {"dtype": "float32", "max-total-tokens": 16384}
    described = {
        "base": {"model": str(base), "args": args},
        "decode": [{"name": name, "model": str(path), "args": args} for name, path in modules.items()],
    }
    started = time.monotonic()
    with Deployment(topology_from(described, directory=ROOT), observer=Display()) as deployment:
        ready_s = time.monotonic() - started
        asyncio.run(ask(deployment, 5, pause_s=0.0))  # warm up
        time.sleep(5.0)
        shares = idle_share_percent(deployment, seconds)
        cold, warm = asyncio.run(alternate(deployment, request_count))
    summary: dict[str, Any] = {
        "question": "What does an idle deployment cost, and what does waking it up cost?",
        **describe_environment(),
        "ready_s": round(ready_s, 1),
        "idle_percent_of_one_core": round(sum(shares.values()), 2),
        "idle_percent_by_worker": shares,
        "ttft_after_pause_ms": spread(cold),
        "ttft_at_once_ms": spread(warm),
        "wake_up_ms": statistics.median(cold) - statistics.median(warm),
    }
    target = out / "bench" / "idle" / "summary.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    click.echo(f"ready after {summary['ready_s']} s")
    click.echo(f"idle: {summary['idle_percent_of_one_core']} % of one core, {shares}")
    after, at_once = (summary[name]["p50"] for name in ("ttft_after_pause_ms", "ttft_at_once_ms"))
    click.echo(f"TTFT after a pause p50 {after:.2f} ms, at once {at_once:.2f} ms")
    click.echo(f"written to {target}")


def idle_share_percent(deployment: Deployment, seconds: float) -> dict[str, float]:
    """CPU time of each worker and of the router, with all their processes, as percent of one core."""
    assert deployment.router is not None
    everyone = [*deployment.workers, deployment.router]
    before = {worker.name: cpu_seconds(worker.pid) for worker in everyone}
    started = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - started
    return {w.name: round(100 * (cpu_seconds(w.pid) - before[w.name]) / elapsed, 2) for w in everyone}


def cpu_seconds(pid: int | None) -> float:
    root = psutil.Process(pid)
    family = {process.pid: process for process in [root, *root.children(recursive=True)]}
    return sum(sum(process.cpu_times()[:2]) for process in family.values())


async def alternate(deployment: Deployment, request_count: int) -> tuple[list[float], list[float]]:
    cold, warm = [], []
    for _ in range(request_count):
        cold += await ask(deployment, 1, pause_s=PAUSE_S)
        warm += (await ask(deployment, 2, pause_s=0.0))[1:]
    return cold, warm


async def ask(deployment: Deployment, count: int, *, pause_s: float) -> list[float]:
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    found = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as client:
        for _ in range(count):
            await asyncio.sleep(pause_s)
            prompt = [random.randrange(10, 500) for _ in range(32)]
            body = {"model": "coder", "input_ids": prompt, "sampling_params": sampling, "stream": True}
            found.append(await ttft_ms(client, f"{deployment.router_url}/generate", body))
    return found


if __name__ == "__main__":
    main()
