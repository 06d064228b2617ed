"""A CUDA driver without a GPU, as `cuda-python` shows it: contexts by thread, allocations by device, IPC by handle.

It is as strict as the real one was on an H100: a thread without a current context can ask for nothing, memory is on
the device of the current context, and what was mapped can be closed once. What is copied really moves, between
addresses of this process: an allocation that is copied from or to must lie where something is.
"""

from __future__ import annotations

import ctypes
import enum
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from sglang_prefillshare.handoff import proof

HANDLE_BYTES: Final = 64
MAPPED_AT: Final = 1 << 40
"""How much higher than its exporter an importer sees an allocation."""


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_PEER_ACCESS_UNSUPPORTED = 217
    CUDA_ERROR_NOT_SUPPORTED = 801


class CUipcMemHandle:
    """64 opaque bytes; any other number of them is a ValueError, as in cuda-python."""

    def __init__(self) -> None:
        self._reserved = bytes(HANDLE_BYTES)

    @property
    def reserved(self) -> bytes:
        return self._reserved

    @reserved.setter
    def reserved(self, value: bytes) -> None:
        if len(value) != HANDLE_BYTES:
            raise ValueError(f"reserved length must be {HANDLE_BYTES}, is {len(value)}")
        self._reserved = value


class CUipcMem_flags(enum.IntEnum):
    CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1


class CUuuid:
    def __init__(self, raw: bytes) -> None:
        self.bytes = raw


def uuid_bytes(device: int) -> bytes:
    """The UUID of the stand-in's device."""
    return bytes([0xAB] * 15 + [device])


def uuid_of(device: int) -> str:
    """The same, as it is written."""
    return str(uuid.UUID(bytes=uuid_bytes(device)))


def handle_of(base: int) -> bytes:
    """What the allocation at `base` is exported as."""
    return base.to_bytes(HANDLE_BYTES, "little")


