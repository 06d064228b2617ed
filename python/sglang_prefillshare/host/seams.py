"""Every place where we reach into SGLang, in one table by process (contract 5).

Each says why, which of SGLang's state the hook changes, and when it can go. A seam is placed through SGLang's own hook
registry, which logs failures and goes on. So each one is checked twice here: its parameters against those of the pinned
SGLang before it is placed, and that it really is in place afterwards.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, Literal

from sglang_prefillshare.errors import SeamError
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.settings import RoleSettings

SGLANG_VERSION: Final = "0.5.23"

Kind = Literal["around", "after", "before"]


@dataclass(frozen=True, slots=True)
class Seam:
    """One hook. `target` is SGLang's function, `hook` ours as "module:function" in this package's `host`."""

    target: str
    hook: str
    kind: Kind
    parameters: tuple[str, ...]
    _: KW_ONLY
    why: str
    changes: str
    """Which of SGLang's state the hook changes, beyond letting the function run."""
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
_TREE: Final = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_RESULTS: Final = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_NOT_A_FIELD: Final = "ServerArgs can be extended by a plugin"
_NOTHING: Final = "nothing"
_FIRST_TOKEN: Final = "SGLang can leave the first token to the decode side"

LAUNCH: Final = (
    Seam(
        f"{_ARGS}.add_cli_args", "flags:add_cli_args", "around", ("parser",),
        why="our flags", changes="the parser", retire_when=_NOT_A_FIELD,
    ),
    Seam(
        f"{_ARGS}.from_cli_args", "flags:from_cli_args", "around", ("cls", "args"),
        why="a role fills in and checks SGLang's settings", changes="the parsed arguments, before SGLang reads them",
        retire_when=_NOT_A_FIELD,
    ),
)  # fmt: skip
"""The process that is started: its command line. Placed everywhere, role or not."""

HTTP: Final = (
    Seam(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server", "http.routes:setup_http_server", "around",
        (
            "server_args", "tokenizer_manager", "template_manager", "port_args", "scheduler_infos",
            "subprocess_watchdog", "execute_warmup_func", "launch_callback",
        ),
        why="the worker's description, a leg's accounting, closed endpoints",
        changes="its app: routes, middlewares; uvicorn's HTTP protocol",
        retire_when="plugins can add routes",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request", "http.routes:generate_request",
        "around", ("self", "obj", "request"),
        why="a leg's token counts and name; lists that fit no batch; n answers over one prefill",
        changes="rid and routing_key of a request that has none; the order in which n answers are asked for",
        retire_when="plugins see a request's meta information, and SGLang checks its batches and samples n times in PD",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_texts", "http.requests:tokenize_texts",
        "around", ("self", "texts", "is_cross_encoder"),
        why="a long text of one client holds nobody up", changes=_NOTHING,
        retire_when="SGLang tokenizes beside its event loop for every endpoint",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "http.requests:validate_one_request", "before", ("self", "obj", "input_ids"),
        why="a clear 400 for what cannot be right; a prompt of one token waits for nobody",
        changes="bootstrap_host of such a prompt", retire_when="plugins can validate requests",
    ),
)  # fmt: skip
"""A worker's HTTP process, which tokenizes."""

