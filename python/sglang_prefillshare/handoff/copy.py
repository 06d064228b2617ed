"""Copying pages between two KV pools in host memory.

Pages that lie side by side in both pools move as one run, at the speed of memcpy; a request's pages usually do, because
allocators hand them out in order. Scattered pages move one by one, with the next ones already on their way into the
cache: a row of the KV of one token and layer is a few cache lines, and waiting for memory is most of the time.
The loop is compiled by Numba, which SGLang needs too, and runs without the interpreter lock. One thread does it: a
second one gains nothing while the machine's other cores are busy, as a deployment's are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sglang_prefillshare.handoff.pool import PageList, PoolView, check_copy
from sglang_prefillshare.handoff.ranks import HeadSlice

_PREFETCH_RUNS: Final = 8
"""How many runs ahead memory is asked for: 8 was best of 0 to 16 for rows of 384 bytes."""

_PREFETCH_BYTES: Final = 1024
"""How much of a run is asked for; the processor's own prefetcher follows a longer one."""

_CACHE_LINE: Final = 64

Runs = npt.NDArray[np.int64]


def contiguous_runs(source: PageList, target: PageList) -> Runs:
    """Split a page mapping into rows (source page, target page, length) of pages contiguous on both sides.

    int64 [runs, 3], in the order of the mapping.
    """
    if len(source) == 0:
        return np.empty((0, 3), np.int64)
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(source)])))
    return np.stack((source[starts], target[starts], lengths), axis=1).astype(np.int64)


def copy_pages(
    source: PoolView,
    target: PoolView,
    source_pages: PageList,
    target_pages: PageList,
    heads: HeadSlice | None = None,
) -> None:
    """Copy page source_pages[k] to page target_pages[k], in every buffer and for every k; or just these `heads` of it.

    Both pools are host memory, with pages, or heads, of equal size. Bit-exact. The caller keeps the source pages from
    being rewritten until this returns, and names no target page twice. Raises `HandoffError` for pages that are not
    there.
    """
    check_copy(source, target, source_pages, target_pages, heads)
    if not len(source_pages):
        return
    runs = contiguous_runs(source_pages, target_pages)
    if heads is None:
        _copy_runs(source.addresses, target.addresses, source.page_bytes, runs)
        return
    head_bytes = source.page_bytes // (heads.page_size * heads.source_heads)
    _copy_heads(
        source.addresses + heads.source_first * head_bytes,
        target.addresses + heads.target_first * head_bytes,
        heads.source_heads * head_bytes,
        heads.target_heads * head_bytes,
        heads.count * head_bytes,
        heads.page_size,
        runs,
    )


def warm_up() -> None:
    """Compile the copy, or load what an earlier process compiled, so that no request waits for it."""
    page = np.zeros((1, 1), np.uint8)
    view = PoolView.at([page.ctypes.data], [1], 1, owner=page)
    pages = np.zeros(1, np.int32)
    copy_pages(view, view, pages, pages)
    copy_pages(view, view, pages, pages, HeadSlice(1, 1, 1, 0, 0, 1))


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(8).as_pointer())


@intrinsic
def _memcpy(_context: Any, _target: Any, _source: Any, _size: Any) -> tuple[Any, Callable[..., Any]]:
    """memcpy(target: address, source: address, size: bytes)."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        byte_pointer = ir.IntType(8).as_pointer()
        function = builder.module.declare_intrinsic("llvm.memcpy", [byte_pointer, byte_pointer, ir.IntType(64)])
        target, source, size = arguments
        is_volatile = ir.IntType(1)(0)
        builder.call(function, [_pointer(builder, target), _pointer(builder, source), size, is_volatile])

    return types.void(types.int64, types.int64, types.int64), codegen


def _prefetch_intrinsic(*, is_write: bool) -> Any:
    """An intrinsic that asks for the cache line at an address; what it is asked for is fixed in the instruction."""

    def prefetch(_context: Any, _address: Any) -> tuple[Any, Callable[..., Any]]:
        def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
            int32, byte_pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [byte_pointer, int32, int32, int32])
            function = builder.module.declare_intrinsic("llvm.prefetch", [byte_pointer], kind)
            high_locality, data_cache = int32(3), int32(1)
            pointer = _pointer(builder, arguments[0])
            builder.call(function, [pointer, int32(int(is_write)), high_locality, data_cache])

        return types.void(types.int64), codegen

    return intrinsic(prefetch)


_prefetch_to_read = _prefetch_intrinsic(is_write=False)
_prefetch_to_write = _prefetch_intrinsic(is_write=True)


def _compiled(function: Any) -> Any:
    """Compiled at the first call and kept on disk for the next process, where there is a place that can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@_compiled
def _copy_runs(sources: Any, targets: Any, page_bytes: Any, runs: Any) -> None:
    count = runs.shape[0]
    for buffer in range(sources.shape[0]):
        source, target, size = sources[buffer], targets[buffer], page_bytes[buffer]
        for k in range(count):
            ahead = k + _PREFETCH_RUNS
            if ahead < count:
                read, write = source + runs[ahead, 0] * size, target + runs[ahead, 1] * size
                for offset in range(0, min(runs[ahead, 2] * size, _PREFETCH_BYTES), _CACHE_LINE):
                    _prefetch_to_read(read + offset)
                    _prefetch_to_write(write + offset)
            _memcpy(target + runs[k, 1] * size, source + runs[k, 0] * size, runs[k, 2] * size)


@_compiled
def _copy_heads(
    sources: Any, targets: Any, source_rows: Any, target_rows: Any, widths: Any, page_size: int, runs: Any
) -> None:
    """`source_rows` and `target_rows` are the bytes of a row in each buffer, `widths` how many of them move."""
    for buffer in range(sources.shape[0]):
        source_row, target_row, width = source_rows[buffer], target_rows[buffer], widths[buffer]
        for k in range(runs.shape[0]):
            source = sources[buffer] + runs[k, 0] * page_size * source_row
            target = targets[buffer] + runs[k, 1] * page_size * target_row
            for row in range(runs[k, 2] * page_size):
                _memcpy(target + row * target_row, source + row * source_row, width)
