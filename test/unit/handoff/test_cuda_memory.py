"""`handoff/cuda_memory.py` with a driver of our own, so without a GPU: what is exported, mapped, closed and refused."""

from __future__ import annotations

import sys
import threading

import pytest

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import cuda_memory
from sglang_prefillshare.handoff.cuda_memory import CudaAllocations, CudaMapping
from test.support.cuda_driver import HANDLE_BYTES, MAPPED_AT, FakeDriver, handle_of, uuid_of

A, B, C = 0x7F00_0000_0000, 0x7F00_1000_0000, 0x7F00_2000_0000


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Two GPUs; the allocations are on the second one."""
    driver = FakeDriver({0: [], 1: [(A, 1 << 20), (B, 1 << 16), (C, 1 << 16)]})
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    return driver


# ---- exporting -----------------------------------------------------------------------------------------------------


def test_each_allocation_is_exported_once_and_every_buffer_has_its_place_in_one(driver: FakeDriver) -> None:
    found = CudaAllocations([B + 512, A, A + 4096, C, B, A + (1 << 20) - 1], device=1)
    assert driver.exported == [B, A, C]
    assert found.handles == [handle_of(B), handle_of(A), handle_of(C)]
    assert found.places == [(0, 512), (1, 0), (1, 4096), (2, 0), (0, 0), (1, (1 << 20) - 1)]


def test_a_pool_without_buffers_exports_nothing(driver: FakeDriver) -> None:
    found = CudaAllocations([], device=1)
    assert (found.handles, found.places, driver.exported) == ([], [], [])


@pytest.mark.parametrize("address", [A - 1, A + (1 << 20), 0])
def test_an_address_outside_every_allocation_is_refused(driver: FakeDriver, address: int) -> None:
    with pytest.raises(HandoffError, match="cuMemGetAddressRange returned CUDA_ERROR_INVALID_VALUE"):
        CudaAllocations([A, address], device=1)


def test_memory_that_the_driver_cannot_export_is_refused_with_the_setting_to_change(driver: FakeDriver) -> None:
    driver.cannot_export = {B}
    with pytest.raises(HandoffError) as refused:
        CudaAllocations([A, B, C], device=1)
    message = str(refused.value)
    assert message.startswith("this prefill worker cannot export its KV pool over CUDA IPC: ")
    for part in (
        "cuIpcGetMemHandle returned CUDA_ERROR_INVALID_VALUE",
        "Unset expandable_segments in PYTORCH_ALLOC_CONF",
        "--enable-memory-saver",
        "--disaggregation-transfer-backend nixl",
    ):
        assert part in message
    assert isinstance(refused.value.__cause__, HandoffError)


def test_a_driver_without_ipc_is_refused_as_such(driver: FakeDriver) -> None:
    driver.has_ipc = False
    with pytest.raises(HandoffError, match=r"offers no CUDA IPC.*--disaggregation-transfer-backend nixl") as refused:
        CudaAllocations([A], device=1)
    assert "expandable_segments" not in str(refused.value)


# ---- mapping -------------------------------------------------------------------------------------------------------


def test_every_handle_is_mapped_in_its_order_until_the_mapping_is_closed(driver: FakeDriver) -> None:
    mapping = CudaMapping([handle_of(B), handle_of(A)], device=1, device_uuid="GPU-7")
    assert mapping.bases == driver.mapped == [B + (1 << 40), A + (1 << 40)]
    mapping.close()
    assert (driver.mapped, sorted(driver.closed)) == ([], [A + (1 << 40), B + (1 << 40)])


def test_a_buffer_is_found_in_the_mapping_at_its_place(driver: FakeDriver) -> None:
    addresses = [C + 64, A + 4096, C]
    exported = CudaAllocations(addresses, device=1)
    mapping = CudaMapping(exported.handles, device=1, device_uuid="GPU-7")
    assert [mapping.bases[index] + offset for index, offset in exported.places] == [a + (1 << 40) for a in addresses]


def test_closing_a_mapping_again_closes_nothing(driver: FakeDriver) -> None:
    mapping = CudaMapping([handle_of(A)], device=1, device_uuid="GPU-7")
    for _ in range(3):
        mapping.close()
    assert driver.closed == [A + (1 << 40)]


def test_a_handle_that_cannot_be_opened_is_refused_and_what_was_opened_before_it_is_closed(driver: FakeDriver) -> None:
    driver.cannot_open = {C}
    with pytest.raises(HandoffError) as refused:
        CudaMapping([handle_of(A), handle_of(B), handle_of(C)], device=1, device_uuid="GPU-7")
    assert (driver.mapped, sorted(driver.closed)) == ([], [A + (1 << 40), B + (1 << 40)])
    message = str(refused.value)
    assert message.startswith("this decode worker cannot map the prefill worker's KV pool from GPU GPU-7: ")
    for part in (
        "cuIpcOpenMemHandle returned CUDA_ERROR_INVALID_VALUE",
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
        CudaMapping([handle_of(A), raw], device=1, device_uuid="GPU-7")
    assert (driver.mapped, driver.closed) == ([], [A + (1 << 40)])


def test_gpus_that_are_no_peers_are_refused_before_anything_is_opened(driver: FakeDriver) -> None:
    driver.are_peers = False
    with pytest.raises(
        HandoffError, match=r"are no peers \(nvidia-smi topo -p2p r\).*transfer-backend nixl"
    ) as refused:
        CudaMapping([handle_of(A)], device=1, device_uuid=uuid_of(0))
    assert uuid_of(0) in str(refused.value) and uuid_of(1) in str(refused.value)
    assert driver.calls == []
    CudaMapping([handle_of(A)], device=1, device_uuid=uuid_of(1)).close()  # on its own GPU it needs no peer


def test_a_gpu_that_is_hidden_from_the_worker_is_named_with_the_variable_that_hides_it(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where mapping fails: drivers can map memory of GPUs that the process does not see."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    CudaMapping([handle_of(A)], device=1, device_uuid="of-no-gpu-here").close()
    driver.cannot_open = {A}
    with pytest.raises(HandoffError, match=r"CUDA_VISIBLE_DEVICES=1 hides that GPU.*--base-gpu-id"):
        CudaMapping([handle_of(A)], device=1, device_uuid="of-no-gpu-here")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(HandoffError, match="share the IPC namespace"):
        CudaMapping([handle_of(A)], device=1, device_uuid="of-no-gpu-here")


def test_of_every_visible_gpu_it_is_known_whether_it_can_be_read(driver: FakeDriver) -> None:
    assert cuda_memory.reachable_gpus(1) == {uuid_of(0): True, uuid_of(1): True}
    driver.are_peers = False
    assert cuda_memory.reachable_gpus(1) == {uuid_of(0): False, uuid_of(1): True}
    assert cuda_memory.device_uuid(0) == uuid_of(0)


# ---- copying -------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_also_through_a_mapping(driver: FakeDriver) -> None:
    first, second = (cuda_memory.CudaBuffer(8, device=1) for _ in range(2))
    cuda_memory.write(b"abcdefgh12345678", [first.address, second.address], [8, 8], device=1)
    mapping = CudaMapping(CudaAllocations([second.address], device=1).handles, device=1, device_uuid=uuid_of(1))
    assert cuda_memory.read([mapping.bases[0] + 4, first.address], [4, 2], device=1) == b"5678ab"
    mapping.close()
    with pytest.raises(HandoffError, match="cuMemcpyDtoD returned CUDA_ERROR_INVALID_VALUE"):
        cuda_memory.read([second.address + MAPPED_AT], [4], device=1)
    first.close()
    second.close()
    assert driver.allocations[1] == [(A, 1 << 20), (B, 1 << 16), (C, 1 << 16)]  # nothing is left behind
    assert driver.retained == {1: 0}


# ---- contexts ------------------------------------------------------------------------------------------------------


def test_a_thread_without_a_context_exports_maps_and_unmaps_on_the_device_it_is_told(driver: FakeDriver) -> None:
    """The handoff's threads are new ones: the driver would refuse them, the runtime would put them on GPU 0."""
    failures: list[BaseException] = []

    def use() -> None:
        try:
            mapping = CudaMapping(CudaAllocations([A], device=1).handles, device=1, device_uuid="GPU-7")
            assert driver.current() is None
            mapping.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert failures == []
    names = ["cuMemGetAddressRange", "cuIpcGetMemHandle", "cuIpcOpenMemHandle", "cuIpcCloseMemHandle"]
    assert driver.calls == [(name, 1) for name in names]
    assert driver.retained == {1: 0}


