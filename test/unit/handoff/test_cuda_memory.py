"""`handoff/cuda_memory.py` with a driver of our own, so without a GPU: what is exported, mapped, closed and refused."""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import cuda_memory
from sglang_prefillshare.handoff.cuda_memory import CudaAllocations, CudaMapping

HANDLE_BYTES = 64


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_PEER_ACCESS_UNSUPPORTED = 217


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


class FakeDriver:
    """One GPU's allocations as (base, size); handle bytes are those of the base. Maps them 2^40 higher.

    As cuda-python does, every function returns a tuple of a status and what it is asked for.
    """

    CUipcMemHandle = CUipcMemHandle
    CUipcMem_flags = CUipcMem_flags

    def __init__(self, allocations: Sequence[tuple[int, int]]) -> None:
        self.allocations = list(allocations)
        self.cannot_export: set[int] = set()
        self.cannot_open: set[int] = set()
        self.exported: list[int] = []
        self.mapped: list[int] = []
        self.closed: list[int] = []

    def cuMemGetAddressRange(self, address: int) -> tuple[Any, ...]:
        for base, size in self.allocations:
            if base <= address < base + size:
                return CUresult.CUDA_SUCCESS, base, size
        return CUresult.CUDA_ERROR_INVALID_VALUE, None, None

    def cuIpcGetMemHandle(self, base: int) -> tuple[Any, ...]:
        if base in self.cannot_export:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        self.exported.append(base)
        handle = CUipcMemHandle()
        handle.reserved = handle_of(base)
        return CUresult.CUDA_SUCCESS, handle

    def cuIpcOpenMemHandle(self, handle: CUipcMemHandle, flags: int) -> tuple[Any, ...]:
        assert flags == CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        base = int.from_bytes(handle.reserved, "little")
        if base in self.cannot_open:
            return CUresult.CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, None
        self.mapped.append(base + (1 << 40))
        return CUresult.CUDA_SUCCESS, base + (1 << 40)

    def cuIpcCloseMemHandle(self, base: int) -> tuple[Any, ...]:
        assert base in self.mapped, "only what was mapped can be closed, and once"
        self.mapped.remove(base)
        self.closed.append(base)
        return (CUresult.CUDA_SUCCESS,)


def handle_of(base: int) -> bytes:
    return base.to_bytes(HANDLE_BYTES, "little")


A, B, C = 0x7F00_0000_0000, 0x7F00_1000_0000, 0x7F00_2000_0000


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver([(A, 1 << 20), (B, 1 << 16), (C, 1 << 16)])
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    return driver


# ---- exporting -----------------------------------------------------------------------------------------------------


def test_each_allocation_is_exported_once_and_every_buffer_has_its_place_in_one(driver: FakeDriver) -> None:
    found = CudaAllocations([B + 512, A, A + 4096, C, B, A + (1 << 20) - 1])
    assert driver.exported == [B, A, C]
    assert found.handles == [handle_of(B), handle_of(A), handle_of(C)]
    assert found.places == [(0, 512), (1, 0), (1, 4096), (2, 0), (0, 0), (1, (1 << 20) - 1)]


def test_a_pool_without_buffers_exports_nothing(driver: FakeDriver) -> None:
    found = CudaAllocations([])
    assert (found.handles, found.places, driver.exported) == ([], [], [])


@pytest.mark.parametrize("address", [A - 1, A + (1 << 20), 0])
def test_an_address_outside_every_allocation_is_refused(driver: FakeDriver, address: int) -> None:
    with pytest.raises(HandoffError, match="cuMemGetAddressRange returned CUDA_ERROR_INVALID_VALUE"):
        CudaAllocations([A, address])


def test_memory_that_the_driver_cannot_export_is_refused_with_the_setting_to_change(driver: FakeDriver) -> None:
    driver.cannot_export = {B}
    with pytest.raises(HandoffError) as refused:
        CudaAllocations([A, B, C])
    message = str(refused.value)
    assert message.startswith("this prefill worker cannot export its KV pool over CUDA IPC: ")
    for part in (
        "cuIpcGetMemHandle returned CUDA_ERROR_INVALID_VALUE",
        "Unset PYTORCH_CUDA_ALLOC_CONF=expandable_segments",
        "--enable-memory-saver",
        "--disaggregation-transfer-backend nixl",
    ):
        assert part in message
    assert isinstance(refused.value.__cause__, HandoffError)


# ---- mapping -------------------------------------------------------------------------------------------------------


def test_every_handle_is_mapped_in_its_order_until_the_mapping_is_closed(driver: FakeDriver) -> None:
    mapping = CudaMapping([handle_of(B), handle_of(A)], device_uuid="GPU-7")
    assert mapping.bases == driver.mapped == [B + (1 << 40), A + (1 << 40)]
    mapping.close()
    assert (driver.mapped, sorted(driver.closed)) == ([], [A + (1 << 40), B + (1 << 40)])


def test_a_buffer_is_found_in_the_mapping_at_its_place(driver: FakeDriver) -> None:
    addresses = [C + 64, A + 4096, C]
    exported = CudaAllocations(addresses)
    mapping = CudaMapping(exported.handles, device_uuid="GPU-7")
    assert [mapping.bases[index] + offset for index, offset in exported.places] == [a + (1 << 40) for a in addresses]


def test_closing_a_mapping_again_closes_nothing(driver: FakeDriver) -> None:
    mapping = CudaMapping([handle_of(A)], device_uuid="GPU-7")
    for _ in range(3):
        mapping.close()
    assert driver.closed == [A + (1 << 40)]


def test_a_handle_that_cannot_be_opened_is_refused_and_what_was_opened_before_it_is_closed(driver: FakeDriver) -> None:
    driver.cannot_open = {C}
    with pytest.raises(HandoffError) as refused:
        CudaMapping([handle_of(A), handle_of(B), handle_of(C)], device_uuid="GPU-7")
    assert (driver.mapped, sorted(driver.closed)) == ([], [A + (1 << 40), B + (1 << 40)])
    message = str(refused.value)
    assert message.startswith("this decode worker cannot map the prefill worker's KV pool from GPU GPU-7: ")
    for part in (
        "cuIpcOpenMemHandle returned CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
        "nvidia-smi topo -p2p r",
        "share the IPC namespace",
        "choose nixl",
    ):
        assert part in message


@pytest.mark.parametrize("raw", [b"", b"short", bytes(HANDLE_BYTES + 1)])
def test_bytes_that_are_no_handle_are_refused_and_what_was_opened_before_them_is_closed(
    driver: FakeDriver, raw: bytes
) -> None:
    with pytest.raises(HandoffError, match=f"cannot map .*reserved length must be 64, is {len(raw)}"):
        CudaMapping([handle_of(A), raw], device_uuid="GPU-7")
    assert (driver.mapped, driver.closed) == ([], [A + (1 << 40)])


# ---- no driver -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["cuda", "cuda.bindings"])
def test_without_cuda_python_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delitem(sys.modules, "cuda.bindings", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    for use in (lambda: CudaAllocations([A]), lambda: CudaMapping([handle_of(A)], device_uuid="GPU-7")):
        with pytest.raises(HandoffError, match=r"the package cuda-python is not installed.*Install it, or choose"):
            use()