SCHEDULER: Final = (
    Seam(
        f"{_SCHEDULER}.get_init_info", "http.routes:get_init_info", "after", ("self",),
        why="the HTTP process must know the fingerprint and the pool's size", changes="its result: one key more",
        retire_when="schedulers can publish plugin data",
    ),
    Seam(
        f"{_SCHEDULER}.publish_load_snapshot", "room:publish_load_snapshot", "after", ("self", "force"),
        why="the HTTP process can say how full the worker is, without asking",
        changes="an attribute of ours on the scheduler", retire_when="SGLang's load snapshot says what can be evicted",
    ),
    Seam(
        f"{_TREE}.checkpoint", "roles.tree:checkpoint", "after", ("self", "req", "up_to", "kwargs"),
        why="a picture of the tree that costs no walk: which nodes there are, and for whom", changes=_NOTHING,
        retire_when="SGLang describes its tree",
    ),
    Seam(
        f"{_TREE}._evict_device_leaf", "roles.tree:evict_device_leaf", "before", ("self", "node_id", "tracker"),
        why="the same, without what is gone", changes=_NOTHING, retire_when="the same",
    ),
    Seam(
        f"{_TREE}.reset", "roles.tree:reset", "after", ("self",),
        why="the same, after a flush", changes=_NOTHING, retire_when="the same",
    ),
    Seam(
        f"{_SCHEDULER}.handle_dumper_control", "roles.tree:handle_dumper_control", "around", ("self", "recv_req"),
        why="the HTTP process asks for the picture", changes=_NOTHING,
        retire_when="plugins can add messages between SGLang's processes",
    ),
)  # fmt: skip
"""The scheduler of any role."""

HALF_SCHEDULER: Final = (
    Seam(
        "sglang.srt.disaggregation.utils.get_kv_class", "transfer.backend:get_kv_class", "around",
        ("transfer_backend", "class_type"),
        why="our transfer backend's classes", changes=_NOTHING, retire_when="transfer backends can be registered",
    ),
)  # fmt: skip
"""The scheduler of either half. (Prefill's HTTP process asks for the bootstrap server's class, too.)"""

PREFILL_SCHEDULER: Final = (
    Seam(
        f"{_SCHEDULER}.init_disaggregation", "roles.prefill:init_disaggregation", "around", ("self",),
        why="the role is known before the queues shake hands",
        changes="attributes of ours on the scheduler, its tree and its metadata buffers",
        retire_when="schedulers have a plugin hook before their queues",
    ),
    Seam(
        f"{_SCHEDULER}._create_generation_req", "roles.prefill:create_generation_req", "around",
        ("self", "recv_req", "args", "kwargs"),
        why="x1..x(n-1) only, in the base's namespace, sampling neutral",
        changes="the new request: ids, sampling parameters, extra_key",
        retire_when="never: an extension point of SGLang's",
    ),
    Seam(
        f"{_BATCH}.prepare_for_extend", "roles.prefill:prepare_for_extend", "around", ("self",),
        why="stamp each KV slot with the module it is computed for", changes="a counter of ours on each request",
        retire_when="the radix tree records who inserted a node",
    ),
    Seam(
        "sglang.srt.disaggregation.utils.MetadataBuffers.set_buf", "roles.prefill:set_buf", "after", ("self", "req"),
        why="the receipt travels with the KV",
        changes="the row's unused words, its room (masked), the request's customized_info",
        retire_when="handoffs carry a token digest and a model identity",
    ),
    Seam(
        f"{_PREFILL}.PrefillBootstrapQueue._num_pages_to_send", "roles.prefill:num_pages_to_send", "around",
        ("self", "req", "decode_prefix_len"),
        why="what decode says it holds is checked", changes="a room that lies: failed", retire_when="SGLang checks it",
    ),
    Seam(
        f"{_PREFILL}.PrefillBootstrapQueue._init_kv_manager", "roles.handshake:init_kv_manager", "around", ("self",),
        why="the base's identity is in the handshake", changes="the module's get_pd_kv_layout, during the call",
        retire_when="the handshake compares model identities",
    ),
)  # fmt: skip
"""A prefill worker's scheduler."""

SAMPLING: Final = (
    Seam(
        "sglang.srt.layers.sampler.Sampler.forward", "roles.grammar:sample", "around",
        ("self", "logits_output", "sampling_info", "return_logprob", "top_logprobs_nums", "token_ids_logprobs",
         "positions", "logprob_logits"),
        why="a grammar that allows no token ends its request, not the worker", changes="logits of such a row: all 0",
        retire_when="SGLang ends requests whose grammar allows no token",
    ),
    Seam(
        f"{_RESULTS}._accept_grammar_tokens", "roles.grammar:accept_tokens", "around", ("self", "req", "tokens"),
        why="what such a request gets is a 400 with the reason", changes="the request's to_finish",
        retire_when="the same",
    ),
)  # fmt: skip
"""The scheduler of a role that samples."""

