"""Our flags on `launch_server`: parsed beside SGLang's, checked, and turned into the settings that a role needs.

A role implies a whole set of SGLang settings. What the user left open is filled in; what the user said otherwise is
refused here, before anything is loaded, with the reason and the fix.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang_prefillshare.errors import ConfigError, PrefillShareError
from sglang_prefillshare.protocol import EventStream, Role
from sglang_prefillshare.settings import BACKEND_NAME, DEFAULT_LEASE_TIMEOUT_S, NO_BACKEND, RoleSettings, publish

if TYPE_CHECKING:
    from sglang_prefillshare.identity.fingerprint import BaseIdentity

_EXPLICIT: Final = "_prefill_share_explicit"
_EXAMPLE_EVENTS_CONFIG: Final = (
    '{"publisher": "zmq", "format": "dynamo", "bind": true, "endpoint": "tcp://127.0.0.1:5557", '
    '"replay_endpoint": "tcp://127.0.0.1:5558"}'
)
_ALLOC_CONFS: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""PyTorch reads either."""


def add_cli_args(original: Callable[..., None], parser: argparse.ArgumentParser) -> None:
    """Hook on `ServerArgs.add_cli_args`."""
    from sglang_prefillshare.host.transfer.backend import offer_backend

    offer_backend()
    original(parser)
    group = parser.add_argument_group("PrefillShare")
    group.add_argument(
        "--prefill-share-role",
        choices=[role.value for role in Role],
        default=None,
        help="Run this server as one half of PrefillShare: 'prefill' serves the frozen base and fills the shared KV "
        "cache, 'decode' serves one fine-tuned decode module from it. 'unified' is both: the base with LoRA adapters "
        "(--lora-paths NAME=FOLDER ...), each a decode module. Implies what each needs of SGLang.",
    )
    group.add_argument(
        "--prefill-share-base",
        metavar="MODEL",
        default=None,
        help="The base that the decode module was fine-tuned from (path or hub id). On prefill it is the model served.",
    )
    group.add_argument(
        "--prefill-share-allow-untrained",
        action="store_true",
        default=False,
        help="Serve a decode module that has no prefillshare.json: its weights never learned to read the base's KV.",
    )
    group.add_argument(
        "--prefill-share-lease-timeout",
        metavar="SECONDS",
        type=float,
        default=DEFAULT_LEASE_TIMEOUT_S,
        help="On prefill, with the prefillshare backend: how long pages are kept for a decode worker that was told of "
        "them and does not confirm its copy (default: %(default)g).",
    )
    _remember_explicit_flags(parser)


