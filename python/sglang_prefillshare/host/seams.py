"""Every place where we reach into SGLang, in one table: what, why, and when it can go (contract 5).

A seam is placed through SGLang's own hook registry, which logs failures and goes on. So each one is checked twice here:
its parameters against those of the pinned SGLang before it is placed, and that it really is in place afterwards.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sglang_prefillshare.errors import SeamError
from sglang_prefillshare.host.settings import RoleSettings
from sglang_prefillshare.protocol import Role

SGLANG_VERSION: Final = "0.5.23"

Kind = Literal["around", "after", "before"]


@dataclass(frozen=True, slots=True)
class Seam:
    """One hook. `target` is SGLang's function, `hook` ours as "module:function" in this package's `host`."""

    target: str
    hook: str
    kind: Kind
    parameters: tuple[str, ...]
    why: str
    retire_when: str

    @property
    def module(self) -> str:
        """The module that `target` lives in."""
        parts = self.target.split(".")
        while parts:
            name = ".".join(parts)
            if name in sys.modules or _can_find(name):
                return name
            parts.pop()
        raise SeamError(f"{self.target} is in no module of the installed SGLang. {_wanted_version()}")

    def load_hook(self) -> Callable[..., Any]:
        module, _, name = self.hook.partition(":")
        function = getattr(importlib.import_module(f"sglang_prefillshare.host.{module}"), name)
        assert callable(function)
        return function  # type: ignore[no-any-return]


def _can_find(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, AttributeError):
        return False


_ARGS: Final = "sglang.srt.server_args.ServerArgs"
_SCHEDULER: Final = "sglang.srt.managers.scheduler.Scheduler"
_BATCH: Final = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_DECODE: Final = "sglang.srt.disaggregation.decode"
_PREFILL: Final = "sglang.srt.disaggregation.prefill"
_NOT_A_FIELD: Final = "ServerArgs can be extended by a plugin"
_FIRST_TOKEN: Final = "SGLang can leave the first token to the decode side"

FLAGS: Final = (
    Seam(f"{_ARGS}.add_cli_args", "flags:add_cli_args", "around", ("parser",), "our flags", _NOT_A_FIELD),
    Seam(
        f"{_ARGS}.from_cli_args", "flags:from_cli_args", "around", ("cls", "args"),
        "a role fills in and checks SGLang's settings", _NOT_A_FIELD,
    ),
)  # fmt: skip

CPU: Final = (
    Seam(
        f"{_SCHEDULER}.on_idle", "idle:on_idle", "around", ("self",),
        "wait for work instead of spinning", "--sleep-on-idle also wakes for KV transfers",
    ),
    Seam(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend",
        "cpu_attention:run_sdpa_forward_extend", "around",
        (
            "self", "query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens",
            "extend_prefix_lens", "extend_seq_lens", "encoder_lens", "scaling", "enable_gqa", "causal",
            "is_cross_attn", "sliding_window_size",
        ),
        "a cached prefix costs no attention of its own again", "torch_native attends for the new tokens only",
    ),
    Seam(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_decode",
        "cpu_attention:run_sdpa_forward_decode", "around",
        (
            "self", "query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens",
            "encoder_lens", "scaling", "enable_gqa", "causal", "is_cross_attn", "sliding_window_size",
        ),
        "decode reads each row of the pool once", "torch_native gathers rows and groups heads",
    ),
    Seam(
        "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply", "cpu_linear:apply", "around",
        ("self", "layer", "x", "bias"),
        "products take half of the time", "SGLang packs weights for a CPU without sgl_kernel",
    ),
    Seam(
        "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head", "cpu_linear:compute_lm_head", "around",
        ("self", "hidden_states", "lm_head", "embedding_bias", "out"),
        "the same for the logits", "the same",
    ),
    Seam(
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater._assert_weight_cache_inactive",
        "cpu_linear:forget_packed", "before", ("self", "op"),
        "weights that are updated in place are packed again", "the same",
    ),
    Seam(
        "sglang.srt.disaggregation.common.conn.CommonKVManager.__init__", "nixl_cpu:declare_host_memory", "before",
        ("self", "args", "disaggregation_mode", "server_args", "is_mla_backend"),
        "NIXL would register the pool as GPU memory, and spin", "SGLang asks the pool where its memory is",
    ),
)  # fmt: skip

BOTH_ROLES: Final = (
    Seam(
        "sglang.srt.disaggregation.utils.get_kv_class", "backend_choice:get_kv_class", "around",
        ("transfer_backend", "class_type"), "our transfer backend's classes", "transfer backends can be registered",
    ),
    Seam(
        f"{_SCHEDULER}.get_init_info", "http_routes:get_init_info", "after", ("self",),
        "the HTTP process must know the fingerprint and the pool's size", "schedulers can publish plugin data",
    ),
)  # fmt: skip

HTTP: Final = (
    Seam(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server", "http_routes:setup_http_server", "around",
        (
            "server_args", "tokenizer_manager", "template_manager", "port_args", "scheduler_infos",
            "subprocess_watchdog", "execute_warmup_func", "launch_callback",
        ),
        "the worker's description, a leg's accounting, closed endpoints", "plugins can add routes",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request", "http_routes:generate_request",
        "around", ("self", "obj", "request"), "a leg's token counts", "plugins see a request's meta information",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "requests:validate_one_request", "before", ("self", "obj", "input_ids"),
        "a clear 400 for what cannot be right", "plugins can validate requests",
    ),
)  # fmt: skip

PREFILL: Final = (
    Seam(
        f"{_SCHEDULER}.init_disaggregation", "prefill_role:init_disaggregation", "around", ("self",),
        "the role is known before the queues shake hands", "schedulers have a plugin hook before their queues",
    ),
    Seam(
        f"{_SCHEDULER}._create_generation_req", "prefill_role:create_generation_req", "around",
        ("self", "recv_req", "args", "kwargs"), "x1..x(n-1) only, in the base's namespace, sampling neutral",
        "never: an extension point of SGLang's",
    ),
    Seam(
        f"{_BATCH}.prepare_for_extend", "prefill_role:prepare_for_extend", "around", ("self",),
        "stamp each KV slot with the module it is computed for", "the radix tree records who inserted a node",
    ),
    Seam(
        "sglang.srt.disaggregation.utils.MetadataBuffers.set_buf", "prefill_role:set_buf", "after", ("self", "req"),
        "the receipt travels with the KV", "handoffs carry a token digest and a model identity",
    ),
    Seam(
        f"{_PREFILL}.PrefillBootstrapQueue._num_pages_to_send", "prefill_role:num_pages_to_send", "around",
        ("self", "req", "decode_prefix_len"), "what decode says it holds is checked", "SGLang checks it",
    ),
    Seam(
        f"{_PREFILL}.PrefillBootstrapQueue._init_kv_manager", "handshake:init_kv_manager", "around", ("self",),
        "the base's identity is in the handshake", "the handshake compares model identities",
    ),
)  # fmt: skip

DECODE: Final = (
    Seam(
        f"{_SCHEDULER}.init_disaggregation", "decode_role:init_disaggregation", "around", ("self",),
        "the role is known before the queues shake hands", "schedulers have a plugin hook before their queues",
    ),
    Seam(
        f"{_SCHEDULER}._create_generation_req", "decode_role:create_generation_req", "around",
        ("self", "recv_req", "args", "kwargs"), "the base's namespace", "never: an extension point of SGLang's",
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._pre_alloc_fill_len", "decode_role:pre_alloc_fill_len", "around", ("req",),
        "room for n-1 tokens of KV", _FIRST_TOKEN,
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._rebootstrap_prefill_len", "decode_role:pre_alloc_fill_len", "around",
        ("req",), "ask prefill for n-1 tokens of KV", _FIRST_TOKEN,
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._check_if_req_exceed_kv_capacity", "decode_role:exceeds_kv_capacity", "around",
        ("self", "req"), "what never fits is refused instead of waiting for ever", "SGLang refuses it",
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._match_prefix_and_lock", "decode_role:match_prefix_and_lock", "around",
        ("self", "req"), "decode's cache holds the KV of x1..x(n-1); xn is computed", _FIRST_TOKEN,
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._init_kv_manager", "handshake:init_kv_manager", "around", ("self",),
        "the base's identity is in the handshake", "the handshake compares model identities",
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._ensure_prefill_info", "handshake:ensure_prefill_info", "around",
        ("self", "addr_to_reqs"), "a refused prefill worker fails its requests at once",
        "a handshake mismatch fails requests instead of the scheduler",
    ),
    Seam(
        "sglang.srt.disaggregation.common.conn.CommonKVManager.try_ensure_parallel_info",
        "handshake:try_ensure_parallel_info", "around", ("self", "bootstrap_addr"),
        "a mismatch is a refusal, not a crash", "a handshake mismatch fails requests instead of the scheduler",
    ),
    Seam(
        f"{_DECODE}.DecodeTransferQueue._commit_transfer_to_req", "decode_role:commit_transfer_to_req", "around",
        ("self", "decode_req"), "check the receipt, drop the token that prefill sampled", _FIRST_TOKEN,
    ),
    Seam(
        f"{_DECODE}.DecodeTransferQueue._abort_failed_transfer", "decode_role:abort_failed_transfer", "around",
        ("self", "decode_req"), "failed handoffs are counted", "SGLang counts handoffs by outcome",
    ),
    Seam(
        f"{_BATCH}.prepare_for_prebuilt", "decode_role:prepare_for_prebuilt", "around", ("self",),
        "the batch starts with n-1 tokens of KV", _FIRST_TOKEN,
    ),
    Seam(
        f"{_BATCH}.process_prebuilt", "decode_role:process_prebuilt", "around", ("self", "future_map"),
        "xn is the first input; no grammar sees it", _FIRST_TOKEN,
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
        ".process_batch_result_prebuilt", "decode_role:process_batch_result_prebuilt", "around", ("self", "batch"),
        "nothing is streamed or finished before y1", _FIRST_TOKEN,
    ),
    Seam(
        f"{_BATCH}.cumulate_penalty_output_tokens", "decode_role:cumulate_penalty_output_tokens", "around", ("self",),
        "xn is no output: penalties and min_new_tokens skip it", _FIRST_TOKEN,
    ),
)  # fmt: skip

ALL: Final = (*FLAGS, *CPU, *BOTH_ROLES, *HTTP, *PREFILL, *DECODE)


def flag_seams() -> tuple[Seam, ...]:
    return FLAGS


def platform_seams() -> tuple[Seam, ...]:
    """The seams of the CPU platform, for stock servers and roles alike; none elsewhere. Schedulers only."""
    from sglang.srt.platforms import current_platform

    is_ours = type(current_platform).__module__.startswith("sglang_prefillshare.")
    return CPU if is_ours and _SCHEDULER.rpartition(".")[0] in sys.modules else ()


def role_seams(settings: RoleSettings) -> tuple[Seam, ...]:
    """The seams of a role in this process; a child process gets those whose modules it has loaded."""
    from sglang_prefillshare.host.backend_choice import offer_backend

    offer_backend()
    own = PREFILL if settings.role is Role.PREFILL else DECODE
    seams = (*BOTH_ROLES, *HTTP, *own)
    if _is_child_process():
        seams = tuple(seam for seam in seams if seam.module in sys.modules)
    return seams


def _is_child_process() -> bool:
    import multiprocessing

    return multiprocessing.parent_process() is not None


def check(seam: Seam) -> None:
    """Raise `SeamError` unless the installed SGLang has the seam's target, with the parameters we know."""
    try:
        target = pkgutil.resolve_name(seam.target)
    except (ImportError, AttributeError) as error:
        raise SeamError(f"SGLang has no {seam.target} ({error}). {_wanted_version()}") from error
    found = tuple(inspect.signature(inspect.unwrap(getattr(target, "__func__", target))).parameters)
    if found != seam.parameters:
        raise SeamError(f"{seam.target} takes {found}, wanted {seam.parameters}. {_wanted_version()}")


def is_in_place(seam: Seam) -> bool:
    """Whether calls to the target go through our hook now."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    hook = seam.load_hook()
    placed = any(known is hook for _, known, _ in HookRegistry._hooks.get(seam.target, ()))
    target = pkgutil.resolve_name(seam.target)
    return placed and seam.target in HookRegistry._patched and hasattr(target, "__wrapped__")


def install(seams: Sequence[Seam]) -> None:
    """Check and place `seams`; all of them are active when this returns, or `SeamError` names the first that is not."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for seam in seams:
        check(seam)
        hook = seam.load_hook()
        if not any(known is hook for _, known, _ in HookRegistry._hooks.get(seam.target, ())):
            HookRegistry.register(seam.target, hook, HookType(seam.kind))
    HookRegistry.apply_hooks()
    for seam in seams:
        if not is_in_place(seam):
            raise SeamError(f"our hook on {seam.target} is not in place although SGLang has it. {_wanted_version()}")


def _wanted_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("sglang")
    except PackageNotFoundError:
        found = "no version"
    return (
        f"Found SGLang {found}, wanted {SGLANG_VERSION}: install that one, or run `prefillshare doctor` for all seams."
    )