DECODE_SCHEDULER: Final = (
    Seam(
        f"{_SCHEDULER}.init_disaggregation", "roles.decode:init_disaggregation", "around", ("self",),
        why="the role is known before the queues shake hands", changes="an attribute of ours on the scheduler",
        retire_when="schedulers have a plugin hook before their queues",
    ),
    Seam(
        f"{_SCHEDULER}._create_generation_req", "roles.decode:create_generation_req", "around",
        ("self", "recv_req", "args", "kwargs"),
        why="the base's namespace", changes="the new request's extra_key",
        retire_when="never: an extension point of SGLang's",
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._pre_alloc_fill_len", "roles.decode:pre_alloc_fill_len", "around", ("req",),
        why="room for n-1 tokens of KV", changes="its result", retire_when=_FIRST_TOKEN,
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._rebootstrap_prefill_len", "roles.decode:pre_alloc_fill_len", "around",
        ("req",),
        why="ask prefill for n-1 tokens of KV", changes="its result", retire_when=_FIRST_TOKEN,
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._check_if_req_exceed_kv_capacity", "roles.decode:exceeds_kv_capacity",
        "around", ("self", "req"),
        why="what never fits is refused instead of waiting for ever", changes="such a request: aborted",
        retire_when="SGLang refuses it",
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._match_prefix_and_lock", "roles.decode:match_prefix_and_lock", "around",
        ("self", "req"),
        why="decode's cache holds the KV of x1..x(n-1); xn is computed", changes="origin_input_ids, during the call",
        retire_when=_FIRST_TOKEN,
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._init_kv_manager", "roles.handshake:init_kv_manager", "around", ("self",),
        why="the base's identity is in the handshake", changes="the module's get_pd_kv_layout, during the call",
        retire_when="the handshake compares model identities",
    ),
    Seam(
        f"{_DECODE}.DecodePreallocQueue._ensure_prefill_info", "roles.handshake:ensure_prefill_info", "around",
        ("self", "addr_to_reqs"),
        why="a refused prefill worker fails its requests at once",
        changes="those requests' rooms: failed; retry counts",
        retire_when="a handshake mismatch fails requests instead of the scheduler",
    ),
    Seam(
        "sglang.srt.disaggregation.common.conn.CommonKVManager.try_ensure_parallel_info",
        "roles.handshake:try_ensure_parallel_info", "around", ("self", "bootstrap_addr"),
        why="a mismatch is a refusal, not a crash", changes="prefill_info_table: a refused worker is taken out",
        retire_when="a handshake mismatch fails requests instead of the scheduler",
    ),
    Seam(
        f"{_DECODE}.DecodeTransferQueue._commit_transfer_to_req", "roles.decode:commit_transfer_to_req", "around",
        ("self", "decode_req"),
        why="check the receipt, drop the token that prefill sampled",
        changes="output_ids: without that token; a refused request: aborted; replay fields, during the call",
        retire_when=_FIRST_TOKEN,
    ),
    Seam(
        f"{_DECODE}.DecodeTransferQueue._abort_failed_transfer", "roles.decode:abort_failed_transfer", "around",
        ("self", "decode_req"),
        why="failed handoffs are counted", changes=_NOTHING, retire_when="SGLang counts handoffs by outcome",
    ),
    Seam(
        f"{_BATCH}.prepare_for_prebuilt", "roles.decode:prepare_for_prebuilt", "around", ("self",),
        why="the batch starts with n-1 tokens of KV; a retracted request's penalties go on",
        changes="already_computed, a counter of ours; the penalizers' rows; origin_input_ids, during the call",
        retire_when=_FIRST_TOKEN,
    ),
    Seam(
        f"{_BATCH}.process_prebuilt", "roles.decode:process_prebuilt", "around", ("self", "future_map"),
        why="xn is the first input; no grammar sees it",
        changes="skip_radix_cache_insert; grammar and output_ids, during the call", retire_when=_FIRST_TOKEN,
    ),
    Seam(
        "sglang.srt.mem_cache.common.release_kv_cache", "roles.decode:release_kv_cache", "around",
        ("req", "tree_cache", "checkpoint"),
        why="a prompt of one token that ends before its first step", changes="its row: given back",
        retire_when=_FIRST_TOKEN,
    ),
    Seam(
        f"{_RESULTS}.process_batch_result_prebuilt", "roles.decode:process_batch_result_prebuilt", "around",
        ("self", "batch"),
        why="nothing is streamed or finished before y1", changes="the batch's requests, during the call",
        retire_when=_FIRST_TOKEN,
    ),
    Seam(
        f"{_BATCH}.cumulate_penalty_output_tokens", "roles.decode:cumulate_penalty_output_tokens", "around", ("self",),
        why="xn is no output, and each y counts once: for penalties and for min_new_tokens",
        changes="the penalizers' rows: as before the call; a counter of ours on each request",
        retire_when="SGLang can leave the first token to the decode side, and counts right under overlap",
    ),
)  # fmt: skip
"""A decode worker's scheduler."""

