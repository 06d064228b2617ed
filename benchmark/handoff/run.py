"""How fast does a prompt's KV get from the prefill pool into the decode pool, and how near is that to a plain memcpy?

The pools have the shape of the demo's model. Ours and NIXL run between two real processes, end to end: from prefill's
`send` to decode's `poll` that reports success. Plain torch and memcpy run in one process, and so do SGLang's staging
kernels on a GPU. All take turns, repetition by repetition, over warmed pools; every answer is checked before it is
timed. Writes out/bench/handoff/summary.json and, if matplotlib is installed, bandwidth.png beside it.

    python benchmark/handoff/run.py
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmark.handoff.cases import LAYOUTS, Case, make_case  # noqa: E402
from sglang_prefillshare.environment import describe_environment  # noqa: E402
from sglang_prefillshare.host.transfer.rig import PoolShape  # noqa: E402
from test.support.handoff_pair import WorkerError, handoff_pair  # noqa: E402

SIZES: Final = (16, 64, 256, 1024, 2048, 4096, 16384)
SEED: Final = 7
MIN_REPETITIONS: Final = 3


@click.command(help=__doc__)
@click.option("--tokens", "sizes", type=int, multiple=True, help=f"Prompt lengths; {SIZES} if none is given.")
@click.option("--page-size", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where the pools are: cpu or cuda.")
@click.option("--repetitions", default=30, show_default=True, help="At most so many of each case.")
@click.option(
    "--seconds", default=420.0, show_default=True, help="Time for all cases; long ones get fewer repetitions."
)
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(sizes: tuple[int, ...], page_size: int, device: str, repetitions: int, seconds: float, out: Path) -> None:
    sizes = sizes or SIZES
    page_count = max(sizes) // page_size * 5 // 4 + 2
    shape = PoolShape(30, 3, 64, page_count, page_size, "bfloat16", device)  # SmolLM2-135M
    rng = np.random.default_rng(SEED)
    cases = [make_case(tokens, layout, shape=shape, rng=rng) for tokens in sizes for layout in LAYOUTS]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        methods, missing = start_methods(stack, shape)
        for case in cases:
            samples = measure(case, methods, repetitions=repetitions, budget_s=seconds / len(cases))
            rows += summarise(case, samples, missing, bytes_per_page=shape.bytes_per_page)
            report(rows[-len(samples) - len(missing) :])
    summary: dict[str, Any] = {
        "question": "How fast is the handoff, against NIXL, plain torch and the machine's copy limit?",
        **describe_environment(("sglang", "sglang-prefillshare", "torch", "numpy", "nixl"), device=device),
        "config": {**asdict(shape), "bytes_per_token": shape.bytes_per_page // page_size, "seed": SEED},
        "rows": rows,
    }
    target = out / "bench" / "handoff"
    target.mkdir(parents=True, exist_ok=True)
    (target / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    click.echo(f"written to {target / 'summary.json'}")
    try:
        from benchmark.handoff.plot import draw

        draw(summary, target / "bandwidth.png")
        click.echo(f"drawn in {target / 'bandwidth.png'}")
    except ImportError as error:
        click.echo(f"not drawn: {error}")


def start_methods(stack: ExitStack, shape: PoolShape) -> tuple[list[Any], dict[str, str]]:
    """The methods that this machine has, and for each of the others the reason why not."""
    from benchmark.handoff import methods as known

    pools = known.LocalPools(shape)
    found: list[Any] = [known.CopyLimit(pools), known.Local(known.INDEX_COPY, pools, known.index_copy)]
    missing: dict[str, str] = {}
    for backend in (known.OURS, known.NIXL):
        try:
            found.append(known.ThroughPair(stack.enter_context(handoff_pair(backend, shape))))
        except WorkerError as error:
            missing[backend] = str(error).partition("\n")[0]
    if shape.device == "cpu":
        missing[known.STAGING] = "CUDA kernels; the pools are in host memory"
    else:
        found.append(known.Local(known.STAGING, pools, known.staging_kernels(pools)))
    return found, missing


def measure(case: Case, methods: Sequence[Any], *, repetitions: int, budget_s: float) -> dict[str, list[float]]:
    """Seconds by name, one per repetition; each repetition begins with another method."""
    deadline = time.monotonic() + budget_s
    for method in methods:
        method.check(case)
    samples: dict[str, list[float]] = {}
    for done in range(repetitions):
        if done >= MIN_REPETITIONS and time.monotonic() > deadline:
            break
        first = done % len(methods)
        for method in (*methods[first:], *methods[:first]):
            for name, seconds in method.measure(case).items():
                samples.setdefault(name, []).append(seconds)
    return samples


def summarise(
    case: Case, samples: dict[str, list[float]], missing: dict[str, str], *, bytes_per_page: int
) -> list[dict[str, Any]]:
    from benchmark.handoff.methods import COPY_LIMIT

    size = len(case.source_pages) * bytes_per_page
    common = {"tokens": case.tokens, "pages": len(case.source_pages), "layout": case.layout, "bytes": size}
    limit_s = float(np.median(samples[COPY_LIMIT]))
    rows = []
    for name, seconds in samples.items():
        p10, median, p90 = (float(value) for value in np.percentile(seconds, (10, 50, 90)))
        rows.append(
            {
                **common,
                "method": name,
                "median_s": median,
                "p10_s": p10,
                "p90_s": p90,
                "bandwidth_bytes_per_s": size / median,
                "share_of_copy_limit": limit_s / median,
                "reps": len(seconds),
                "samples_s": [round(value, 7) for value in seconds],
            }
        )
    nothing = dict.fromkeys(("median_s", "p10_s", "p90_s", "bandwidth_bytes_per_s", "share_of_copy_limit"))
    rows += [{**common, "method": name, **nothing, "reps": 0, "reason": why} for name, why in missing.items()]
    return rows


def report(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        where = f"{row['tokens']:6} {row['layout']:10} {row['method']:24}"
        if row["median_s"] is None:
            click.echo(f"{where} {row['reason']}")
            continue
        spread = f"[{row['p10_s'] * 1e3:8.2f} {row['p90_s'] * 1e3:8.2f}]"
        speed = f"{row['bandwidth_bytes_per_s'] / 1e9:6.2f} GB/s {row['share_of_copy_limit']:6.1%} of the copy limit"
        click.echo(f"{where} {row['median_s'] * 1e3:8.2f} ms {spread} {speed}, {row['reps']} times")


if __name__ == "__main__":
    main()
