"""Does anything go wrong, leak or hang when handoffs are made by the thousand and everything fails now and then?

10,000 handoffs between real processes at the level of the backend, then 500 requests through real servers, both with
faults. Bytes are compared by checksum, answers with plain Transformers. Writes out/soak/summary.json; the exit status
is 1 if anything was wrong, leaked or hung.

    python test/soak/run.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from test.soak import backend, servers  # noqa: E402
from test.soak.tally import Tally  # noqa: E402


@click.command(help=__doc__)
@click.option("--handoffs", default=10_000, show_default=True, help="At the level of the backend.")
@click.option("--requests", default=500, show_default=True, help="Through real servers.")
@click.option("--seed", default=1, show_default=True)
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(handoffs: int, requests: int, seed: int, out: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # Transformers' own bars
    console = Console(stderr=True)
    summary: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "seed": seed}
    is_clean = True
    with tempfile.TemporaryDirectory() as folder:
        for name, count, soak in (
            ("backend", handoffs, lambda tell: backend.run(handoffs, seed=seed, on_progress=tell)),
            ("servers", requests, lambda tell: servers.run(requests, Path(folder), seed=seed, on_progress=tell)),
        ):
            if count == 0:
                continue
            started = time.monotonic()
            tally = _watched(console, name, count, soak)
            seconds = time.monotonic() - started
            is_clean &= tally.is_clean
            summary[name] = {**tally.to_json(), "seconds": round(seconds, 1)}
            _report(name, tally, seconds)
    target = out / "soak" / "summary.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    click.echo(f"written to {target}")
    sys.exit(0 if is_clean else 1)


def _watched(console: Console, name: str, count: int, soak: Callable[[Callable[[int], None]], Tally]) -> Tally:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(name, total=count)
        return soak(lambda done: progress.update(task, completed=done))


def _report(name: str, tally: Tally, seconds: float) -> None:
    click.echo(
        f"{name}: {tally.handoffs:,} in {seconds:.0f} s, {tally.ok:,} ok, {sum(tally.failed.values()):,} failed with a "
        f"reason; {len(tally.wrong)} wrong, {len(tally.leaked)} leaked, {len(tally.hung)} hung"
    )
    for what, counts in (("fault", tally.faults), ("failure", tally.failed)):
        for reason, count in counts.most_common():
            click.echo(f"  {count:6,}  {what}: {reason}")
    for what, found in (("WRONG", tally.wrong), ("LEAKED", tally.leaked), ("HUNG", tally.hung)):
        for line in found[:10]:
            click.echo(f"  {what}: {line}")


if __name__ == "__main__":
    main()