class FakeDriver:
    """GPUs with allocations (base, size); every function returns a status and what it was asked for.

    `calls` has, for every call that concerns memory, its name and the device on whose context it was made.
    """

    CUipcMemHandle = CUipcMemHandle
    CUipcMem_flags = CUipcMem_flags

    def __init__(
        self,
        allocations: Mapping[int, Sequence[tuple[int, int]]],
        *,
        are_peers: bool = True,
        has_ipc: bool = True,
    ) -> None:
        self.allocations = {device: list(places) for device, places in allocations.items()}
        self.are_peers = are_peers
        self.has_ipc = has_ipc
        self.cannot_export: set[int] = set()
        self.cannot_open: set[int] = set()
        self.calls: list[tuple[str, int]] = []
        self.is_full = False
        self.exported: list[int] = []
        self.mapped: list[int] = []
        self.closed: list[int] = []
        self.retained: dict[int, int] = {}
        self._buffers: dict[int, Any] = {}
        self._current = threading.local()

    # ---- devices and contexts: the context of device n is n + 1000, retained as often as it was asked for

    def cuInit(self, _flags: int) -> tuple[Any, ...]:
        return (CUresult.CUDA_SUCCESS if self.allocations else CUresult.CUDA_ERROR_NO_DEVICE,)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, len(self.allocations)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        if ordinal not in self.allocations:
            return CUresult.CUDA_ERROR_INVALID_DEVICE, None
        return CUresult.CUDA_SUCCESS, ordinal

    def cuDeviceGetUuid(self, device: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, CUuuid(uuid_bytes(device))

    def cuDeviceCanAccessPeer(self, device: int, peer: int) -> tuple[Any, ...]:
        assert device != peer
        return CUresult.CUDA_SUCCESS, int(self.are_peers)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        self.retained[device] = self.retained.get(device, 0) + 1
        return CUresult.CUDA_SUCCESS, device + 1000

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:
        assert self.retained.get(device, 0) > 0, "released more often than retained"
        self.retained[device] -= 1
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:
        assert self.retained.get(context - 1000), "a context that nobody retains"
        self._stack().append(context - 1000)
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        if not self._stack():
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        return CUresult.CUDA_SUCCESS, self._stack().pop() + 1000

    def current(self) -> int | None:
        """The device whose context is current in the calling thread."""
        return self._stack()[-1] if self._stack() else None

    def _stack(self) -> list[int]:
        if not hasattr(self._current, "stack"):
            self._current.stack = []
        stack: list[int] = self._current.stack
        return stack

    def _on_device(self, name: str) -> int | None:
        device = self.current()
        if device is not None:
            self.calls.append((name, device))
        return device

    # ---- memory

    def cuMemGetAddressRange(self, address: int) -> tuple[Any, ...]:
        device = self._on_device("cuMemGetAddressRange")
        if device is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None, None
        for base, size in self.allocations[device]:
            if base <= address < base + size:
                return CUresult.CUDA_SUCCESS, base, size
        return CUresult.CUDA_ERROR_INVALID_VALUE, None, None

    def cuIpcGetMemHandle(self, base: int) -> tuple[Any, ...]:
        if self._on_device("cuIpcGetMemHandle") is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        if not self.has_ipc:
            return CUresult.CUDA_ERROR_NOT_SUPPORTED, None
        if base in self.cannot_export:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        self.exported.append(base)
        handle = CUipcMemHandle()
        handle.reserved = handle_of(base)
        return CUresult.CUDA_SUCCESS, handle

    def cuIpcOpenMemHandle(self, handle: CUipcMemHandle, flags: int) -> tuple[Any, ...]:
        assert flags == CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        if self._on_device("cuIpcOpenMemHandle") is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        base = int.from_bytes(handle.reserved, "little")
        if base in self.cannot_open:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        self.mapped.append(base + MAPPED_AT)
        return CUresult.CUDA_SUCCESS, base + MAPPED_AT

    def cuIpcCloseMemHandle(self, base: int) -> tuple[Any, ...]:
        if self._on_device("cuIpcCloseMemHandle") is None:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        assert base in self.mapped, "only what was mapped can be closed, and once"
        self.mapped.remove(base)
        self.closed.append(base)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:
        device = self._on_device("cuMemAlloc")
        if device is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        if self.is_full:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        buffer = ctypes.create_string_buffer(size)
        base = ctypes.addressof(buffer)
        self._buffers[base] = buffer
        self.allocations[device].append((base, size))
        return CUresult.CUDA_SUCCESS, base

    def cuMemFree(self, base: int) -> tuple[Any, ...]:
        device = self._on_device("cuMemFree")
        if device is None:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        del self._buffers[base]
        self.allocations[device] = [place for place in self.allocations[device] if place[0] != base]
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        return (CUresult.CUDA_ERROR_INVALID_CONTEXT if self.current() is None else CUresult.CUDA_SUCCESS,)

    def cuMemcpyDtoD(self, target: int, source: int, size: int) -> tuple[Any, ...]:
        return self._copy("cuMemcpyDtoD", self._here(target, size), self._here(source, size), size)

    def cuMemcpyDtoH(self, target: int, source: int, size: int) -> tuple[Any, ...]:
        return self._copy("cuMemcpyDtoH", target, self._here(source, size), size)

    def cuMemcpyHtoD(self, target: int, source: int, size: int) -> tuple[Any, ...]:
        return self._copy("cuMemcpyHtoD", self._here(target, size), source, size)

    def _copy(self, name: str, target: int | None, source: int | None, size: int) -> tuple[Any, ...]:
        if self._on_device(name) is None:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        if target is None or source is None:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        ctypes.memmove(target, source, size)
        return (CUresult.CUDA_SUCCESS,)

    def _here(self, address: int, size: int) -> int | None:
        """Where the bytes at an address of the device, or of a mapping, really are; None if they are nobody's."""
        places = [place for device in self.allocations.values() for place in device]
        for base, length in places:
            for shift in (0, MAPPED_AT) if base + MAPPED_AT in self.mapped else (0,):
                if base + shift <= address and address + size <= base + shift + length:
                    return address - shift
        return None


class PeerInAThread(proof.Peer):
    """The process that a handoff is tried with, as a thread of this one: it has the stand-in's GPUs, too."""

    def __init__(self, *, env: Mapping[str, str] | None = None) -> None:
        self._kept: Any = None

    def _exchange(self, question: proof.Question) -> proof.Answer:
        with ThreadPoolExecutor(1) as thread:
            answer, self._kept = thread.submit(proof.serve, question).result()
        return answer

    def __exit__(self, *_: object) -> None:
        self._kept = None
