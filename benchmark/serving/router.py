"""What does our router add to the time to first token, against a client that makes the pair of legs itself?

One prefill worker, one decode worker, one router, one request at a time. The two ways take turns, prompt by prompt, so
that a machine that slows down slows both. The models are tiny and every prompt is asked once before it is timed: what
the router does is the same for every model, and shows best where the rest is short. Writes
out/bench/router/summary.json.

    python benchmark/serving/router.py --requests 200
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sglang_prefillshare.config import topology_from  # noqa: E402
from sglang_prefillshare.deployment import Deployment  # noqa: E402
from sglang_prefillshare.display import Display  # noqa: E402
from sglang_prefillshare.environment import describe_environment  # noqa: E402
from test.support.models import make_base, make_decode_module  # noqa: E402

NEW_TOKENS = 4
WARM_UP_REQUESTS = 10


@click.command(help=__doc__)
@click.option("--requests", "request_count", default=200, show_default=True, help="Timed requests of each way.")
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(request_count: int, prompt_tokens: int, out: Path) -> None:
    base = make_base(out / "models" / "tiny-base")
    coder = make_decode_module(out / "models" / "tiny-coder", base, seed=2)
    args = {"dtype": "float32", "max-total-tokens": 16384}
    described = {
        "base": {"model": str(base), "args": args},
        "decode": [{"name": "coder", "model": str(coder), "args": args}],
    }
    with Deployment(topology_from(described, directory=ROOT), observer=Display()) as deployment:
        samples = asyncio.run(measure(deployment, request_count, prompt_tokens))
    summary = summarise(samples, prompt_tokens)
    target = out / "bench" / "router" / "summary.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    for name in ("router_ttft_ms", "pair_ttft_ms", "overhead_ttft_ms"):
        row = summary[name]
        click.echo(
            f"{name:18} p50 {row['p50']:8.2f}   p25 {row['p25']:8.2f}   p75 {row['p75']:8.2f}   p95 {row['p95']:8.2f}"
        )
    click.echo(f"written to {target}")


async def measure(deployment: Deployment, request_count: int, prompt_tokens: int) -> list[tuple[float, float]]:
    """(TTFT through the router, TTFT of a self-made pair), both in ms, for each prompt."""
    rng = random.Random(7)
    prefill, decode = deployment.worker("base"), deployment.worker("coder")
    samples = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as client:

        async def through_router(body: dict[str, Any]) -> float:
            return await ttft_ms(client, f"{deployment.router_url}/generate", {**body, "model": "coder"})

        async def by_itself(body: dict[str, Any]) -> float:
            legs = {
                **body,
                "bootstrap_host": "127.0.0.1",
                "bootstrap_port": prefill.plan.bootstrap_port,
                "bootstrap_room": rng.getrandbits(62) + 1,
            }
            prefill_leg = asyncio.create_task(drain(client, f"{prefill.url}/generate", {**legs, "stream": False}))
            elapsed = await ttft_ms(client, f"{decode.url}/generate", legs)
            await prefill_leg
            return elapsed

        for index in range(WARM_UP_REQUESTS + request_count):
            prompt = [rng.randrange(10, 500) for _ in range(prompt_tokens)]
            sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
            body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
            await by_itself(body)  # fills the radix tree
            if index % 2:
                routed = await through_router(body)
                paired = await by_itself(body)
            else:
                paired = await by_itself(body)
                routed = await through_router(body)
            if index >= WARM_UP_REQUESTS:
                samples.append((routed, paired))
    return samples


async def ttft_ms(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> float:
    started = time.perf_counter()
    async with client.post(url, json=body) as response:
        response.raise_for_status()
        await response.content.readany()
        elapsed = (time.perf_counter() - started) * 1000
        async for _ in response.content.iter_any():
            pass
    return elapsed


async def drain(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with client.post(url, json=body) as response:
        response.raise_for_status()
        await response.read()


def summarise(samples: list[tuple[float, float]], prompt_tokens: int) -> dict[str, Any]:
    routed, paired = ([pair[side] for pair in samples] for side in (0, 1))
    return {
        "question": "What does the router add to TTFT, one request at a time?",
        **describe_environment(("sglang", "sglang-prefillshare", "torch", "aiohttp", "uvicorn")),
        "prompt_tokens": prompt_tokens,
        "requests": len(samples),
        "router_ttft_ms": spread(routed),
        "pair_ttft_ms": spread(paired),
        "overhead_ttft_ms": spread([ours - theirs for ours, theirs in samples]),
        "overhead_of_medians_ms": statistics.median(routed) - statistics.median(paired),
        "samples_ms": [[round(ours, 3), round(theirs, 3)] for ours, theirs in samples],
    }


def spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p25": cuts[24], "p50": statistics.median(values), "p75": cuts[74], "p95": cuts[94], "max": max(values)}


if __name__ == "__main__":
    main()
