"""SGLang on a CPU without `sgl_kernel`: an out-of-tree platform over plain torch operators.

It serves stock SGLang and our roles alike, so that a comparison between them stays fair. Flags that the user gave
are left alone; defaults that assume a GPU are not.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_prefillshare.environment import cpu_has_bfloat16
from sglang_prefillshare.settings import current_settings

NO_BFLOAT16: Final = (
    "this CPU has no bfloat16 of its own, its products would be 3 to 6 times slower: the model runs in float32."
)
DEFAULT_MAX_TOTAL_TOKENS: Final = 32_768
"""KV pool of a CPU server when nobody said otherwise; SGLang's own default would take most of the RAM."""

OVERLAP_ENV: Final = "PREFILLSHARE_CPU_OVERLAP"
"""Set to 1, a CPU server runs SGLang's overlap loop, as a GPU server does by default. The streams of a CPU wait for
nothing, but the loop learns each result one step later, as it does there. For tests of what that moves. Not on prefill
workers: SGLang's overlap loop makes CUDA events there."""


class CpuPlatform(SRTPlatform, CpuDeviceMixin):
    """Device type `cpu`, attention by `torch.nn.functional.scaled_dot_product_attention`, gloo between ranks."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """A KV pool in shared memory where our own backend hands KV out; SGLang's pool everywhere else."""
        settings = current_settings()
        if kind == "mha" and settings is not None and settings.shares_kv_pool:
            from sglang_prefillshare.host.cpu.shared_pool import SharedMHATokenToKVPool

            return SharedMHATokenToKVPool
        return None

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """What a GPU-minded default costs on a CPU: fill it in where the user left it open.

        Overlap scheduling hides GPU launches behind Python; here the forward pass runs on the scheduler's own
        thread, so overlap only delays each token by a step and computes one step too many per request. It is off,
        unless `OVERLAP_ENV` says otherwise.
        """
        if server_args.attention_backend is None:
            server_args.attention_backend = "torch_native"
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_MAX_TOTAL_TOKENS
        if os.environ.get(OVERLAP_ENV) != "1" or server_args.disaggregation_mode == "prefill":
            server_args.disable_overlap_schedule = True
        if server_args.dtype == "auto" and not cpu_has_bfloat16():
            server_args.dtype = "float32"
            print(f"prefillshare: {NO_BFLOAT16} --dtype bfloat16 halves the memory.", file=sys.stderr)
