"""Mapping the KV pool that a prefill worker offers: shared memory of the host, or of a GPU."""

from __future__ import annotations

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.cuda_memory import CudaMapping
from sglang_prefillshare.handoff.memory import RegionHandle, SharedRegion
from sglang_prefillshare.handoff.messages import HostMemory, Pool
from sglang_prefillshare.handoff.pool import PoolView


def map_pool(offer: Pool, *, device: int | None) -> PoolView:
    """Map it for a CUDA device of this process, or (None) into host memory; the view's `owner` keeps it mapped.

    Raises `HandoffError` if it cannot be mapped, or does not lie where it says.
    """
    memory, page_bytes = offer.memory, offer.geometry.page_bytes
    if isinstance(memory, HostMemory) != (device is None):
        raise HandoffError("prefill and decode keep their KV on different kinds of device. Start both on the same.")
    if isinstance(memory, HostMemory):
        for offset, size in zip(memory.offsets, page_bytes, strict=True):
            if offset + size * offer.page_count > memory.region_bytes:
                raise HandoffError(f"a buffer at {offset} does not fit the prefill worker's region.")
        region = SharedRegion.attach(RegionHandle(offer.pid, offer.started, fd=memory.fd, size=memory.region_bytes))
        addresses = [region.address + offset for offset in memory.offsets]
        return PoolView.at(addresses, page_bytes, offer.page_count, owner=region)
    assert device is not None
    mapping = CudaMapping(memory.handles, device=device, device_uuid=memory.device_uuid)
    addresses = [mapping.bases[allocation] + offset for allocation, offset in memory.buffers]
    return PoolView.at(addresses, page_bytes, offer.page_count, owner=mapping)
