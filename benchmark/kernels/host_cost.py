"""What does a page copy cost the host before the GPU has anything to do?

Both ways to the launch, with a launch that does nothing in the place of the kernel, so that no GPU is needed:

    planned      the handoff's own copier, which planned, and compiled, when the pool was mapped
    each time    new page tensors, checks and a plan in every call, as `copy_pages` does for pools that it does not know

They take turns in random order, with random pages, for pools of Llama-3.1-8B's geometry. What a GPU adds is left out:
with "planned" making its device current, the compiled kernel's launch and the wait for its stream; with "each time"
Triton's look at every argument as well. Writes out/bench/kernels/host_cost.json.

    python benchmark/kernels/host_cost.py --repeats 2000
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from prefillshare_kernels import rows  # noqa: E402
from prefillshare_kernels.copy_pages import copy_pages  # noqa: E402
from prefillshare_kernels.pool import KVPool  # noqa: E402
from sglang_prefillshare.environment import describe_environment  # noqa: E402
from sglang_prefillshare.handoff.device_copy import DeviceCopier  # noqa: E402
from sglang_prefillshare.handoff.pool import PoolView  # noqa: E402

BUFFERS = 64
"""Keys and values of 32 layers."""
ROW_BYTES = 2048
"""8 KV heads of 128 numbers of 2 bytes."""
TOKENS = 65_536
CPU = torch.device("cpu")
WANTED_US = 15.0


class NoLaunch:
    """Stands where the kernel does, and takes its launches without a look at them."""

    arg_names = rows.copy_rows.arg_names

    def warmup(self, *arguments: Any, grid: Any, **constants: Any) -> NoLaunch:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    @staticmethod
    def _launch(*arguments: Any, **constants: Any) -> None:
        return


@contextmanager
def no_launches() -> Iterator[None]:
    kept, rows.copy_rows = rows.copy_rows, NoLaunch()
    try:
        yield
    finally:
        rows.copy_rows = kept


def pool_view(page_size: int, address: int) -> PoolView:
    return PoolView.at([address] * BUFFERS, [page_size * ROW_BYTES] * BUFFERS, TOKENS // page_size, owner=None)


def measure(page_size: int, mebibytes: int, repeats: int) -> dict[str, Any]:
    source, target = pool_view(page_size, 1 << 20), pool_view(page_size, 1 << 30)
    copier = DeviceCopier(CPU)
    copier.prepare(source, target)

    def each_time(source_pages: Any, target_pages: Any) -> None:
        lists = torch.from_numpy(np.stack((source_pages, target_pages)))
        copy_pages(described[0], described[1], lists[0], lists[1])

    described = [
        KVPool((view_address,) * BUFFERS, (page_size * ROW_BYTES,) * BUFFERS, 1, TOKENS // page_size, CPU)
        for view_address in (1 << 20, 1 << 30)
    ]
    ways: dict[str, Callable[[Any, Any], None]] = {
        "planned": lambda source_pages, target_pages: copier(source, target, source_pages, target_pages),
        "each time": each_time,
    }
    count = max(1, (mebibytes << 20) // (BUFFERS * ROW_BYTES * page_size))
    drawn = np.random.default_rng(1)
    lists = [drawn.permutation(TOKENS // page_size)[:count].astype(np.int32) for _ in range(32)]
    samples: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for repeat in range(repeats + 20):
        random.shuffle(order)
        for name in order:
            source_pages, target_pages = random.sample(lists, 2)
            started = time.perf_counter()
            ways[name](source_pages, target_pages)
            if repeat >= 20:
                samples[name].append((time.perf_counter() - started) * 1e6)
    found: dict[str, Any] = {"page_size": page_size, "mebibytes": mebibytes, "pages": count}
    for name, times in samples.items():
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        found[name] = {"p25_us": quartiles[0], "p50_us": quartiles[1], "p75_us": quartiles[2]}
    return found


@click.command(help=__doc__)
@click.option("--repeats", default=500, show_default=True, help="Timed calls of each way.")
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(repeats: int, out: Path) -> None:
    random.seed(1)
    with no_launches():
        found = [measure(page_size, size, repeats) for page_size in (1, 16, 64) for size in (1, 16, 64, 256)]
    target = out / "bench" / "kernels" / "host_cost.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(("sglang-prefillshare", "torch", "triton", "numpy"))
    target.write_text(json.dumps({"environment": environment, "rows": found}, indent=2) + "\n")
    click.echo("page size     MiB   pages   planned: p50 us (p25 to p75)   each time")
    for row in found:
        planned, other = row["planned"], row["each time"]
        click.echo(
            f"{row['page_size']:9}  {row['mebibytes']:6}  {row['pages']:6}   "
            f"{planned['p50_us']:8.1f} ({planned['p25_us']:.1f} to {planned['p75_us']:.1f})"
            f"        {other['p50_us']:8.1f} ({other['p25_us']:.1f} to {other['p75_us']:.1f})"
        )
    smallest = max(row["planned"]["p50_us"] for row in found if row["mebibytes"] == 1)
    click.echo(f"1 MiB costs the host {smallest:.1f} us at most, wanted {WANTED_US:g} us at most.")


if __name__ == "__main__":
    main()
