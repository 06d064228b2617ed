"""Where KV lies and on which device our threads work, as in a real scheduler: settings say nothing, the pool does."""

from __future__ import annotations

import queue
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
from sglang.srt.server_args import ServerArgs  # noqa: E402

from sglang_prefillshare.errors import HandoffError  # noqa: E402
from sglang_prefillshare.handoff import cuda_memory, messages  # noqa: E402
from sglang_prefillshare.host.roles import handshake  # noqa: E402
from sglang_prefillshare.host.transfer import decode_end, manager  # noqa: E402
from sglang_prefillshare.host.transfer.backend import create_manager  # noqa: E402
from test.support.cuda_driver import MAPPED_AT, FakeDriver, handle_of, uuid_of  # noqa: E402

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
    scheduler_queue = SimpleNamespace(scheduler=None, token_to_kv_pool=pool)
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
    pool = messages.Pool("x", 7, 1, 0, 8, 64, decode.geometry, offered)
    view = decode._map_cuda(pool)
    assert view.addresses.tolist() == [K + MAPPED_AT, V + MAPPED_AT]
    decode._pools[7] = decode_end._PrefillPool(view, None)  # type: ignore[arg-type]
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
