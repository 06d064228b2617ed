"""Where this worker's KV pool lies: its tensors say so, and nothing else does.

SGLang hands a backend's manager the pool's addresses, without a device, and settings that a user may have left open
(`ServerArgs.device` is None then: what a worker resolves it to lives elsewhere). So the hook that surrounds the
manager's construction, which has the pool at hand, states the device for that time, and the manager takes it from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sglang_prefillshare.errors import HandoffError

if TYPE_CHECKING:
    import torch

_device: ContextVar[torch.device | None] = ContextVar("prefillshare_pool_device", default=None)


@contextmanager
def stated_by(pool: Any) -> Iterator[None]:
    """While the block runs, `pool_device()` is where this pool's K and V are."""
    places = {buffer.device for buffer in (*getattr(pool, "k_buffer", ()), *getattr(pool, "v_buffer", ()))}
    token = _device.set(places.pop() if len(places) == 1 else None)
    try:
        yield
    finally:
        _device.reset(token)


def pool_device() -> torch.device:
    """The device, a GPU with its number; `HandoffError` for a pool that is not one K and one V per layer on one."""
    device = _device.get()
    if device is None:
        raise HandoffError(
            "the prefillshare backend hands over a KV pool of one K and one V buffer per layer, all on one device, and "
            "this worker has none. Choose --disaggregation-transfer-backend nixl."
        )
    return device
