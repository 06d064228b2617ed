"""GPU memory that another process of this host can map: CUDA IPC, for pools on one GPU or on GPUs that are peers.

The driver exports whole allocations; a KV buffer is a place in one. What it cannot export (memory that was reserved
and mapped in pieces, as PyTorch's expandable segments and SGLang's memory saver do) is refused with the setting to
change. The importer maps into a device of its own, which may be another one than the exporter's.

The driver works on the context that is current in the calling thread, and a new thread has none. So every call here is
made with the device's primary context (the one that PyTorch uses) current, whichever thread asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from sglang_prefillshare.errors import HandoffError

CANNOT_EXPORT: Final = (
    "cannot export its KV pool over CUDA IPC: {error}. Unset expandable_segments in PYTORCH_ALLOC_CONF and "
    "--enable-memory-saver, or choose --disaggregation-transfer-backend nixl."
)
CANNOT_MAP: Final = (
    "cannot map the prefill worker's KV pool from GPU {uuid}: {error}. Both GPUs must be on this host and be peers "
    "(nvidia-smi topo -p2p r), and containers must share the IPC namespace; otherwise choose nixl."
)


@contextmanager
def on_device(device: int) -> Iterator[None]:
    """Have the primary context of CUDA device `device`, as this process numbers it, current in this thread.

    What the runtime (PyTorch, Triton) does in the block is done on that device, too. Raises `HandoffError` where there
    is no such device, no driver or no `cuda-python`.
    """
    driver = _driver()
    _call(driver.cuInit, 0)
    handle = _call(driver.cuDeviceGet, device)[0]
    context = _call(driver.cuDevicePrimaryCtxRetain, handle)[0]
    try:
        _call(driver.cuCtxPushCurrent, context)
        try:
            yield
        finally:
            _call(driver.cuCtxPopCurrent)
    finally:
        _call(driver.cuDevicePrimaryCtxRelease, handle)


class CudaAllocations:
    """Allocations of this process on one device, exported once each."""

    def __init__(self, addresses: Sequence[int], *, device: int) -> None:
        self.handles: list[bytes] = []
        self.places: list[tuple[int, int]] = []
        """For each address: (index of its allocation in `handles`, byte offset in it)."""
        bases: dict[int, int] = {}
        driver = _driver()
        try:
            with on_device(device):
                for address in addresses:
                    base = int(_call(driver.cuMemGetAddressRange, address)[0])
                    if base not in bases:
                        handle = _call(driver.cuIpcGetMemHandle, base)[0]
                        bases[base] = len(self.handles)
                        self.handles.append(bytes(handle.reserved))
                    self.places.append((bases[base], address - base))
        except HandoffError as error:
            raise HandoffError("this prefill worker " + CANNOT_EXPORT.format(error=error)) from error


class CudaMapping:
    """Allocations of another process, mapped for a device of this one until `close`."""

    def __init__(self, handles: Sequence[bytes], *, device: int, device_uuid: str) -> None:
        driver = _driver()
        self.bases: list[int] = []
        self._device = device
        try:
            with on_device(device):
                for raw in handles:
                    handle = driver.CUipcMemHandle()
                    handle.reserved = raw
                    flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
                    self.bases.append(int(_call(driver.cuIpcOpenMemHandle, handle, flags)[0]))
        except (HandoffError, ValueError) as error:
            self.close()
            raise HandoffError("this decode worker " + CANNOT_MAP.format(uuid=device_uuid, error=error)) from error

    def close(self) -> None:
        """Unmap; what the driver says to it changes nothing: the memory may have gone with its process."""
        if not self.bases:
            return
        driver = _driver()
        with on_device(self._device):
            while self.bases:
                with suppress(HandoffError):
                    _call(driver.cuIpcCloseMemHandle, self.bases.pop())


def device_uuid(device: int) -> str:
    """The UUID of a CUDA device as this process numbers it."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise HandoffError(
            "the package cuda-python is not installed, which SGLang's CUDA stack brings. Install it, or choose "
            "--disaggregation-transfer-backend nixl."
        ) from error
    return driver


def _call(function: Any, *arguments: Any) -> tuple[Any, ...]:
    """Call the driver; its first value is a status, an error raises `HandoffError`, the others are returned."""
    status, *values = function(*arguments)
    if int(status) != 0:
        raise HandoffError(f"{function.__name__} returned {status.name}")
    return tuple(values)