ADAPTER_HTTP: Final = (
    Seam(
        "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._resolve_lora_path",
        "http.modules:resolve_lora_path", "around", ("self", "request_model", "explicit_lora_path"),
        why="clients ask for a module by `model`", changes=_NOTHING,
        retire_when="SGLang takes an adapter's name for a model's",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_and_resolve_lora",
        "http.modules:validate_and_resolve_lora", "around", ("self", "obj"),
        why="the base answers nobody; an unknown module is a clear error", changes=_NOTHING,
        retire_when="never: SGLang serves its base model, too",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.load_lora_adapter",
        "http.modules:load_lora_adapter", "around", ("self", "obj", "_"),
        why="a module of another base is refused, whenever it comes", changes=_NOTHING,
        retire_when="SGLang asks plugins about adapters",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.unload_lora_adapter",
        "http.modules:unload_lora_adapter", "around", ("self", "obj", "_"),
        why="what was unloaded stays so", changes="lora_ref_cache: without the module",
        retire_when="SGLang does not load it again for the next request",
    ),
)  # fmt: skip
"""The HTTP process of a worker whose modules are adapters."""

ADAPTER_SCHEDULER: Final = (
    Seam(
        "sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter", "roles.adapters:load_lora_adapter", "around",
        ("self", "lora_ref"),
        why="an adapter that fits no batch is refused when it comes, not at a request", changes="such a one: unloaded",
        retire_when="SGLang looks at an adapter's weights when it loads it",
    ),
)  # fmt: skip
"""The scheduler of a worker whose modules are adapters."""

