"""What does a handoff cost inside a running deployment, and how much of a session's context moves in each turn?

Real servers, one call at a time. First one agent's context grows by 64 tokens with every call: the time from "prefill
has lent the last page" to "decode has taken the KV over", as the decode worker counts it. Then four agents take turns
over one context: bytes and time per call, in the first and in later turns. Writes out/bench/handoff/session.json.

    python benchmark/handoff/session.py
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import click

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.demo.models import prepare_models  # noqa: E402
from sglang_prefillshare.config import topology_from  # noqa: E402
from sglang_prefillshare.deployment import Deployment, Worker  # noqa: E402
from sglang_prefillshare.display import Display  # noqa: E402
from sglang_prefillshare.environment import describe_environment  # noqa: E402
from test.support.servers import handoff_counts, metric_samples  # noqa: E402

AGENTS: Final = ("planner", "coder", "reviewer", "critic")
INCREMENT_TOKENS: Final = 64
ANSWER_TOKENS: Final = 16
FIRST_CONTEXT_TOKENS: Final = 800
TOKEN_IDS: Final = (100, 40_000)


@dataclass(frozen=True, slots=True)
class Call:
    """One call: its prompt, what its handoff moved, and how long that kept decode waiting."""

    agent: str
    turn: int
    prompt_tokens: int
    held_tokens: int
    moved_tokens: int
    moved_bytes: int
    handoff_ms: float
    e2e_ms: float


@click.command(help=__doc__)
@click.option(
    "--increments",
    default=60,
    show_default=True,
    type=click.IntRange(2),
    help="Calls whose context has grown by 64 tokens.",
)
@click.option("--turns", default=5, show_default=True, help="Turns of the four agents.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(increments: int, turns: int, dtype: str, out: Path) -> None:
    models = prepare_models(out / "models")
    models["critic"] = models["planner"]  # a fourth decode worker; which weights it has does not matter here
    args = {"dtype": dtype, "max-total-tokens": 16384}
    described = {
        "base": {"model": str(models["base"]), "args": args},
        "decode": [{"name": name, "model": str(models[name]), "args": args} for name in AGENTS],
    }
    with Deployment(topology_from(described, directory=ROOT), observer=Display()) as deployment:
        growing, session = asyncio.run(measure(deployment, increments, turns))
    summary = {
        "question": "How long does decode wait for a handoff, and what moves in each turn of a session?",
        **describe_environment(),
        "model": "SmolLM2-135M",
        "dtype": dtype,
        "increment_tokens": INCREMENT_TOKENS,
        "increments_ms": spread([call.handoff_ms for call in growing]),
        "turns": [describe_turn([call for call in session if call.turn == turn]) for turn in range(turns)],
        "growing": [asdict(call) for call in growing],
        "session": [asdict(call) for call in session],
    }
    target = out / "bench" / "handoff" / "session.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    found = summary["increments_ms"]
    click.echo(
        f"{INCREMENT_TOKENS} more tokens, {len(growing)} times: handoff p50 {found['p50']:.2f} ms, "
        f"p10 {found['p10']:.2f}, p90 {found['p90']:.2f}"
    )
    for turn in summary["turns"]:
        click.echo(
            f"turn {turn['turn']}: context {turn['context_tokens']:6,} tokens   moved {turn['moved_bytes'] / 1e6:7.1f} "
            f"of {turn['whole_bytes'] / 1e6:7.1f} MB   moved/needed {turn['moved_over_needed']:.3f}   "
            f"handoff p50 {turn['handoff_ms']:.2f} ms"
        )
    click.echo(f"written to {target}")


async def measure(deployment: Deployment, increments: int, turns: int) -> tuple[list[Call], list[Call]]:
    rng = random.Random(11)

    def words(count: int) -> list[int]:
        return [rng.randrange(*TOKEN_IDS) for _ in range(count)]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as client:
        context = words(FIRST_CONTEXT_TOKENS)
        growing = []
        for turn in range(increments + 1):
            call, _ = await ask(client, deployment, "planner", context, turn=turn, new_tokens=1)
            growing.append(call)
            context = [*context, *words(INCREMENT_TOKENS)]
        context = words(FIRST_CONTEXT_TOKENS)
        session = []
        for turn in range(turns):
            for agent in AGENTS:
                call, answer = await ask(client, deployment, agent, context, turn=turn, new_tokens=ANSWER_TOKENS)
                session.append(call)
                context = [*context, *answer, *words(INCREMENT_TOKENS - ANSWER_TOKENS)]
    return growing[1:], session


async def ask(
    client: aiohttp.ClientSession,
    deployment: Deployment,
    agent: str,
    context: Sequence[int],
    *,
    turn: int,
    new_tokens: int,
) -> tuple[Call, list[int]]:
    """One call, with what it added to the counts of its decode worker."""
    worker = deployment.worker(agent)
    before, before_s = await handoff_counts(client, worker), await handoff_s(client, worker)
    body = {
        "model": agent,
        "input_ids": list(context),
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
    }
    started = time.perf_counter()
    async with client.post(f"{deployment.router_url}/generate", json=body) as response:
        response.raise_for_status()
        answer = (await response.json())["output_ids"]
    e2e_ms = (time.perf_counter() - started) * 1000
    counts = (await handoff_counts(client, worker)).since(before)
    assert counts.by_outcome == {"ok": 1}, counts
    handoff_ms = (await handoff_s(client, worker) - before_s) * 1000
    return (
        Call(
            agent, turn, len(context), counts.held_tokens, counts.moved_tokens, counts.moved_bytes, handoff_ms, e2e_ms
        ),
        answer,
    )


async def handoff_s(client: aiohttp.ClientSession, worker: Worker) -> float:
    """Seconds that handoffs have kept this decode worker waiting since it started."""
    samples = await metric_samples(client, worker.url)
    return sum(sample.value for sample in samples if sample.name == "prefillshare_handoff_seconds_sum")


def describe_turn(calls: Sequence[Call]) -> dict[str, Any]:
    """A turn in sum: what moved, what decode lacked, and what would have moved without what it holds."""
    per_token = next(call.moved_bytes / call.moved_tokens for call in calls if call.moved_tokens)
    lacked = sum(call.prompt_tokens - 1 - call.held_tokens for call in calls)
    moved = sum(call.moved_bytes for call in calls)
    return {
        "turn": calls[0].turn,
        "context_tokens": calls[-1].prompt_tokens,
        "moved_bytes": moved,
        "whole_bytes": round(sum(call.prompt_tokens - 1 for call in calls) * per_token),
        "moved_over_needed": moved / (lacked * per_token),
        "handoff_ms": statistics.median(call.handoff_ms for call in calls),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=10)
    return {"p10": cuts[0], "p50": statistics.median(values), "p90": cuts[8]}


if __name__ == "__main__":
    main()
