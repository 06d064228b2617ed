"""GPU memory that another process of this host can map: CUDA IPC, for pools on one GPU or on GPUs that are peers.

The driver exports whole allocations; a KV buffer is a place in one. What it cannot export (memory that was reserved
and mapped in pieces, as PyTorch's expandable segments and SGLang's memory saver do) is refused with the setting to
change. The importer maps into a device of its own, which may be another one than the exporter's.

The driver works on the context that is current in the calling thread, and a new thread has none. So every call here is
made with the device's primary context (the one that PyTorch uses) current, whichever thread asks.
"""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.memory import CHOOSE_NIXL

CANNOT_EXPORT: Final = (
    "cannot export its KV pool over CUDA IPC: {error}. Unset expandable_segments in PYTORCH_ALLOC_CONF and "
    f"--enable-memory-saver, or {CHOOSE_NIXL}."
)
NO_IPC: Final = (
    "cannot export its KV pool: {error}. This GPU's driver offers no CUDA IPC (a virtual GPU, a slice of one, WSL, "
    f"Tegra): {CHOOSE_NIXL}."
)
CANNOT_MAP: Final = (
    "cannot map the prefill worker's KV pool from GPU {uuid}: {error}. Both GPUs must be on this host and be peers "
    "(nvidia-smi topo -p2p r), and containers must share the IPC namespace (--ipc host); otherwise choose nixl."
)
HIDDEN: Final = (
    "cannot map the prefill worker's KV pool from GPU {uuid}: {error}, and CUDA_VISIBLE_DEVICES={visible} hides that "
    "GPU from this worker. Show both workers both GPUs and tell them apart by --base-gpu-id, or choose "
    "--disaggregation-transfer-backend nixl."
)
NO_PEERS: Final = (
    "cannot map the prefill worker's KV pool: its GPU {uuid} and GPU {own} of this worker are no peers (nvidia-smi "
    f"topo -p2p r). Start both workers on one GPU or on peers, or {CHOOSE_NIXL}."
)
NO_DRIVER: Final = (
    "the library of the NVIDIA driver cannot be loaded: {error} Install the driver, start the container with the "
    f"GPUs' driver in it (--gpus all), or {CHOOSE_NIXL}."
)
_NOT_SUPPORTED: Final = "CUDA_ERROR_NOT_SUPPORTED"
_BUSY: Final = ("CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_DEVICE_UNAVAILABLE")


class DriverError(HandoffError):
    """A call of the driver did not succeed; `status` is its name of the reason."""

    def __init__(self, function: str, status: str) -> None:
        super().__init__(f"{function} returned {status}")
        self.status = status

    @property
    def is_for_want_of_room(self) -> bool:
        """Whether the GPU had no memory, or (in exclusive mode) no place, for another process: nothing is proved."""
        return self.status in _BUSY


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
        except DriverError as error:
            reason = NO_IPC if error.status == _NOT_SUPPORTED else CANNOT_EXPORT
            raise HandoffError("this prefill worker " + reason.format(error=error)) from error


class CudaMapping:
    """Allocations of another process, mapped for a device of this one until `close`.

    `device_uuid` is the exporter's GPU. Raises `HandoffError` that names what stands between the two GPUs, as far as
    this process can see it, and the setting to change.
    """

    def __init__(self, handles: Sequence[bytes], *, device: int, device_uuid: str) -> None:
        driver = _driver()
        self.bases: list[int] = []
        self._device = device
        reached = reachable_gpus(device)
        if not reached.get(device_uuid, True):
            raise HandoffError(
                "this decode worker " + NO_PEERS.format(uuid=device_uuid, own=_uuid_of(device, driver=driver))
            )
        try:
            with on_device(device):
                for raw in handles:
                    handle = driver.CUipcMemHandle()
                    handle.reserved = raw
                    flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
                    self.bases.append(int(_call(driver.cuIpcOpenMemHandle, handle, flags)[0]))
        except (HandoffError, ValueError) as error:
            self.close()
            if isinstance(error, DriverError) and error.is_for_want_of_room:
                raise
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            reason = HIDDEN if device_uuid not in reached and visible is not None else CANNOT_MAP
            text = reason.format(uuid=device_uuid, error=error, visible=visible)
            raise HandoffError("this decode worker " + text) from error

    def close(self) -> None:
        """Unmap; what the driver says to it changes nothing: the memory may have gone with its process."""
        if not self.bases:
            return
        driver = _driver()
        with on_device(self._device):
            while self.bases:
                with suppress(HandoffError):
                    _call(driver.cuIpcCloseMemHandle, self.bases.pop())