def test_a_block_on_a_device_leaves_the_context_that_was_current_before(driver: FakeDriver) -> None:
    with cuda_memory.on_device(0):
        with pytest.raises(HandoffError), cuda_memory.on_device(1):
            assert driver.current() == 1
            raise HandoffError("whatever")
        assert driver.current() == 0
    assert (driver.current(), driver.retained) == (None, {0: 0, 1: 0})


def test_a_device_that_this_process_has_not_is_refused(driver: FakeDriver) -> None:
    with pytest.raises(HandoffError, match="cuDeviceGet returned CUDA_ERROR_INVALID_DEVICE"):
        CudaAllocations([A], device=2)


# ---- no driver -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["cuda", "cuda.bindings"])
def test_without_cuda_python_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delitem(sys.modules, "cuda.bindings", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    for use in (
        lambda: CudaAllocations([A], device=1),
        lambda: CudaMapping([handle_of(A)], device=1, device_uuid="GPU-7"),
    ):
        with pytest.raises(HandoffError, match=r"the package cuda-python is not installed.*Install it, or choose"):
            use()


def test_without_the_drivers_library_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-python loads it at the first call, and raises an error of its own."""

    class DynamicLibNotFoundError(RuntimeError):
        pass

    def without_library(_flags: int) -> None:
        raise DynamicLibNotFoundError("libcuda.so.1 was not found.")

    driver = FakeDriver({0: [(A, 4096)]})
    monkeypatch.setattr(driver, "cuInit", without_library)
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    for use in (
        lambda: CudaAllocations([A], device=0),
        lambda: CudaMapping([handle_of(A)], device=0, device_uuid=uuid_of(0)),
        lambda: cuda_memory.device_uuid(0),
    ):
        with pytest.raises(HandoffError, match=r"libcuda\.so\.1 was not found\. Install the driver.*--gpus all.*nixl"):
            use()
