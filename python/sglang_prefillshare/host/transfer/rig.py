"""One end of a handoff without a model, an HTTP server or a scheduler's loop: for `doctor`, tests and benchmarks.

All of it is what a scheduler's process has: plugins loaded with a role, SGLang's configuration published, its KV pool
of the platform's choice, on prefill its bootstrap server, and the KV manager, built as SGLang's queues build it. Who
uses it drives SGLang's senders and receivers.
"""

from __future__ import annotations

import socket
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sglang_prefillshare.identity.fingerprint import BaseIdentity
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.settings import DEFAULT_LEASE_TIMEOUT_S, RoleSettings, current_settings, publish

if TYPE_CHECKING:
    import torch

HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class PoolShape:
    """A KV pool: K and V of each layer, pages [0, page_count), of which SGLang never hands out page 0."""

    layers: int
    kv_heads: int
    head_dim: int
    page_count: int
    page_size: int = 1
    dtype: str = "bfloat16"
    device: str = "cpu"

    @property
    def bytes_per_page(self) -> int:
        """Over all layers, K and V."""
        import torch

        itemsize: int = getattr(torch, self.dtype).itemsize
        return 2 * self.layers * self.kv_heads * self.head_dim * self.page_size * itemsize


def become_scheduler(
    role: Role,
    *,
    backend: str,
    page_size: int,
    bootstrap_port: int = 0,
    base: str = "base",
    lease_timeout_s: float = DEFAULT_LEASE_TIMEOUT_S,
) -> None:
    """Load our plugin with a role and publish SGLang's configuration, in the order of a scheduler process.

    Ends with another `base` refuse each other. It may be called again with another page size or port.
    """
    identity = BaseIdentity(weights=base, config="", tokenizer="", chat_template="")
    publish(RoleSettings(role, base, identity, trained=True, transfer_backend=backend, lease_timeout_s=lease_timeout_s))

    warnings.filterwarnings("ignore", category=UserWarning, module="sglang")  # of the kernels that a CPU does without

    # As in a scheduler's process, it is there before the plugins come: they hook what is loaded.
    import sglang.srt.disaggregation.common.conn  # noqa: F401
    import torch
    from sglang.srt import runtime_context
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    torch.set_num_threads(1)
    load_plugins()

    args = ServerArgs(
        model_path="dummy",  # SGLang's own name for "no model": nothing is read for it
        host=HOST,
        page_size=page_size,
        disaggregation_mode=role.value,
        disaggregation_transfer_backend=backend,
        disaggregation_bootstrap_port=bootstrap_port,
    )
    ranks = runtime_context.SpawnRanks(world_rank=0, gpu_id=0)
    runtime_context.publish(args, role="scheduler", ranks=ranks)
    # Used between pipeline stages only, and would need torch.distributed.
    runtime_context.get_parallel().override_permanently(pp_group=None)


def backend_class(backend: str, kind: str) -> Any:
    """SGLang's class of a transfer backend: `kind` is MANAGER, SENDER, RECEIVER, BOOTSTRAP_SERVER or KVARGS."""
    from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class

    return get_kv_class(TransferBackend(backend), KVClassType[kind])


def make_pool(shape: PoolShape) -> Any:
    """SGLang's pool of the platform's choice: on prefill, with our backend, the one in shared memory."""
    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.platforms import current_platform

    pool_class = current_platform.get_kv_pool_cls(kind="mha") or MHATokenToKVPool
    return pool_class(
        size=(shape.page_count - 1) * shape.page_size,
        page_size=shape.page_size,
        dtype=getattr(torch, shape.dtype),
        head_num=shape.kv_heads,
        head_dim=shape.head_dim,
        layer_num=shape.layers,
        device=shape.device,
        enable_memory_saver=False,
    )


def pages_of(pool: Any, shape: PoolShape) -> list[torch.Tensor]:
    """The pool's buffers, K of each layer and then V, as uint8 [pages, bytes of a page]."""
    import torch

    return [buffer.view(torch.uint8).view(shape.page_count, -1) for buffer in (*pool.k_buffer, *pool.v_buffer)]


def make_metadata(pool: Any, rows: int) -> Any:
    """SGLang's buffers for what travels beside the KV of `rows` handoffs at once."""
    from sglang.srt.disaggregation.utils import MetadataBuffers

    return MetadataBuffers(rows, hidden_size=16, hidden_states_dtype=pool.dtype, max_sampling_mask_tokens=1)


def start_bootstrap_server(backend: str, port: int) -> Any:
    """SGLang's, listening."""
    server = backend_class(backend, "BOOTSTRAP_SERVER")(host=HOST, port=port)
    deadline = time.monotonic() + 10.0
    while True:
        with suppress(OSError):
            socket.create_connection((HOST, port), timeout=1.0).close()
            return server
        if time.monotonic() > deadline:
            raise TimeoutError(f"SGLang's bootstrap server does not listen on port {port}")
        time.sleep(0.01)


def make_manager(role: Role, backend: str, shape: PoolShape, pool: Any, metadata: Any) -> Any:
    """What `_init_kv_manager` of SGLang's prefill and decode queues does, and our `handshake.init_kv_manager`."""
    from sglang.srt.disaggregation.utils import DisaggregationMode, setup_state_kv_args
    from sglang.srt.runtime_context import get_server_args

    from sglang_prefillshare.host.roles import handshake
    from sglang_prefillshare.host.transfer import pool_device

    settings = current_settings()
    assert settings is not None
    args = backend_class(backend, "KVARGS")()
    args.engine_rank = args.pp_rank = args.gpu_id = 0
    args.system_dp_rank = args.rust_http_port = args.ib_device = None
    args.kv_cache_dtype_str = shape.dtype
    args.kv_layout = handshake.LAYOUT_PREFIX + settings.identity.runtime_fingerprint(shape.dtype)
    args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = pool.get_contiguous_buf_infos()
    args.kv_data_mem_kinds = ["DRAM" if shape.device == "cpu" else "VRAM"] * len(args.kv_data_ptrs)
    args.kv_layer_ids = []
    args.kv_head_num = args.total_kv_head_num = shape.kv_heads
    args.page_size = shape.page_size
    args.prefill_start_layer, args.prefill_end_layer = pool.start_layer, pool.end_layer
    args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = metadata.get_buf_infos()
    setup_state_kv_args(args, pool, None, shape.layers)
    manager_class = backend_class(backend, "MANAGER")
    with pool_device.stated_by(pool):
        return manager_class(args, DisaggregationMode(role.value), get_server_args(), False)
