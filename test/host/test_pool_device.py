"""Where KV lies and on which device our threads work, as in a real scheduler: settings say nothing, the pool does."""

from __future__ import annotations

import ctypes
import queue
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.disaggregation.base.conn import KVArgs  # noqa: E402 - after SGLang's plugins, as in a server
from sglang.srt.disaggregation.common.conn import CommonKVManager  # noqa: E402
from sglang.srt.disaggregation.utils import DisaggregationMode  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

from sglang_prefillshare.errors import HandoffError  # noqa: E402
from sglang_prefillshare.handoff import cuda_memory, messages, proof  # noqa: E402
from sglang_prefillshare.handoff.copy import copy_pages  # noqa: E402
from sglang_prefillshare.handoff.mapping import map_pool  # noqa: E402
from sglang_prefillshare.handoff.pool import PoolView  # noqa: E402
from sglang_prefillshare.handoff.ranks import Rank  # noqa: E402
from sglang_prefillshare.host.roles import handshake  # noqa: E402
from sglang_prefillshare.host.roles.role import SchedulerRole, check_handoff  # noqa: E402
from sglang_prefillshare.host.transfer import decode_end, manager  # noqa: E402
from sglang_prefillshare.host.transfer.backend import create_manager  # noqa: E402
from sglang_prefillshare.identity.fingerprint import BaseIdentity  # noqa: E402
from sglang_prefillshare.protocol import Role  # noqa: E402
from sglang_prefillshare.settings import BACKEND_NAME, RoleSettings  # noqa: E402
from test.support.cuda_driver import MAPPED_AT, CUresult, FakeDriver, PeerInAThread, handle_of, uuid_of  # noqa: E402

K, V = 0x7F00_0000_0000, 0x7F00_1000_0000


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Two GPUs, the pool on the second one."""
    driver = FakeDriver({0: [], 1: [(K, 4096), (V, 4096)]})
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    return driver


@pytest.fixture
def current(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> queue.Queue[int | None]:
    """On which device each control thread hears from peers; neither sockets nor kernels are made."""
    heard: queue.Queue[int | None] = queue.Queue()
    monkeypatch.setattr(CommonKVManager, "__init__", lambda self, args, *_rest: setattr(self, "kv_args", args))
    monkeypatch.setattr(CommonKVManager, "attn_tp_rank", 0, raising=False)
    monkeypatch.setattr(CommonKVManager, "attn_tp_size", 1, raising=False)
    monkeypatch.setattr(manager.PrefillShareKVManager, "_hear", lambda _self: heard.put(driver.current()))
    monkeypatch.setattr(decode_end.DecodeKVManager, "_copier", lambda _self: None)
    monkeypatch.setattr(decode_end.DecodeKVManager, "_start_heartbeat_checker_thread", lambda _self: None)
    monkeypatch.setattr(handshake, "role_of", lambda _scheduler: SimpleNamespace(fingerprint="base"))
    return heard


def build(mode: DisaggregationMode, *devices: torch.device) -> Any:
    """A manager as SGLang's queues build it: these arguments, our hook around it, and a device that nobody set."""
    args = KVArgs()
    args.engine_rank, args.gpu_id, args.page_size, args.kv_cache_dtype_str = 0, 1, 1, "bfloat16"
    args.kv_layout, args.state_types = handshake.LAYOUT_PREFIX + "base", []
    args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = [K, V], [4096, 4096], [64, 64]
    args.aux_data_ptrs = args.aux_data_lens = args.aux_item_lens = []
    server_args = ServerArgs(model_path="dummy")
    assert server_args.device is None
    pool = SimpleNamespace(
        k_buffer=[SimpleNamespace(device=devices[0])], v_buffer=[SimpleNamespace(device=devices[-1])]
    )
    scheduler = SimpleNamespace(model_config=SimpleNamespace(get_total_num_kv_heads=lambda: 1))
    scheduler_queue = SimpleNamespace(scheduler=scheduler, token_to_kv_pool=pool)
    return handshake.init_kv_manager(lambda _queue: create_manager(args, mode, server_args), scheduler_queue)


