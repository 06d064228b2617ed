"""SGLang's multi-head KV pool with its storage in memory that decode workers of this host can map."""

from __future__ import annotations

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_prefillshare.handoff.memory import SharedRegion, align


class SharedMHATokenToKVPool(MHATokenToKVPool):
    """K and V of every layer as views of one `SharedRegion`; the token-slot layout is SGLang's own."""

    def _create_buffers_normal(self) -> None:
        k_shape, v_shape = self._kv_buffer_shapes()
        itemsize = self.store_dtype.itemsize
        k_bytes, v_bytes = (align(_element_count(shape) * itemsize) for shape in (k_shape, v_shape))
        self._shared_region = SharedRegion.create((k_bytes + v_bytes) * self.layer_num, name="prefillshare-kv")
        starts = [layer * (k_bytes + v_bytes) for layer in range(self.layer_num)]
        view = self._shared_region.tensor
        self.k_buffer = [view(start, tuple(k_shape), self.store_dtype) for start in starts]
        self.v_buffer = [view(start + k_bytes, tuple(v_shape), self.store_dtype) for start in starts]


def _element_count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