UNIFIED_SCHEDULER: Final = (
    Seam(
        f"{_SCHEDULER}.init_disaggregation", "roles.unified:init_disaggregation", "around", ("self",),
        why="the role is known before requests come", changes="an attribute of ours on the scheduler",
        retire_when="schedulers have a plugin hook before their queues",
    ),
    Seam(
        f"{_SCHEDULER}._create_generation_req", "roles.unified:create_generation_req", "around",
        ("self", "recv_req", "args", "kwargs"),
        why="the base's namespace for every module", changes="the new request's extra_key and lora_id",
        retire_when="never: an extension point of SGLang's",
    ),
    Seam(
        f"{_BATCH}.prepare_for_extend", "roles.unified:prepare_for_extend", "around", ("self",),
        why="a retracted request's penalties go on", changes="the penalizers' rows",
        retire_when="SGLang tells new penalties of what a request has generated",
    ),
    Seam(
        "sglang.srt.mem_cache.common.match_kv_cache", "roles.unified:match_kv_cache", "around",
        ("req", "tree_cache", "token_ids", "cow_mamba", "max_prefix_len"),
        why="xn and what follows are the module's, whatever another prompt held", changes=_NOTHING,
        retire_when="SGLang knows adapters that begin within a request",
    ),
    Seam(
        f"{_TREE}.checkpoint", "roles.unified:checkpoint", "around",
        ("self", "req", "up_to", "kwargs"),
        why="the tree takes what the base computed", changes=_NOTHING,
        retire_when="SGLang knows adapters that begin within a request",
    ),
    Seam(
        "sglang.srt.lora.lora_manager.LoRAManager.prepare_lora_batch", "roles.unified:prepare_lora_batch", "around",
        ("self", "forward_batch"),
        why="x1..x(n-1) go without the adapter, xn with it, in one pass", changes=_NOTHING,
        retire_when="SGLang knows adapters that begin within a request",
    ),
    Seam(
        "sglang.srt.lora.lora_manager.LoRAManager.fetch_new_loras", "roles.unified:fetch_new_loras", "around",
        ("self", "new_loras", "running_loras"),
        why="the base is in every batch", changes="which adapters are loaded",
        retire_when="SGLang knows adapters that begin within a request",
    ),
    Seam(
        "sglang.srt.lora.lora_manager.LoRAManager.validate_lora_batch", "roles.unified:validate_lora_batch", "around",
        ("self", "lora_ids"),
        why="the base's place counts", changes=_NOTHING,
        retire_when="SGLang knows adapters that begin within a request",
    ),
    Seam(
        f"{_RESULTS}._apply_prefill_grammar", "roles.grammar:apply_prefill", "around",
        ("self", "req", "next_token_id", "already_advanced"),
        why="the same for the first token", changes="the request's to_finish", retire_when="the same",
    ),
)  # fmt: skip
"""The scheduler of a unified server."""

CPU_LAUNCH: Final = (
    Seam(
        f"{_ARGS}.check_server_args", "cpu.launch:check_server_args", "before", ("self",),
        why="forked processes need not import SGLang again", changes="multiprocessing's start method: fork",
        retire_when="SGLang forks where there is no accelerator",
    ),
)  # fmt: skip
"""The process that is started on a host without an accelerator, for stock servers and roles alike."""

