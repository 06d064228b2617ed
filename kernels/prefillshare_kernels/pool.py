"""`KVPool`: where the rows of a paged KV cache lie, for a kernel that runs on one device.

Owns no memory. Which pages belong to whom, and when they may be read or written, is left to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import gcd
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

VECTOR_BYTES: Final = 16
"""The widest access of one GPU thread; alignment beyond it gains nothing."""


@dataclass(frozen=True, slots=True)
class KVPool:
    """Buffers of equally many rows, one row per token: K and V of every layer, or one buffer per layer for MLA.

    Row `page * page_size + i` of every buffer belongs to token `i` of that page. Rows lie back to back; a row is
    `heads` heads of equal size, back to back. `heads` is 1 where rows have none (MLA), or where only whole rows move.

    `addresses[b]` and `row_bytes[b]` describe buffer b; row widths may differ between buffers. `device` is the one
    whose kernels use the addresses, which may lie in memory of another process or another device that is mapped here.
    The memory is borrowed: whoever builds a pool keeps it mapped until the last kernel that uses it has ended.

    `table` is int64 [buffers, 3] on `device`: the address, the bytes of one head, and the sum of the latter over the
    buffers before it. `alignment_bytes` is the largest power of two up to 16 that divides every address and row.
    """

    addresses: tuple[int, ...]
    row_bytes: tuple[int, ...]
    page_size: int
    page_count: int
    device: torch.device
    heads: int = 1
    head_bytes: tuple[int, ...] = field(init=False, compare=False)
    alignment_bytes: int = field(init=False, compare=False)
    table: torch.Tensor = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.addresses or len(self.addresses) != len(self.row_bytes):
            raise ValueError(
                f"A pool has {len(self.addresses)} addresses and {len(self.row_bytes)} row widths; it needs one of "
                "each for every buffer, and at least one buffer. Pass addresses and row_bytes in the same order."
            )
        for name, value in (("page_size", self.page_size), ("heads", self.heads)):
            if value < 1:
                raise ValueError(f"{name} is {value}, a pool needs at least 1. Take it from the pool's owner.")
        if self.page_count < 0:
            raise ValueError(
                f"page_count is {self.page_count}, a pool needs at least 0. Take it from the pool's owner."
            )
        for buffer, (address, width) in enumerate(zip(self.addresses, self.row_bytes, strict=True)):
            if not 0 < address < 1 << 63:
                raise ValueError(f"Buffer {buffer} lies at address {address:#x}, which is none. Pass its data_ptr().")
            if width < 1 or width % self.heads:
                raise ValueError(
                    f"Rows of buffer {buffer} are {width} bytes wide, which must be a positive multiple of the number "
                    f"of heads, {self.heads}. Pass the width of a row in bytes, and heads=1 to copy whole rows only."
                )
        per_head = tuple(width // self.heads for width in self.row_bytes)
        before = list(accumulate(per_head, initial=0))[:-1]
        rows = list(zip(self.addresses, per_head, before, strict=True))
        object.__setattr__(self, "head_bytes", per_head)
        object.__setattr__(self, "alignment_bytes", gcd(VECTOR_BYTES, *self.addresses, *self.row_bytes))
        object.__setattr__(self, "table", torch.tensor(rows, dtype=torch.int64, device=self.device))

    @classmethod
    def from_tensors(cls, buffers: Sequence[torch.Tensor], *, page_size: int) -> KVPool:
        """Describe `buffers`, each [slots, heads, head_dim] or [slots, head_dim] (one head) of any dtype.

        They are contiguous, on one device, and agree in slots and heads; slots is a multiple of `page_size`.
        Raises `ValueError` otherwise. The pool does not keep the tensors alive.
        """
        if not buffers:
            raise ValueError("A pool of 0 buffers was given, it needs at least 1. Pass the K and V buffers in order.")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}, a pool needs at least 1. Take it from the pool's owner.")
        for number, tensor in enumerate(buffers):
            if tensor.ndim not in (2, 3) or not tensor.is_contiguous() or tensor.numel() == 0:
                raise ValueError(
                    f"Buffer {number} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, wanted contiguous "
                    "[slots, heads, head_dim] with at least one element. Describe any other layout by its addresses."
                )
        shapes = [(tensor.shape[0], tensor.shape[1] if tensor.ndim == 3 else 1) for tensor in buffers]
        for number, (tensor, shape) in enumerate(zip(buffers, shapes, strict=True)):
            if shape != shapes[0] or tensor.device != buffers[0].device:
                raise ValueError(
                    f"Buffer {number} has {shape[0]} slots and {shape[1]} heads on {tensor.device}, buffer 0 has "
                    f"{shapes[0][0]} and {shapes[0][1]} on {buffers[0].device}. Make a pool of each kind."
                )
        slots, heads = shapes[0]
        if slots % page_size:
            raise ValueError(
                f"The buffers have {slots} slots, which is no multiple of the page size, {page_size}. "
                "Pass whole pages: buffer[: pages * page_size]."
            )
        return cls(
            addresses=tuple(tensor.data_ptr() for tensor in buffers),
            row_bytes=tuple(tensor[0].numel() * tensor.element_size() for tensor in buffers),
            page_size=page_size,
            page_count=slots // page_size,
            device=buffers[0].device,
            heads=heads,
        )


def check_pages(
    pages: Sequence[int] | npt.NDArray[np.integer], pool: KVPool, *, whose: str, are_distinct: bool = False
) -> None:
    """Raise `ValueError` for a page outside [0, page_count), and with `are_distinct` for one that occurs twice.

    For lists in host memory. The launchers cannot look into a list on the GPU without waiting for it: check there
    where the list is made. Pages that are written to must be distinct.
    """
    numbers = np.asarray(pages, dtype=np.int64)
    if numbers.size == 0:
        return
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= pool.page_count:
        raise ValueError(
            f"{whose} names page {low if low < 0 else high}, wanted pages in [0, {pool.page_count}). "
            "Take the list from the allocator of this pool."
        )
    if are_distinct:
        values, counts = np.unique(numbers, return_counts=True)
        if len(values) < numbers.size:
            raise ValueError(
                f"{whose} names page {int(values[counts.argmax()])} {int(counts.max())} times, and it can be written "
                "to once. Take the list from the allocator of this pool."
            )
