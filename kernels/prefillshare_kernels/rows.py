"""The kernel under every operation: copy rows of all buffers from one place to another, in one launch.

A place is a pool seen through a page list (`Paged`), or a contiguous staging buffer (`Staged`). `plan` checks the
arguments and decides the launch, without one; `run` launches. What the operations are called is left to `copy_pages`
and `staging`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import gcd
from typing import Any, Final, Literal

import torch
import triton
import triton.language as tl

from prefillshare_kernels.pool import VECTOR_BYTES, KVPool

LINE_BYTES: Final = 128
"""A column tile is no narrower than a cache line, unless the row is."""
_WORDS: Final = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@dataclass(frozen=True, slots=True)
class Paged:
    """Tokens [first, first + n) of the pages in `pages` (int32 or int64 [pages]), heads from `head` on."""

    pool: KVPool
    pages: torch.Tensor
    first: int = 0
    head: int = 0


@dataclass(frozen=True, slots=True)
class Staged:
    """`staging`, uint8 [bytes], holds [buffer][token][head_count heads] without gaps from its start on."""

    staging: torch.Tensor


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a copy is cut into programs: nothing of it changes what is copied.

    A program copies a tile of `words` words with `warps` warps. `eviction` is the L2 hint of every row's access, as
    Triton calls it. With `is_buffer_first` neighbours in the grid copy the same tokens of different buffers, else
    different tokens of the same buffer.
    """

    words: int = 2048
    warps: int = 4
    eviction: Literal["", "evict_first", "evict_last"] = ""
    is_buffer_first: bool = False


LARGE: Final = Tuning()
"""16 words for each of 128 threads: with words of 8 bytes, 16 KiB a program and 8 vector loads in flight a thread."""
SMALL: Final = Tuning(words=512)
"""4 KiB a program: a copy of 1 MiB is 256 programs, so that all of a GPU's 132 multiprocessors have some of it."""
SMALL_COPY_BYTES: Final = 4 << 20
"""Up to here `SMALL`: in tiles of `LARGE` it would be under two programs for each of 132 multiprocessors."""


