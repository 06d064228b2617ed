"""Where this worker's KV pool lies and which heads it holds: the pool says so, and nothing else does on both sides.

SGLang hands a backend's manager the pool's addresses, without a device, and settings that a user may have left open
(`ServerArgs.device` is None then: what a worker resolves it to lives elsewhere). So the hook that surrounds the
manager's construction, which has the pool at hand, states both for that time, and the manager takes them from here.
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
_heads: ContextVar[tuple[int, int]] = ContextVar("prefillshare_pool_heads", default=(1, 1))


@contextmanager
def stated_by(pool: Any, *, total_heads: int) -> Iterator[None]:
    """While the block runs, `pool_device()` is where this pool's K and V are, and `pool_heads()` what they hold.

    The model has `total_heads` KV heads over all tensor-parallel ranks.
    """
    places = {buffer.device for buffer in (*getattr(pool, "k_buffer", ()), *getattr(pool, "v_buffer", ()))}
    device = _device.set(places.pop() if len(places) == 1 else None)
    heads = _heads.set((getattr(pool, "head_num", total_heads), total_heads))
    try:
        yield
    finally:
        _heads.reset(heads)
        _device.reset(device)


def pool_heads() -> tuple[int, int]:
    """The KV heads of a row of this rank's pool, and those of the model."""
    return _heads.get()


def pool_device() -> torch.device:
    """The device, a GPU with its number; `HandoffError` for a pool that is not one K and one V per layer on one."""
    device = _device.get()
    if device is None:
        raise HandoffError(
            "the prefillshare backend hands over a KV pool of one K and one V buffer per layer, all on one device, and "
            "this worker has none. Choose --disaggregation-transfer-backend nixl."
        )
    return device