@pytest.mark.parametrize("mode", [DisaggregationMode.PREFILL, DisaggregationMode.DECODE])
def test_a_worker_is_where_its_pool_is_and_so_are_its_threads(
    mode: DisaggregationMode, current: queue.Queue[int | None]
) -> None:
    built = build(mode, torch.device("cuda", 1))
    assert built.on_cuda and built.device.index == 1
    assert current.get(timeout=5) == 1


def test_a_pool_on_the_second_gpu_is_exported_mapped_and_unmapped_there(
    driver: FakeDriver, current: queue.Queue[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = build(DisaggregationMode.PREFILL, torch.device("cuda", 1))._cuda_memory()
    assert (offered.device_uuid, offered.handles) == (uuid_of(1), (handle_of(K), handle_of(V)))
    decode = build(DisaggregationMode.DECODE, torch.device("cuda", 1))
    pool = messages.Pool("x", 7, 1, 0, 8, 64, decode.geometry, offered, Rank())
    view = map_pool(pool, device=decode.cuda_index)
    assert view.addresses.tolist() == [K + MAPPED_AT, V + MAPPED_AT]
    decode._pools[7] = decode_end._PrefillPool(view, None, 0, None)  # type: ignore[arg-type]
    decode._device_copier = SimpleNamespace(forget=lambda _view: None)
    decode.peer_died(7, set())
    assert driver.mapped == [] and {device for _, device in driver.calls} == {1}


def test_what_prefill_waits_for_before_it_lends_it_waits_for_on_the_pools_device(
    driver: FakeDriver, current: queue.Queue[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = build(DisaggregationMode.PREFILL, torch.device("cuda", 1))
    seen: list[int | None] = []
    monkeypatch.setattr(prefill, "_lend", lambda *_lent: None)
    event = SimpleNamespace(synchronize=lambda: seen.append(driver.current()))
    prefill._announcer.submit(prefill._lend_later, event, 1, slice(0, 1), b"", None).result(5)
    assert seen == [1]


def test_a_pool_in_host_memory_is_on_no_gpu(current: queue.Queue[int | None], driver: FakeDriver) -> None:
    assert not build(DisaggregationMode.PREFILL, torch.device("cpu")).on_cuda
    assert current.get(timeout=5) is None and driver.retained == {}


def test_a_pool_on_two_devices_is_refused(current: queue.Queue[int | None]) -> None:
    with pytest.raises(HandoffError, match="all on one device"):
        build(DisaggregationMode.PREFILL, torch.device("cuda", 0), torch.device("cuda", 1))


# ---- a worker's proof of its own half: the real managers and the real peer, which runs in a thread on the same driver


@pytest.fixture
def proving(driver: FakeDriver, current: queue.Queue[int | None], monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The pool lies where there is memory; a decode worker's copy finds mapped memory where the driver has it."""
    pool = [ctypes.create_string_buffer(bytes(range(256)) * 16, 4096) for _ in range(2)]
    driver.allocations[1] = [(ctypes.addressof(buffer), 4096) for buffer in pool]
    monkeypatch.setattr(sys.modules[__name__], "K", driver.allocations[1][0][0])
    monkeypatch.setattr(sys.modules[__name__], "V", driver.allocations[1][1][0])
    monkeypatch.setattr(driver, "pool", pool, raising=False)

    def copier(self: Any) -> Any:
        def copy(source: PoolView, target: PoolView, source_pages: Any, target_pages: Any, heads: None) -> None:
            here = PoolView.at((source.addresses - MAPPED_AT).tolist(), source.page_bytes.tolist(), 1, owner=None)
            assert driver.mapped and driver.current() == 1
            copy_pages(here, target, source_pages, target_pages, heads)

        self._device_copier = SimpleNamespace(forget=lambda _view: None)
        return copy

    monkeypatch.setattr(decode_end.DecodeKVManager, "_copier", copier)
    monkeypatch.setattr(proof, "Peer", PeerInAThread)
    return driver


def scheduler_of(mode: DisaggregationMode, backend: str = BACKEND_NAME) -> Any:
    """As much of a scheduler as the check at the end of its start looks at."""
    role = Role.PREFILL if mode == DisaggregationMode.PREFILL else Role.DECODE
    settings = RoleSettings(role, "base", BaseIdentity("w", "c", "t", ""), True, backend)
    queue_of_ours = SimpleNamespace(kv_manager=build(mode, torch.device("cuda", 1)))
    pool = object.__new__(MHATokenToKVPool)
    scheduler = SimpleNamespace(
        disagg_prefill_bootstrap_queue=queue_of_ours,
        disagg_decode_prealloc_queue=queue_of_ours,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        _prefill_share_role=SchedulerRole(settings, "bfloat16", "base"),
    )
    check_handoff(scheduler)
    return scheduler._prefill_share_role


MODES = [DisaggregationMode.PREFILL, DisaggregationMode.DECODE]


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_proves_its_half_on_its_pools_gpu_and_leaves_all_as_it_was(
    mode: DisaggregationMode, proving: FakeDriver
) -> None:
    before = [bytes(buffer) for buffer in proving.pool]  # type: ignore[attr-defined]
    role = scheduler_of(mode)
    assert role.handoff_failure is None
    assert role.pool_place["gpu"] == uuid_of(1) and role.pool_place["gpus_in_reach"] == {
        uuid_of(0): True,
        uuid_of(1): True,
    }
    assert [bytes(buffer) for buffer in proving.pool] == before  # type: ignore[attr-defined]
    names = [name for name, _ in proving.calls]
    assert {"cuIpcGetMemHandle", "cuIpcOpenMemHandle", "cuMemcpyDtoD"} <= set(names)
    assert {device for _, device in proving.calls} == {1}


@pytest.mark.parametrize(
    ("mode", "broken", "reason"),
    [
        (MODES[0], {"has_ipc": False}, r"offers no CUDA IPC.*transfer-backend nixl"),
        (MODES[0], {"cannot_export": "pool"}, r"Unset expandable_segments.*--enable-memory-saver.*nixl"),
        (MODES[0], {"cannot_open": "pool"}, r"share the IPC namespace.*nixl"),
        (MODES[1], {"has_ipc": False}, r"offers no CUDA IPC.*transfer-backend nixl"),
        (
            MODES[1],
            {"cuIpcOpenMemHandle": lambda *_: (CUresult.CUDA_ERROR_INVALID_VALUE, None)},
            r"IPC namespace.*nixl",
        ),
        (
            MODES[1],
            {"cuMemcpyDtoD": lambda *_: (CUresult.CUDA_ERROR_INVALID_VALUE,)},
            r"be copied.*transfer-backend nixl",
        ),
    ],
)
def test_a_worker_that_cannot_hand_over_knows_why_before_the_first_request(
    mode: DisaggregationMode, broken: dict[str, Any], reason: str, proving: FakeDriver
) -> None:
    for name, value in broken.items():
        setattr(proving, name, {base for base, _ in proving.allocations[1]} if value == "pool" else value)
        if callable(value):
            value.__name__ = name
    assert re.search(reason, scheduler_of(mode).handoff_failure or "")


@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_without_room_for_the_trial_is_no_failure(mode: DisaggregationMode, proving: FakeDriver) -> None:
    proving.is_full = True
    assert scheduler_of(mode).handoff_failure is None


def test_what_the_kernels_compiler_says_is_told(proving: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_compiler(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(decode_end.DecodeKVManager, "_copier", lambda self: without_compiler)
    monkeypatch.setattr(decode_end.DecodeKVManager, "_unmap", lambda _self, view: view.owner.close())
    assert "Failed to find C compiler" in str(scheduler_of(MODES[1]).handoff_failure)
    assert proving.mapped == []


def test_another_backend_looks_after_its_pool_itself(proving: FakeDriver) -> None:
    proving.has_ipc = False
    role = scheduler_of(MODES[0], backend="nixl")
    assert role.handoff_failure is None and role.pool_place == {}