def tuning_for(copied_bytes: int) -> Tuning:
    """The tuning of a copy of so many bytes, over all buffers."""
    return SMALL if copied_bytes <= SMALL_COPY_BYTES else LARGE


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch of `copy_rows`, decided: the grid, the arguments by position, the compile-time ones by name."""

    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]


@triton.jit
def _base(
    table: tl.tensor,
    staging: tl.tensor,
    buffer: tl.tensor,
    tokens: tl.tensor,
    head: tl.tensor,
    head_bytes: tl.tensor,
    HEAD_COUNT: tl.constexpr,
    WORD: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
) -> tl.tensor:
    """Address of the first byte to copy in row 0 of this buffer."""
    if staging is None:
        address = tl.load(table + 3 * buffer.to(tl.int64)) + head.to(tl.int64) * head_bytes
    else:
        before = tl.load(table + 3 * buffer.to(tl.int64) + 2)
        address = staging.to(tl.int64, bitcast=True) + before * HEAD_COUNT * tokens.to(tl.int64)
    # The table's contents are unknown to the compiler; `plan` has checked what is promised here.
    return tl.multiple_of(address.to(tl.pointer_type(WORD), bitcast=True), ALIGN_BYTES)


@triton.jit
def _row_offsets(
    pages: tl.tensor,
    token: tl.tensor,
    is_wanted: tl.tensor,
    row_words: tl.tensor,
    PAGE_SIZE: tl.constexpr,
) -> tl.tensor:
    """Words from row 0 to each token's row, int64 [tokens]. Without a page list, tokens lie back to back."""
    if pages is None:
        offsets = token.to(tl.int64) * row_words
    else:
        page = tl.load(pages + token // PAGE_SIZE, mask=is_wanted, other=0)
        offsets = (page.to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE) * row_words
    return offsets


@triton.jit(
    # Requests differ in these, and none may cost a compilation.
    do_not_specialize=["tokens", "source_first", "target_first", "source_head", "target_head"],
    do_not_specialize_on_alignment=[
        "source_table",
        "target_table",
        "source_pages",
        "target_pages",
        "source_staging",
        "target_staging",
    ],
)
def copy_rows(
    source_table: tl.tensor,
    target_table: tl.tensor,
    source_pages: tl.tensor,
    target_pages: tl.tensor,
    source_staging: tl.tensor,
    target_staging: tl.tensor,
    tokens: tl.tensor,
    source_first: tl.tensor,
    target_first: tl.tensor,
    source_head: tl.tensor,
    target_head: tl.tensor,
    HEAD_BYTES: tl.constexpr,
    HEAD_COUNT: tl.constexpr,
    SOURCE_HEADS: tl.constexpr,
    TARGET_HEADS: tl.constexpr,
    SOURCE_PAGE_SIZE: tl.constexpr,
    TARGET_PAGE_SIZE: tl.constexpr,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    EVICTION: tl.constexpr,
    IS_BUFFER_FIRST: tl.constexpr,
) -> None:
    """Copy a tile of TOKENS rows by COLUMNS words in buffer `program_id(1)`, or `program_id(0)` with IS_BUFFER_FIRST.

    Tables are `KVPool.table`. A page list is None for a staged side, and a staging buffer None for a paged one.
    HEAD_BYTES is 0 where it differs between buffers, to be read from the table. Words are integers, so that no bit
    pattern has a meaning. ALIGN_BYTES divides every address that a row or a slice of heads starts at.
    """
    block = tl.program_id(1 if IS_BUFFER_FIRST else 0)
    buffer = tl.program_id(0 if IS_BUFFER_FIRST else 1)
    # Column blocks of the same rows are neighbours in the grid, and run at about the same time.
    token = (block // COLUMN_BLOCKS) * TOKENS + tl.arange(0, TOKENS)
    column = (block % COLUMN_BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    ALIGN_WORDS: tl.constexpr = ALIGN_BYTES // WORD_BYTES
    if HEAD_BYTES > 0:
        head_bytes = HEAD_BYTES
        width = HEAD_COUNT * HEAD_BYTES // WORD_BYTES
        source_row = SOURCE_HEADS * HEAD_BYTES // WORD_BYTES
        target_row = TARGET_HEADS * HEAD_BYTES // WORD_BYTES
    else:
        head_bytes = tl.load(source_table + 3 * buffer.to(tl.int64) + 1)
        width = tl.multiple_of(HEAD_COUNT * head_bytes // WORD_BYTES, ALIGN_WORDS)
        source_row = tl.multiple_of(SOURCE_HEADS * head_bytes // WORD_BYTES, ALIGN_WORDS)
        target_row = tl.multiple_of(TARGET_HEADS * head_bytes // WORD_BYTES, ALIGN_WORDS)
    source = _base(source_table, source_staging, buffer, tokens, source_head, head_bytes, HEAD_COUNT, WORD, ALIGN_BYTES)
    target = _base(target_table, target_staging, buffer, tokens, target_head, head_bytes, HEAD_COUNT, WORD, ALIGN_BYTES)
    is_wanted = token < tokens
    source_offsets = _row_offsets(source_pages, source_first + token, is_wanted, source_row, SOURCE_PAGE_SIZE)
    target_offsets = _row_offsets(target_pages, target_first + token, is_wanted, target_row, TARGET_PAGE_SIZE)
    mask = is_wanted[:, None] & (column < width)[None, :]
    words = tl.load(source + (source_offsets[:, None] + column[None, :]), mask=mask, eviction_policy=EVICTION)
    tl.store(target + (target_offsets[:, None] + column[None, :]), words, mask=mask, eviction_policy=EVICTION)


def tile(width_words: int, word_bytes: int, tile_words: int) -> tuple[int, int]:
    """(tokens, columns) of a tile of `tile_words` words for rows of which `width_words` words are copied.

    All are powers of two but `width_words`.

    Of the column tiles from a cache line up, the one that leaves the fewest lanes idle, and of these the widest:
    rows of 256 words go in tiles of 256, rows of 144 in tiles of 16.
    """
    whole = min(triton.next_power_of_2(width_words), tile_words)
    columns = whole
    candidate = whole // 2
    while candidate >= LINE_BYTES // word_bytes:
        if triton.cdiv(width_words, candidate) * candidate < triton.cdiv(width_words, columns) * columns:
            columns = candidate
        candidate //= 2
    return tile_words // columns, columns


def plan(
    source: Paged | Staged, target: Paged | Staged, *, tokens: int, head_count: int, tuning: Tuning | None = None
) -> Launch | None:
    """Decide the launch that copies `tokens` tokens of `head_count` heads, or None where there is nothing to copy.

    At least one side is `Paged`. A page list has exactly the pages that [0, first + tokens) takes. Page numbers are
    not looked at, that would wait for the GPU: see `check_pages`. `tuning` is by default `tuning_for` this size. Raises
    `ValueError` for anything else that is wrong.
    """
    pools = [side.pool for side in (source, target) if isinstance(side, Paged)]
    assert pools, "one side is a pool"
    pool = pools[0]
    _check_counts(tokens, head_count)
    for side, name in ((source, "source"), (target, "target")):
        if isinstance(side, Paged):
            _check_paged(side, name, tokens=tokens, head_count=head_count)
        else:
            _check_staged(side, pool, tokens=tokens, head_count=head_count)
    if len(pools) == 2:
        _check_alike(*pools)
    if tokens == 0:
        return None

    head_bytes = set(pool.head_bytes)
    alignment = gcd(VECTOR_BYTES, *(head_count * width for width in head_bytes))
    for side in (source, target):
        if isinstance(side, Paged):
            alignment = gcd(alignment, side.pool.alignment_bytes, *(side.head * width for width in head_bytes))
        else:
            alignment = gcd(alignment, side.staging.data_ptr())
    word_bytes = min(8, alignment)
    width_words = head_count * max(head_bytes) // word_bytes
    if tuning is None:
        tuning = tuning_for(tokens * head_count * sum(pool.head_bytes))
    token_tile, columns = tile(width_words, word_bytes, tuning.words)
    column_blocks = triton.cdiv(width_words, columns)
    grid = grid_of(tokens, len(pool.addresses), token_tile, column_blocks, tuning)
    if grid[0] >= 1 << 31 or grid[1] >= 1 << 16 or tokens + _first(source) + _first(target) + token_tile >= 1 << 31:
        raise ValueError(
            f"{tokens} tokens of {len(pool.addresses)} buffers make a grid of {grid}, wanted below 2**31 tokens and "
            "programs and 2**16 buffers. Copy in parts."
        )
    return Launch(
        grid=grid,
        arguments=(
            source.pool.table if isinstance(source, Paged) else pool.table,
            target.pool.table if isinstance(target, Paged) else pool.table,
            source.pages if isinstance(source, Paged) else None,
            target.pages if isinstance(target, Paged) else None,
            source.staging if isinstance(source, Staged) else None,
            target.staging if isinstance(target, Staged) else None,
            tokens,
            _first(source),
            _first(target),
            source.head if isinstance(source, Paged) else 0,
            target.head if isinstance(target, Paged) else 0,
        ),
        constants={
            "HEAD_BYTES": pool.head_bytes[0] if len(head_bytes) == 1 else 0,
            "HEAD_COUNT": head_count,
            "SOURCE_HEADS": source.pool.heads if isinstance(source, Paged) else head_count,
            "TARGET_HEADS": target.pool.heads if isinstance(target, Paged) else head_count,
            "SOURCE_PAGE_SIZE": source.pool.page_size if isinstance(source, Paged) else 1,
            "TARGET_PAGE_SIZE": target.pool.page_size if isinstance(target, Paged) else 1,
            "WORD": _WORDS[word_bytes],
            "WORD_BYTES": word_bytes,
            "ALIGN_BYTES": alignment,
            "TOKENS": token_tile,
            "COLUMNS": columns,
            "COLUMN_BLOCKS": column_blocks,
            "EVICTION": tuning.eviction,
            "IS_BUFFER_FIRST": tuning.is_buffer_first,
            "num_warps": tuning.warps,
        },
    )


def grid_of(
    tokens: int, buffer_count: int, tokens_per_tile: int, column_blocks: int, tuning: Tuning
) -> tuple[int, int]:
    """The programs that copy `tokens` tokens of every buffer."""
    blocks = -(-tokens // tokens_per_tile) * column_blocks
    return (buffer_count, blocks) if tuning.is_buffer_first else (blocks, buffer_count)


def run(launch: Launch | None, device: torch.device) -> None:
    """Launch on the current stream of `device`; returns before the copy is done. Raises `ValueError` on a CPU.

    The CPU runs it in Triton's interpreter, where TRITON_INTERPRET=1 was set before this module was imported.
    """
    if launch is None:
        return
    if device.type == "cpu" and isinstance(copy_rows, triton.JITFunction):
        raise ValueError(
            "The pool is on the CPU, the kernel needs a CUDA device. Use prefillshare_kernels.reference, or set "
            "TRITON_INTERPRET=1 before the import."
        )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        copy_rows[launch.grid](*launch.arguments, **launch.constants)


def tokens_in(side: Paged) -> int:
    """Tokens from `first` to the end of the last page."""
    return len(side.pages) * side.pool.page_size - side.first


def _first(side: Paged | Staged) -> int:
    return side.first if isinstance(side, Paged) else 0


def _check_counts(tokens: int, head_count: int) -> None:
    if tokens < 0:
        raise ValueError(f"{tokens} tokens to copy, wanted at least 0. Is the first token beyond the last page?")
    if head_count < 1:
        raise ValueError(f"{head_count} heads to copy, wanted at least 1. Leave head_count out to copy all.")


def _check_paged(side: Paged, name: str, *, tokens: int, head_count: int) -> None:
    pool, pages = side.pool, side.pages
    if pages.ndim != 1 or pages.dtype not in (torch.int32, torch.int64) or not pages.is_contiguous():
        raise ValueError(
            f"The {name} page list is {pages.dtype} {tuple(pages.shape)} with strides {pages.stride()}, wanted "
            "contiguous int32 or int64 [pages]. Convert it with .flatten().to(torch.int32)."
        )
    if pages.device != pool.table.device:
        raise ValueError(
            f"The {name} page list is on {pages.device}, its pool on {pool.table.device}. Move the list there."
        )
    if side.first < 0:
        raise ValueError(f"The first {name} token is {side.first}, wanted at least 0. Count it from the first page.")
    wanted = triton.cdiv(side.first + tokens, pool.page_size)
    if len(pages) != wanted:
        raise ValueError(
            f"The {name} page list has {len(pages)} pages, wanted {wanted}: the pages of {pool.page_size} tokens that "
            f"{side.first} + {tokens} tokens take. Pass that many, or another number of tokens."
        )
    if side.head < 0 or side.head + head_count > pool.heads:
        raise ValueError(
            f"Heads [{side.head}, {side.head + head_count}) are wanted of the {name}, which has {pool.heads} heads. "
            "Pass the slice that this pool holds; for two pools of different heads, pass head_count."
        )


def _check_staged(side: Staged, pool: KVPool, *, tokens: int, head_count: int) -> None:
    staging = side.staging
    if staging.ndim != 1 or staging.dtype != torch.uint8 or not staging.is_contiguous():
        raise ValueError(
            f"The staging buffer is {staging.dtype} {tuple(staging.shape)} with strides {staging.stride()}, wanted "
            "contiguous uint8 [bytes]. Pass buffer.view(torch.uint8).flatten()."
        )
    if staging.device != pool.table.device:
        raise ValueError(f"The staging buffer is on {staging.device}, the pool on {pool.table.device}. Stage it there.")
    wanted = tokens * head_count * sum(pool.head_bytes)
    if staging.numel() < wanted:
        raise ValueError(
            f"The staging buffer has {staging.numel()} bytes, wanted {wanted}. Make it staging_bytes() long, or stage "
            "fewer tokens at a time."
        )


def _check_alike(source: KVPool, target: KVPool) -> None:
    if source.table.device != target.table.device:
        raise ValueError(
            f"The source pool is described for {source.table.device}, the target pool for {target.table.device}. "
            "Map one where the other is, and describe both for the device that copies."
        )
    if source.head_bytes != target.head_bytes:
        raise ValueError(
            f"The source has {len(source.head_bytes)} buffers with heads of {sorted(set(source.head_bytes))} bytes, "
            f"the target {len(target.head_bytes)} of {sorted(set(target.head_bytes))}. Pools exchange pages where "
            "layers, head size and dtype are the same; describe both with the same notion of a head."
        )
