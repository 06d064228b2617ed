"""The shape of a KV pool as two processes must agree on it before a byte moves."""

from __future__ import annotations

import msgspec

from sglang_prefillshare.errors import HandoffError


class KVGeometry(msgspec.Struct, frozen=True):
    """One entry per buffer, K of layer 0..L-1 and then V of layer 0..L-1, as SGLang registers them.

    `page_bytes[i]` is the size of one page in buffer i; `page_size` its length in tokens.
    """

    page_size: int
    kv_dtype: str
    page_bytes: tuple[int, ...]

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
        if self.page_bytes != other.page_bytes:
            raise HandoffError(
                f"{theirs} keeps {len(other.page_bytes)} KV buffers of {sorted(set(other.page_bytes))} bytes per page, "
                f"{mine} {len(self.page_bytes)} of {sorted(set(self.page_bytes))}: the models have different shapes. "
                "A decode module must be fine-tuned from the base that prefills for it."
            )
