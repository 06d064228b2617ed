"""Pools between guard bytes, the cases drawn for them, and the oracle: a loop over bytes that uses no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from prefillshare_kernels.pool import KVPool

GUARD_BYTES = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
PAGE_SIZES = (1, 2, 3, 16, 64)


@dataclass(frozen=True)
class Shape:
    """One side's pool: `head_dims[b]` elements per head in buffer b. Buffers start `shift` elements off alignment."""

    dtype: torch.dtype
    head_dims: tuple[int, ...]
    heads: int
    page_size: int
    page_count: int
    shift: int = 0


class Guarded:
    """A pool of random bytes (every bit pattern, NaNs included) with guard bytes around each of its buffers."""

    def __init__(self, shape: Shape, device: torch.device, *, seed: int) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        slots = shape.page_size * shape.page_count
        self.start = GUARD_BYTES + shape.shift * shape.dtype.itemsize
        self.head_bytes = [dim * shape.dtype.itemsize for dim in shape.head_dims]
        self.storage: list[torch.Tensor] = []
        self.buffers: list[torch.Tensor] = []
        for dim, head_bytes in zip(shape.head_dims, self.head_bytes, strict=True):
            size = slots * shape.heads * head_bytes
            storage = torch.randint(256, (self.start + size + GUARD_BYTES,), generator=generator, dtype=torch.uint8)
            self.storage.append(storage.to(device))
            inner = self.storage[-1][self.start : self.start + size]
            self.buffers.append(inner.view(shape.dtype).view(slots, shape.heads, dim))

    def pool(self) -> KVPool:
        return KVPool.from_tensors(self.buffers, page_size=self.shape.page_size)

    def bytes(self) -> list[bytearray]:
        """All that could be written to, guards included."""
        return [bytearray(storage.cpu().numpy().tobytes()) for storage in self.storage]

    def head_at(self, buffer: int, pages: Sequence[int], token: int, head: int) -> slice:
        """Where in `bytes()[buffer]` a head of a logical token lies."""
        slot = pages[token // self.shape.page_size] * self.shape.page_size + token % self.shape.page_size
        start = self.start + (slot * self.shape.heads + head) * self.head_bytes[buffer]
        return slice(start, start + self.head_bytes[buffer])


@dataclass(frozen=True)
class Case:
    """One copy: `tokens` tokens and `head_count` heads, from and onto the given places."""

    source: Shape
    target: Shape
    tokens: int
    source_pages: tuple[int, ...]
    target_pages: tuple[int, ...]
    source_first: int = 0
    target_first: int = 0
    source_head: int = 0
    target_head: int = 0
    head_count: int = 1
    page_dtype: torch.dtype = field(default=torch.int32)

    def page_lists(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        source, target = (
            torch.tensor(pages, dtype=self.page_dtype, device=device)
            for pages in (self.source_pages, self.target_pages)
        )
        return source, target


def copied(case: Case, source: Guarded, target: Guarded) -> list[bytearray]:
    """What the target's memory must hold after the copy."""
    read, expected = source.bytes(), target.bytes()
    for buffer, onto in enumerate(expected):
        for token in range(case.tokens):
            for head in range(case.head_count):
                src = source.head_at(buffer, case.source_pages, case.source_first + token, case.source_head + head)
                dst = target.head_at(buffer, case.target_pages, case.target_first + token, case.target_head + head)
                onto[dst] = read[buffer][src]
    return expected


def gathered(case: Case, source: Guarded) -> bytes:
    """What staging memory must hold: [buffer][token][head_count heads] of the case's source."""
    read, staged = source.bytes(), bytearray()
    for buffer, whole in enumerate(read):
        for token in range(case.tokens):
            for head in range(case.head_count):
                staged += whole[
                    source.head_at(buffer, case.source_pages, case.source_first + token, case.source_head + head)
                ]
    return bytes(staged)


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any two pools that can exchange pages, with lists in any order; a source page may serve several times."""
    dtype = draw(st.sampled_from(DTYPES))
    dims = st.sampled_from((1, 3, 8, 16, 36, 64))
    buffers = draw(st.integers(1, 3))
    is_uniform = draw(st.booleans())
    head_dims = (draw(dims),) * buffers if is_uniform else tuple(draw(dims) for _ in range(buffers))
    head_count = draw(st.integers(1, 3))
    source_head, target_head = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    tokens = draw(st.integers(0, 40))
    sides: list[tuple[Shape, tuple[int, ...], int]] = []
    for head, is_target in ((source_head, False), (target_head, True)):
        page_size = draw(st.sampled_from(PAGE_SIZES))
        first = draw(st.one_of(st.just(0), st.integers(0, 20)))
        wanted = pages_for(first + tokens, page_size)
        page_count = wanted + draw(st.integers(0 if wanted else 1, 2))
        if is_target:
            pages = draw(st.permutations(range(page_count)))[:wanted]
        else:
            pages = draw(st.lists(st.integers(0, page_count - 1), min_size=wanted, max_size=wanted))
        heads = head + head_count + draw(st.integers(0, 1))
        shift = draw(st.sampled_from((0, 0, 1, 4)))
        sides.append((Shape(dtype, head_dims, heads, page_size, page_count, shift), tuple(pages), first))
    (source, source_pages, source_first), (target, target_pages, target_first) = sides
    return Case(
        source=source,
        target=target,
        tokens=tokens,
        source_pages=source_pages,
        target_pages=target_pages,
        source_first=source_first,
        target_first=target_first,
        source_head=source_head,
        target_head=target_head,
        head_count=head_count,
        page_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
    )


def model_case(
    head_dims: Sequence[int],
    heads: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 19,
    page_sizes: tuple[int, int] = (1, 16),
) -> Case:
    """A model's whole rows, pages last to first on one side; the last page is partly filled where its size allows."""
    counts = [pages_for(tokens, size) for size in page_sizes]
    source, target = (
        Shape(dtype, tuple(head_dims), heads, size, count) for size, count in zip(page_sizes, counts, strict=True)
    )
    return Case(
        source=source,
        target=target,
        tokens=tokens,
        source_pages=tuple(reversed(range(counts[0]))),
        target_pages=tuple(range(counts[1])),
        head_count=heads,
    )


MODELS = {
    "Llama-3.1-8B: several tiles of tokens": model_case([128] * 2, 8),
    "SmolLM2: rows of 48 words": model_case([64] * 2, 3, page_sizes=(16, 1)),
    "SmolLM2: more tokens than one tile": model_case([64], 3, tokens=130, page_sizes=(64, 16)),
    "MLA: rows of 144 words": model_case([576] * 2, 1, page_sizes=(64, 64)),
    "MLA fp8 with scales: rows of 656 bytes": model_case([656], 1, dtype=torch.float8_e4m3fn, page_sizes=(64, 1)),
    "K wider than V": model_case([192, 192, 128, 128], 4, page_sizes=(16, 16)),
    "rows wider than a program's tile": model_case([1024], 5, dtype=torch.float32, tokens=3, page_sizes=(1, 2)),
}
