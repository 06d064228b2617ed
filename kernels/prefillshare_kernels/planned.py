"""`PlannedCopy`: whole pages from one pool to another, or some heads of them, planned once.

`copy_pages` checks and plans anew in each call, and Triton's ordinary launch looks every argument over for the kernel
that fits: together more time than the device needs for a megabyte. Here both are done once.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

from prefillshare_kernels import rows
from prefillshare_kernels.pool import KVPool
from prefillshare_kernels.rows import LARGE, SMALL, Launch, Paged, Tuning, grid_of, plan, run, tuning_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Variant:
    """One tuning's launch. `kernel` is None where the ordinary launch is taken."""

    tuning: Tuning
    launch: Launch
    tokens_per_tile: int
    column_blocks: int
    kernel: Any
    before: tuple[int, int]
    """Addresses of the tables."""
    after: tuple[int, ...]
    """First tokens and heads, and what was a constant of the compilation, in the kernel's order."""


class PlannedCopy:
    """Copies pages of `source` onto pages of `target`, two pools of one page size.

    Constructing it compiles and loads every kernel that it may launch. `tuning` replaces the choice by size.
    Heads [source_head, source_head + head_count) of a row go to those from `target_head` on; by default all of them.
    Raises `ValueError` where the pools cannot exchange pages.
    """

    def __init__(
        self,
        source: KVPool,
        target: KVPool,
        *,
        source_head: int = 0,
        target_head: int = 0,
        head_count: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        if source.page_size != target.page_size:
            raise ValueError(
                f"The source has pages of {source.page_size} tokens, the target of {target.page_size}. Describe both "
                "with one page size, or use copy_pages."
            )
        if head_count is None and source.heads != target.heads:
            raise ValueError(
                f"The source has {source.heads} heads, the target {target.heads}. Pass head_count to copy some of them."
            )
        self.source, self.target = source, target
        self._heads = source_head, target_head, source.heads if head_count is None else head_count
        self._page_size = source.page_size
        self._page_bytes = source.page_size * self._heads[2] * sum(source.head_bytes)
        self._buffer_count = len(source.addresses)
        small = self._variant(tuning or SMALL)
        self._small, self._large = small, small if tuning is not None else self._variant(LARGE)

    def __call__(self, lists: torch.Tensor, count: int, *, stream: int | None = None) -> None:
        """Copy page lists[i] of the source onto page lists[count + i] of the target, for i in [0, count).

        `lists` is int32 [2 * count or more], contiguous, where the device can read it: its own memory, or pinned
        memory of the host. It must not change until the copy has run. `stream` is a CUDA stream's handle, by default
        the current one's; the pools' device is the current device. Neither the lists nor `count` are checked here.
        """
        variant = self._small if tuning_for(count * self._page_bytes) is SMALL else self._large
        tokens, launch = count * self._page_size, variant.launch
        grid = grid_of(tokens, self._buffer_count, variant.tokens_per_tile, variant.column_blocks, variant.tuning)
        if variant.kernel is not None:
            pages = lists.data_ptr()
            variant.kernel[(*grid, 1)](
                *variant.before, pages, pages + 4 * count, None, None, tokens, *variant.after, stream=stream
            )
            return
        arguments = list(launch.arguments)
        arguments[2:4] = lists[:count], lists[count : 2 * count]
        arguments[6] = tokens
        with nullcontext() if stream is None else torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            run(Launch(grid, tuple(arguments), launch.constants), self.source.device)

    def _variant(self, tuning: Tuning) -> _Variant:
        page = torch.zeros(1, dtype=torch.int32, device=self.source.device)
        source_head, target_head, head_count = self._heads
        launch = plan(
            Paged(self.source, page, 0, source_head),
            Paged(self.target, page, 0, target_head),
            tokens=self.source.page_size,
            head_count=head_count,
            tuning=tuning,
        )
        assert launch is not None, "a page has a token"
        names = [name for name in launch.constants if name != "num_warps"]
        assert names == rows.copy_rows.arg_names[len(launch.arguments) :], "constants are in the kernel's order"
        before = (self.source.table.data_ptr(), self.target.table.data_ptr())
        after = (*launch.arguments[7:], *(launch.constants[name] for name in names))
        tile = launch.constants["TOKENS"], launch.constants["COLUMN_BLOCKS"]
        return _Variant(tuning, launch, *tile, self._compiled(launch, before, after), before, after)

    def _compiled(self, launch: Launch, before: tuple[int, int], after: tuple[Any, ...]) -> Any:
        """The kernel, compiled, loaded and launched once without tokens; None for the ordinary launch.

        Triton documents the launch of a compiled kernel in a tutorial only: with another version it may want other
        arguments. Then the ordinary launch does the same in more of the host's time. Triton's interpreter, which
        tests on a CPU use, compiles nothing.
        """
        device = self.source.device
        if type(rows.copy_rows).__name__ == "InterpretedFunction":  # of a module that only the interpreter imports
            return None
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel = rows.copy_rows.warmup(*launch.arguments, grid=launch.grid, **launch.constants)
            try:
                kernel[(1, 1, 1)](*before, 0, 0, None, None, 0, *after)
            except (AttributeError, TypeError, ValueError) as error:
                logger.warning(
                    "Triton %s launches compiled kernels otherwise than expected (%s): copies take its ordinary "
                    "launch, which costs tens of microseconds more each.",
                    triton.__version__,
                    error,
                )
                return None
        return kernel
