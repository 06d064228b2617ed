"""The shape of a KV pool as two processes must agree on it before a byte moves."""

from __future__ import annotations

import msgspec

from sglang_prefillshare.errors import HandoffError


class KVGeometry(msgspec.Struct, frozen=True):
    """One entry per buffer, K of layer 0..L-1 and then V of layer 0..L-1, as SGLang registers them.

    `page_bytes[i]` is the size of one page in buffer i; `page_size` its length in tokens. A token's row has `heads` KV
    heads, of the `total_heads` that the model has over all tensor-parallel ranks.
    """

    page_size: int
    kv_dtype: str
    page_bytes: tuple[int, ...]
    heads: int = 1
    total_heads: int = 1

    @property
    def bytes_per_page(self) -> int:
        """Bytes that one page takes over all layers, K and V."""
        return sum(self.page_bytes)

    def check_same(self, other: KVGeometry, *, mine: str, theirs: str) -> None:
        """Raise `HandoffError` naming the first thing in which two pools differ."""
        for field in ("page_size", "kv_dtype"):
            ours, found = getattr(self, field), getattr(other, field)
            if ours != found:
                raise HandoffError(
                    f"{theirs} has {field} {found}, {mine} has {ours}. Start both with the same "
                    f"{'--page-size' if field == 'page_size' else '--dtype and --kv-cache-dtype'}."
                )
        if self._shape() != other._shape():
            raise HandoffError(
                f"{theirs} keeps {len(other.page_bytes)} KV buffers of {sorted(set(other.page_bytes))} bytes per page, "
                f"{mine} {len(self.page_bytes)} of {sorted(set(self.page_bytes))}: the models have different shapes. "
                "A decode module must be fine-tuned from the base that prefills for it."
            )

    def _shape(self) -> tuple[int, tuple[float, ...]]:
        """What ranks of any width have in common: the heads in all, and the size of a page's part for one head."""
        return self.total_heads, tuple(size / self.heads for size in self.page_bytes)
