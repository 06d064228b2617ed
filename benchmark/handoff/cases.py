"""What is handed over: how many tokens, and where their pages lie in the two pools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sglang_prefillshare.handoff.pool import PageList
from sglang_prefillshare.host.transfer.rig import PoolShape

LAYOUTS: Final = ("contiguous", "runs", "random")
MEAN_RUN_PAGES: Final = 32


@dataclass(frozen=True, slots=True)
class Case:
    """Page k of `source_pages` goes to page k of `target_pages`."""

    tokens: int
    layout: str
    source_pages: PageList
    target_pages: PageList


def make_case(tokens: int, layout: str, *, shape: PoolShape, rng: np.random.Generator) -> Case:
    """`contiguous`: one run; `runs`: of 32 pages on average, the same on both sides; `random`: pages anywhere."""
    count = tokens // shape.page_size
    if layout == "random":
        source, target = (rng.permutation(np.arange(1, shape.page_count))[:count] for _ in range(2))
    else:
        lengths = [count] if layout == "contiguous" else _run_lengths(count, rng)
        source, target = (_place(lengths, shape.page_count, rng) for _ in range(2))
    return Case(tokens, layout, source.astype(np.int32), target.astype(np.int32))


def _run_lengths(count: int, rng: np.random.Generator) -> list[int]:
    lengths: list[int] = []
    while (left := count - sum(lengths)) > 0:
        lengths.append(min(left, int(rng.geometric(1 / MEAN_RUN_PAGES))))
    return lengths


def _place(lengths: list[int], page_count: int, rng: np.random.Generator) -> np.ndarray:
    """Pages for runs of these lengths, scattered over [1, page_count) with a gap between any two."""
    slack = page_count - sum(lengths) - len(lengths)
    first = 1 + np.sort(rng.integers(0, slack + 1, len(lengths)))
    runs: dict[int, np.ndarray] = {}
    used = 0
    for place, run in enumerate(rng.permutation(len(lengths))):
        start = int(first[place]) + used + place
        runs[int(run)] = np.arange(start, start + lengths[run])
        used += lengths[run]
    return np.concatenate([runs[run] for run in range(len(lengths))])