class CudaBuffer:
    """`size` bytes of a device of this process, an allocation of their own until `close`."""

    def __init__(self, size: int, *, device: int) -> None:
        self._device = device
        with on_device(device):
            self.address = int(_call(_driver().cuMemAlloc, size)[0])

    def close(self) -> None:
        with on_device(self._device):
            _call(_driver().cuMemFree, self.address)


def read(addresses: Sequence[int], sizes: Sequence[int], *, device: int) -> bytes:
    """The bytes that lie at device addresses, a peer's mapped ones among them, one range after the other.

    They come by way of memory of this device, as in a handoff, after everything that is under way on the device.
    """
    driver = _driver()
    content = bytearray(sum(sizes))
    buffer = CudaBuffer(len(content), device=device)
    try:
        with on_device(device):
            _call(driver.cuCtxSynchronize)
            at = buffer.address
            for address, size in zip(addresses, sizes, strict=True):
                _call(driver.cuMemcpyDtoD, at, address, size)
                at += size
            here = (ctypes.c_char * len(content)).from_buffer(content)
            _call(driver.cuMemcpyDtoH, ctypes.addressof(here), buffer.address, len(content))
    finally:
        buffer.close()
    return bytes(content)


def write(content: bytes, addresses: Sequence[int], sizes: Sequence[int], *, device: int) -> None:
    """The reverse of `read`: `content` goes to device addresses of this process, and is there on return."""
    driver = _driver()
    source = ctypes.create_string_buffer(content, len(content))
    with on_device(device):
        _call(driver.cuCtxSynchronize)
        at = ctypes.addressof(source)
        for address, size in zip(addresses, sizes, strict=True):
            _call(driver.cuMemcpyHtoD, address, at, size)
            at += size
        _call(driver.cuCtxSynchronize)


def device_uuid(device: int) -> str:
    """The UUID of a CUDA device as this process numbers it."""
    driver = _driver()
    _call(driver.cuInit, 0)
    return _uuid_of(device, driver=driver)


def reachable_gpus(device: int) -> dict[str, bool]:
    """Of every GPU that this process sees, by UUID, whether CUDA device `device`, itself or its peer, can read it."""
    driver = _driver()
    _call(driver.cuInit, 0)
    own = _call(driver.cuDeviceGet, device)[0]
    found: dict[str, bool] = {}
    for ordinal in range(int(_call(driver.cuDeviceGetCount)[0])):
        is_own = ordinal == device
        other = own if is_own else _call(driver.cuDeviceGet, ordinal)[0]
        found[_uuid_of(ordinal, driver=driver)] = is_own or bool(_call(driver.cuDeviceCanAccessPeer, own, other)[0])
    return found


def _uuid_of(device: int, *, driver: Any) -> str:
    handle = _call(driver.cuDeviceGet, device)[0]
    return str(uuid.UUID(bytes=bytes(_call(driver.cuDeviceGetUuid, handle)[0].bytes)))


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
    """Call the driver; its first value is a status, an error raises `DriverError`, the others are returned."""
    try:
        status, *values = function(*arguments)
    except RuntimeError as error:  # of cuda-python, which looks for the driver's library at the first call
        raise HandoffError(NO_DRIVER.format(error=error)) from error
    if int(status) != 0:
        raise DriverError(function.__name__, status.name)
    return tuple(values)