def _remember_explicit_flags(parser: argparse.ArgumentParser) -> None:
    """Let the parsed namespace say which flags were written out: a default contradicts nothing."""
    parse = parser.parse_known_args

    def parse_known_args(args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        parsed, rest = parse(words, namespace)
        setattr(parsed, _EXPLICIT, set(filter(None, (_destination(parser, word) for word in words))))
        return parsed, rest

    setattr(parser, "parse_known_args", parse_known_args)  # noqa: B010 - this one parser only


def _destination(parser: argparse.ArgumentParser, word: str) -> str | None:
    """The setting that a word of the command line names, also when it is abbreviated; None for values."""
    name = word.split("=", 1)[0]
    options = parser._option_string_actions
    if name not in options and name.startswith("--"):
        matches = [option for option in options if option.startswith(name)]
        name = matches[0] if len(matches) == 1 else name
    return options[name].dest if name in options else None


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Hook on `ServerArgs.from_cli_args`: become a worker with a role, if the flags say so."""
    role = getattr(args, "prefill_share_role", None)
    try:
        if role is not None:
            settings = configure(Role(role), args)
            publish(settings)
            _install(settings)
        elif args.disaggregation_transfer_backend == BACKEND_NAME:
            raise ConfigError(
                "--disaggregation-transfer-backend prefillshare needs --prefill-share-role prefill or decode: it hands "
                "over a base's KV. Add the role, or choose nixl."
            )
        elif "prefill_share_lease_timeout" in getattr(args, _EXPLICIT, ()) or (
            getattr(args, "prefill_share_base", None) or getattr(args, "prefill_share_allow_untrained", False)
        ):
            raise ConfigError(
                "--prefill-share-base, --prefill-share-allow-untrained and --prefill-share-lease-timeout need "
                "--prefill-share-role prefill or decode."
            )
    except PrefillShareError as error:
        print(f"launch_server: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return original(cls, args)


def _install(settings: RoleSettings) -> None:
    from sglang_prefillshare.host.seams import install, role_seams

    install(role_seams(settings))


def configure(role: Role, args: argparse.Namespace) -> RoleSettings:
    """Check the flags against the role, fill in what it implies, and find out who the base is.

    Changes `args`. Raises `ConfigError` for flags that contradict the role, `IdentityError` for a decode module that
    does not belong to the base.
    """
    explicit: set[str] = getattr(args, _EXPLICIT, set())
    on_cpu = _is_cpu_platform()
    _refuse_contradictions(role, args)
    implied = _implied(role, args, on_cpu=on_cpu)
    for name, value in implied.items():
        found = getattr(args, name)
        if name in explicit and found != value:
            raise ConfigError(
                f"{_flag(name)} {found} contradicts --prefill-share-role {role}, which sets it to {value}. "
                "Remove the flag."
            )
        setattr(args, name, value)
    if role is Role.UNIFIED:
        if "disaggregation_transfer_backend" in explicit:
            raise ConfigError(
                "--disaggregation-transfer-backend cannot be used with --prefill-share-role unified: one server hands "
                "nothing over. Remove the flag."
            )
    else:
        if "disaggregation_transfer_backend" not in explicit:
            args.disaggregation_transfer_backend = default_backend(args.host)
        _refuse_backend(args)
    if args.load_format == "dummy":
        raise ConfigError("--load-format dummy serves random weights under the base's identity. Remove the flag.")
    if not args.prefill_share_lease_timeout > 0:
        raise ConfigError(
            f"--prefill-share-lease-timeout is {args.prefill_share_lease_timeout:g}, wanted seconds above 0."
        )
    _set_environment(args)
    return _identify(role, args)


def default_backend(host: str | None) -> str:
    """Ours where nobody else can be meant: a worker that listens on loopback only is paired on its own host."""
    if _is_loopback(host):
        return BACKEND_NAME
    print(
        f"prefillshare: --host {host} lets other hosts in, so KV is handed over through nixl. Where prefill and decode "
        "are on one host, choose --disaggregation-transfer-backend prefillshare.",
        file=sys.stderr,
    )
    return "nixl"


def _is_cpu_platform() -> bool:
    from sglang.srt.platforms import current_platform

    return bool(current_platform.device_type == "cpu")


def _implied(role: Role, args: argparse.Namespace, *, on_cpu: bool) -> dict[str, Any]:
    mode = "null" if role is Role.UNIFIED else role.value
    implied: dict[str, Any] = {"disaggregation_mode": mode, "enable_metrics": True}
    if role is Role.DECODE and not args.disable_radix_cache:
        implied["disaggregation_decode_enable_radix_cache"] = True  # incremental handoff: base KV stays on decode
    if role is Role.DECODE and on_cpu:
        implied["disaggregation_decode_retraction_backup"] = "cpu_tensor"
    has_adapters = role is Role.UNIFIED or (role is Role.DECODE and bool(args.lora_paths))
    if has_adapters:
        implied["enable_lora"] = True
    if has_adapters and on_cpu:
        implied["lora_backend"] = "torch_native"
    if role is not Role.PREFILL:
        implied["enable_cache_report"] = True  # usage.prompt_tokens_details.cached_tokens: what sharing saved
    return implied


_OF_A_BASE: Final[dict[str, tuple[Any, str]]] = {
    "disable_radix_cache": (False, "the radix tree is what the decode modules share"),
    "quantization": (None, "it would compute another KV than the base has under its identity"),
    "json_model_override_args": ("{}", "it would compute another KV than the base has under its identity"),
}
_ADAPTERS_ANSWER: Final = "adapters answer, on decode workers or with --prefill-share-role unified"
_CONTRADICTIONS: Final[dict[Role | None, dict[str, tuple[Any, str]]]] = {
    None: {
        "speculative_algorithm": (
            None,
            "speculative decoding needs the hidden states of the prompt, which the base has",
        ),
        "enable_pd_role_switch": (False, "a worker cannot change sides: its weights belong to one of them"),
        "disaggregation_decode_allocation_policy": ("early", "only the default allocation policy is supported"),
        "tokenizer_worker_num": (1, "SGLang does not load plugins in extra tokenizer workers"),
        "pp_size": (1, "pipeline parallelism is not supported yet"),
        "dp_size": (1, "start several workers behind the router instead of data parallelism inside one"),
        "attn_cp_size": (1, "context parallelism is not supported yet"),
        "dcp_size": (1, "decode context parallelism is not supported yet"),
        "enable_lora_overlap_loading": (False, "the base's place among the adapters would not be kept"),
        "enable_hisparse": (False, "its KV pool is not a plain one"),
        "enable_session_radix_cache": (False, "a session would keep generated KV as prompt"),
        "encoder_only": (False, "text models only for now"),
        "language_only": (False, "text models only for now"),
        "grpc_mode": (False, "the gRPC front end does not carry our checks"),
        "smg_grpc_mode": (False, "the gRPC front end does not carry our checks"),
        "enable_hierarchical_cache": (False, "lower cache tiers are not keyed by the base's identity yet"),
        "is_embedding": (False, "there is nothing to decode"),
    },
    Role.PREFILL: {
        **_OF_A_BASE,
        "enable_lora": (None, _ADAPTERS_ANSWER),
        "lora_paths": (None, _ADAPTERS_ANSWER),
        "prefill_share_allow_untrained": (False, "prefill serves the base, which needs no training"),
    },
    Role.UNIFIED: {
        **_OF_A_BASE,
        "prefill_share_lease_timeout": (DEFAULT_LEASE_TIMEOUT_S, "one server hands nothing over"),
    },
    Role.DECODE: {
        "prefill_share_lease_timeout": (DEFAULT_LEASE_TIMEOUT_S, "prefill is who keeps pages for decode"),
        "disaggregation_decode_enable_offload_kvcache": (
            False,
            "it would store generated KV as if the base had made it",
        ),
    },
}
"""Per role (None: both), SGLang's field, the one value that works, and why."""


def _refuse_contradictions(role: Role, args: argparse.Namespace) -> None:
    for name, (wanted, reason) in {**_CONTRADICTIONS[None], **_CONTRADICTIONS[role]}.items():
        found = getattr(args, name, wanted)
        if found != wanted and found:
            raise ConfigError(
                f"{_flag(name)}{'' if found is True else f' {found}'} cannot be used with --prefill-share-role {role}: "
                f"{reason}. Remove the flag."
            )
    if os.environ.get("SGLANG_RUST_SERVER", "0").lower() in ("1", "true"):
        raise ConfigError(
            "SGLANG_RUST_SERVER cannot be used with a role: its front end does not carry our checks. Unset it."
        )
    if os.environ.get("SGLANG_USE_HND_KVCACHE", "0").lower() in ("1", "true"):
        raise ConfigError(
            "SGLANG_USE_HND_KVCACHE cannot be used with a role: SGLang hands over NHD pools only. Unset it."
        )


def _refuse_backend(args: argparse.Namespace) -> None:
    backend = args.disaggregation_transfer_backend
    if backend == "fake":
        raise ConfigError("--disaggregation-transfer-backend fake moves no KV. Choose prefillshare or nixl.")
    refuse_allocator(backend, os.environ)
    if backend == BACKEND_NAME and args.enable_memory_saver:
        raise ConfigError(
            "--enable-memory-saver reserves the KV pool in a way that CUDA cannot share with another process. Remove "
            "the flag, or choose --disaggregation-transfer-backend nixl."
        )


def refuse_allocator(backend: str, environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` where PyTorch is told to allocate memory that our backend cannot export."""
    for name in _ALLOC_CONFS if backend == BACKEND_NAME else ():
        if "expandable_segments:true" in environ.get(name, "").lower():
            raise ConfigError(
                f"{name} asks for expandable segments, which CUDA cannot share with another process. Unset it, or "
                "choose --disaggregation-transfer-backend nixl."
            )


def _set_environment(args: argparse.Namespace) -> None:
    # SGLang would bind the KV control sockets to the address of the first network card.
    if _is_loopback(args.host):
        os.environ.setdefault("SGLANG_HOST_IP", "127.0.0.1")
    # A prefill leg whose decode leg never arrives holds its prompt until then; SGLang waits five minutes.
    os.environ.setdefault("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", "60")
    if args.tp_size > 1 and (args.device == "cpu" or (args.device is None and _is_cpu_platform())):
        # SGLang refuses more ranks than NUMA nodes, unless it is told which cores each may have.
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", cores_of_ranks(os.sched_getaffinity(0), args.tp_size))


def cores_of_ranks(cores: Collection[int], ranks: int) -> str:
    """The machine's cores dealt out to ranks, as SGLang reads them: `0,1|2,3`. Where there are too few, they share."""
    ordered = sorted(cores)
    if len(ordered) < ranks:
        return "|".join([",".join(map(str, ordered))] * ranks)
    share = len(ordered) // ranks
    return "|".join(",".join(map(str, ordered[rank * share : (rank + 1) * share])) for rank in range(ranks))


def _is_loopback(host: str | None) -> bool:
    if host in (None, "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _identify(role: Role, args: argparse.Namespace) -> RoleSettings:
    from sglang_prefillshare.identity.fingerprint import check_tokenizer, identify_base, read_config
    from sglang_prefillshare.identity.geometry import check_same_geometry
    from sglang_prefillshare.identity.manifest import check_training

    base, module = args.prefill_share_base, args.model_path
    if role is not Role.DECODE:
        if base is not None and Path(base).resolve() != Path(module).resolve() and base != module:
            raise ConfigError(
                f"--prefill-share-base is {base}, but this {role} server serves {module}, and it serves the base "
                "itself. Leave --prefill-share-base out, or give the same model."
            )
        identity = identify_base(
            module,
            tokenizer_path=args.tokenizer_path,
            chat_template=args.chat_template,
            revision=args.revision,
        )
        is_trained = role is Role.PREFILL or _check_adapters(role, args, identity)
        return RoleSettings(
            role,
            module,
            identity,
            is_trained,
            NO_BACKEND if role is Role.UNIFIED else args.disaggregation_transfer_backend,
            lease_timeout_s=args.prefill_share_lease_timeout,
            adapters=role is Role.UNIFIED,
            events=event_stream(args.kv_events_config) if role is Role.PREFILL else None,
        )
    if base is None:
        raise ConfigError(
            "--prefill-share-role decode needs --prefill-share-base MODEL: the base that the decode module was "
            "fine-tuned from, and that its prefill workers serve."
        )
    # With a tokenizer path of its own, the worker tokenizes as a prefill worker with the same path does.
    identity = identify_base(base, tokenizer_path=args.tokenizer_path, chat_template=args.chat_template)
    if args.lora_paths or args.enable_lora:
        if Path(base).resolve() != Path(module).resolve() and base != module:
            raise ConfigError(
                f"--lora-paths names adapters of the base {base}, and --model-path is {module}. Serve the base itself "
                "with its adapters, and a module with weights of its own on another worker."
            )
        is_trained = _check_adapters(role, args, identity)
        return RoleSettings(role, base, identity, is_trained, args.disaggregation_transfer_backend, adapters=True)
    check_same_geometry(read_config(base), read_config(module))
    if args.tokenizer_path is None:
        check_tokenizer(module, identity, chat_template=args.chat_template, revision=args.revision)
    is_trained = check_training(module, base, identity, allow_untrained=args.prefill_share_allow_untrained)
    return RoleSettings(role, base, identity, is_trained, args.disaggregation_transfer_backend)


def event_stream(config: str | None) -> EventStream | None:
    """What `--kv-events-config` lets a router subscribe to. One that others may want, and no router of ours can use, is
    left as it is, and stderr says why: the router then guesses. Raises `ConfigError` for what SGLang would not take."""
    if not config:
        return None
    from pydantic import ValidationError
    from sglang.srt.disaggregation.kv_events import KVEventsConfig, parse_tcp_port

    try:
        parsed = KVEventsConfig.from_cli(config)
    except ValidationError as error:
        problem = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigError(
            f"--kv-events-config {config} cannot be used ({problem}). Write it as JSON, such as "
            f"'{_EXAMPLE_EVENTS_CONFIG}'."
        ) from error
    if parsed.publisher != "zmq":
        return None
    port, replay_port = parse_tcp_port(parsed.endpoint), parse_tcp_port(parsed.replay_endpoint)
    is_wildcard = any(host in parsed.endpoint for host in ("*", "::", "0.0.0.0"))  # as SGLang sees it
    unusable = None
    if parsed.format != "dynamo":
        unusable = f"its format is {parsed.format}, and only the hashes of dynamo depend on the base"
    elif port is None or replay_port is None:
        unusable = "it needs both an endpoint and a replay_endpoint, tcp://HOST:PORT"
    elif not (is_wildcard if parsed.bind is None else parsed.bind):
        unusable = f"a publisher that connects to {parsed.endpoint} cannot be subscribed to (bind: true lets it)"
    if unusable is not None:
        print(
            f"prefillshare: the router cannot use --kv-events-config and guesses what this worker holds: {unusable}.",
            file=sys.stderr,
        )
        return None
    assert port is not None and replay_port is not None
    return EventStream(port=port, replay_port=replay_port, topic=parsed.topic)


def _check_adapters(role: Role, args: argparse.Namespace, identity: BaseIdentity) -> bool:
    """Whether each adapter of a worker was trained on its base; raises for one that cannot be served."""
    from sglang_prefillshare.identity.adapter import read_adapter
    from sglang_prefillshare.identity.manifest import check_training

    given = [_adapter_of(path) for path in args.lora_paths or ()]
    if not given:
        raise ConfigError(
            f"--prefill-share-role {role}{'' if role is Role.UNIFIED else ' with --enable-lora'} needs --lora-paths "
            "NAME=FOLDER ...: its decode modules."
        )
    names = [name for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--lora-paths names {name!r} more than once. Give each module a name of its own.")
        if name == args.served_model_name:
            raise ConfigError(
                f"--served-model-name is {name!r}, which is a module's name. Choose another for the base."
            )
    room = args.max_loras_per_batch
    if role is Role.UNIFIED and room < 2:
        raise ConfigError(f"--max-loras-per-batch is {room}, wanted 2 or more: the base takes one place in each batch.")
    trained = []
    for name, folder in given:
        adapter = read_adapter(name, folder, max_rank=args.max_lora_rank)
        trained.append(
            check_training(
                str(adapter.folder), args.model_path, identity, allow_untrained=args.prefill_share_allow_untrained
            )
        )
    return all(trained)


def _adapter_of(path: str | Mapping[str, Any]) -> tuple[str, str]:
    """Name and folder, in the forms that SGLang takes."""
    if isinstance(path, Mapping):
        return str(path["lora_name"]), str(path["lora_path"])
    name, equals, folder = path.partition("=")
    return name, folder if equals else name


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