CPU_SCHEDULER: Final = (
    Seam(
        f"{_SCHEDULER}.on_idle", "cpu.idle:on_idle", "around", ("self",),
        why="wait for work instead of spinning", changes="an attribute of ours on the scheduler",
        retire_when="--sleep-on-idle also wakes for KV transfers",
    ),
    Seam(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend",
        "cpu.attention:run_sdpa_forward_extend", "around",
        (
            "self", "query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens",
            "extend_prefix_lens", "extend_seq_lens", "encoder_lens", "scaling", "enable_gqa", "causal",
            "is_cross_attn", "sliding_window_size",
        ),
        why="a cached prefix costs no attention of its own again", changes="its output",
        retire_when="torch_native attends for the new tokens only",
    ),
    Seam(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_decode",
        "cpu.attention:run_sdpa_forward_decode", "around",
        (
            "self", "query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens",
            "encoder_lens", "scaling", "enable_gqa", "causal", "is_cross_attn", "sliding_window_size",
        ),
        why="decode reads each row of the pool once", changes="its output",
        retire_when="torch_native gathers rows and groups heads",
    ),
    Seam(
        "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply", "cpu.linear:apply", "around",
        ("self", "layer", "x", "bias"),
        why="products take half of the time", changes="an attribute of ours on the weight: it, packed",
        retire_when="SGLang packs weights for a CPU without sgl_kernel",
    ),
    Seam(
        "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head", "cpu.linear:compute_lm_head", "around",
        ("self", "hidden_states", "lm_head", "embedding_bias", "out"),
        why="the same for the logits", changes="the same on the head's weight", retire_when="the same",
    ),
    Seam(
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater._assert_weight_cache_inactive",
        "cpu.linear:forget_packed", "before", ("self", "op"),
        why="weights that are updated in place are packed again", changes="those attributes: dropped",
        retire_when="the same",
    ),
    Seam(
        "sglang.srt.disaggregation.common.conn.CommonKVManager.__init__", "cpu.nixl:declare_host_memory", "before",
        ("self", "args", "disaggregation_mode", "server_args", "is_mla_backend"),
        why="NIXL would register the pool as GPU memory, and spin",
        changes="kv_data_mem_kinds; NIXL's agent configuration, for good",
        retire_when="SGLang asks the pool where its memory is",
    ),
    Seam(
        "sglang.srt.lora.lora_manager.LoRAManager.__init__", "cpu.lora:init_lora_manager", "before",
        (
            "self", "base_model", "base_hf_config", "max_loras_per_batch", "load_config", "dtype", "server_args",
            "lora_backend", "max_lora_rank", "target_modules", "lora_paths",
        ),
        why="LoRA asks for pinned memory, of which there is none",
        changes="torch.tensor, zeros, empty and Tensor.pin_memory, for good: they do not pin",
        retire_when="SGLang's LoRA asks whether memory can be pinned",
    ),
)  # fmt: skip
"""Any scheduler on a host without an accelerator, stock or with a role."""

BY_PROCESS: Final = {
    "the process that is started": LAUNCH,
    "a worker's HTTP process": HTTP,
    "a scheduler with a role": SCHEDULER,
    "the scheduler of either half": HALF_SCHEDULER,
    "a scheduler that samples": SAMPLING,
    "a prefill worker's scheduler": PREFILL_SCHEDULER,
    "a decode worker's scheduler": DECODE_SCHEDULER,
    "the HTTP process of a worker with adapters, too": ADAPTER_HTTP,
    "the scheduler of a worker with adapters, too": ADAPTER_SCHEDULER,
    "a unified server's scheduler": UNIFIED_SCHEDULER,
    "the process that is started on a host without an accelerator": CPU_LAUNCH,
    "any scheduler on a host without an accelerator": CPU_SCHEDULER,
}
ALL: Final = tuple(seam for group in BY_PROCESS.values() for seam in group)


def flag_seams() -> tuple[Seam, ...]:
    return LAUNCH


def platform_seams() -> tuple[Seam, ...]:
    """The seams of the CPU platform, for stock servers and roles alike; none elsewhere."""
    from sglang.srt.platforms import current_platform

    if not type(current_platform).__module__.startswith("sglang_prefillshare."):
        return ()
    return CPU_LAUNCH + (CPU_SCHEDULER if _SCHEDULER.rpartition(".")[0] in sys.modules else ())


def role_seams(settings: RoleSettings) -> tuple[Seam, ...]:
    """The seams of a role in this process; a child process gets those whose modules it has loaded."""
    from sglang_prefillshare.host.transfer.backend import offer_backend

    offer_backend()
    with_adapters = (*ADAPTER_HTTP, *ADAPTER_SCHEDULER) if settings.adapters else ()
    seams = (*HTTP, *_OWN[settings.role], *with_adapters)
    if _is_child_process():
        seams = tuple(seam for seam in seams if seam.module in sys.modules)
    return seams


_OWN: Final = {
    Role.PREFILL: (*SCHEDULER, *HALF_SCHEDULER, *PREFILL_SCHEDULER),
    Role.DECODE: (*SCHEDULER, *HALF_SCHEDULER, *DECODE_SCHEDULER, *SAMPLING),
    Role.UNIFIED: (*SCHEDULER, *UNIFIED_SCHEDULER, *SAMPLING),
}


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
