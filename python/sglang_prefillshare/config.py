"""A topology as frozen values: which base, which decode modules, which router. Parsed once, from one YAML file.

    base:
      model: ./models/base            # a path beside this file or in the working directory, else a hub id
      workers: 2                      # default 1
      gpus: [0, 1]                    # dealt out over the workers; left out: SGLang chooses
      args: {mem-fraction-static: 0.8}
      env: {SGLANG_LOG_MS: 1}
    decode:
      - name: coder                   # the `model` that clients ask for
        model: ./models/coder
        args: {prefill-share-allow-untrained: true}
    router: {host: 127.0.0.1, port: 8000, args: {}}   # port left out or 0: a free one
    args: {dtype: bfloat16}           # for every worker; a worker's own args win, and `null` there takes one out
    env: {HF_HUB_OFFLINE: 1}          # for every worker, likewise

Modules that are LoRA adapters of the base share one decode worker, which is started as the base's are:

    decode:
      - {name: coder, adapter: ./adapters/coder}
      - {name: planner, adapter: ./adapters/planner}

With `unified: true` that and the base are one server, at the router's `host` and `port`, and all modules are adapters.

`args` holds flags of `sglang.launch_server` (for `router`: of `prefillshare route`) without their dashes. `true` is a
switch, a list gives one flag several values, a mapping is passed as JSON, and `false` or `null` leaves the flag
out. `kv-events-config: auto` has each prefill worker tell the router what its radix tree holds, on ports that are found
for it. An unknown or repeated key is an error. Starting what is described here is `deployment.py`'s task.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from sglang_prefillshare.errors import ConfigError

ArgValue = bool | int | float | str | None | tuple[str, ...]
T = TypeVar("T")

RESERVED_NAMES: Final = frozenset({"adapters", "base", "router"})
"""Names that logs and status give to our own processes."""

WORKER_FLAGS_OF_UP: Final = frozenset(
    {
        "base-gpu-id",
        "disaggregation-bootstrap-port",
        "host",
        "model",
        "model-path",
        "nccl-port",
        "port",
        "prefill-share-base",
        "prefill-share-role",
        "served-model-name",
    }
)
"""Flags that `up` derives from the topology for each worker; given in `args` they would contradict it."""

ROUTER_FLAGS_OF_UP: Final = frozenset({"decode", "host", "port", "prefill"})

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FLAG: Final = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How the workers of one model run. `env` values of `None` remove a variable."""

    model: str
    workers: int = 1
    gpus: tuple[int, ...] = ()
    args: Mapping[str, ArgValue] = field(default_factory=dict)
    env: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is empty, wanted a path or a hub id.")
        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}, wanted 1 or more.")
        if len(self.gpus) > self.workers and len(self.gpus) % self.workers:
            raise ConfigError(
                f"{len(self.gpus)} gpus cannot be dealt evenly to {self.workers} workers. "
                "Give as many to each, or fewer gpus than workers to share them."
            )
        _check_flags(self.args, WORKER_FLAGS_OF_UP, "sglang.launch_server")

    def gpus_of(self, index: int) -> tuple[int, ...]:
        """The GPUs of the worker `index`: an equal share, or one shared with others where there are too few."""
        if len(self.gpus) < self.workers:
            return (self.gpus[index % len(self.gpus)],) if self.gpus else ()
        share = len(self.gpus) // self.workers
        return self.gpus[index * share : (index + 1) * share]


@dataclass(frozen=True, slots=True)
class DecodeModule:
    """One decode module: the name that clients ask for, and its workers."""

    name: str
    settings: WorkerSettings

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """A decode module on the base's own weights: the name that clients ask for, and the folder of its LoRA adapter."""

    name: str
    folder: str

    def __post_init__(self) -> None:
        _check_name(self.name)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name is {name!r}, wanted letters, digits, '.', '_' and '-', beginning with a letter or digit."
        )
    if name in RESERVED_NAMES:
        raise ConfigError(f"name {name!r} is taken by our own processes. Name the module after what it does.")


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Where the router listens. Port 0 is a free one."""

    host: str = "127.0.0.1"
    port: int = 0
    args: Mapping[str, ArgValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, wanted 0 (a free one) to 65535.")
        if not self.host:
            raise ConfigError("host is empty, wanted an address such as 127.0.0.1.")
        _check_flags(self.args, ROUTER_FLAGS_OF_UP, "prefillshare route")


@dataclass(frozen=True, slots=True)
class Topology:
    """One base, the decode modules that read its KV, and the router before them. `args` and `env` are all workers'.

    `adapters` share one decode worker, which is started as the base's are. With `is_unified` there is one server
    instead of everything, where `router` says.
    """

    base: WorkerSettings
    decode: tuple[DecodeModule, ...]
    router: RouterSettings = field(default_factory=RouterSettings)
    args: Mapping[str, ArgValue] = field(default_factory=dict)
    env: Mapping[str, str | None] = field(default_factory=dict)
    adapters: tuple[AdapterModule, ...] = ()
    is_unified: bool = False

    def __post_init__(self) -> None:
        _check_flags(self.args, WORKER_FLAGS_OF_UP, "sglang.launch_server")
        if not self.decode and not self.adapters:
            raise ConfigError("decode is empty, wanted at least one decode module.")
        if self.is_unified and self.decode:
            raise ConfigError(
                f"the modules of a unified server are adapters, and {self.decode[0].name} has a model of its own. "
                "Give it an adapter, or leave out unified."
            )
        if self.is_unified and (self.base.workers > 1 or self.router.args):
            raise ConfigError(
                "a unified server is one process: several workers of the base, and args of the router, have no place "
                "in it. Leave them out, or unified."
            )
        if self.adapters and "lora-paths" in self.args_of(self.base):
            raise ConfigError("args sets lora-paths, which the key adapter of each module does. Remove it.")
        names = [*(module.name for module in self.decode), *(module.name for module in self.adapters)]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"decode names {', '.join(repeated)} twice. Several workers of one module are `workers: N`, "
                "and different modules need different names."
            )
        if len(self._api_keys()) > 1:
            raise ConfigError(
                "api-key differs between the workers, and the router knows one key. "
                "Give it once, in the topology's own args."
            )

    def args_of(self, settings: WorkerSettings) -> dict[str, ArgValue]:
        """The flags of these workers: their own before those of all."""
        return {**self.args, **settings.args}

    def worker_api_key(self, settings: WorkerSettings) -> str | None:
        """The key that these workers ask for."""
        key = self.args_of(settings).get("api-key")
        return key if isinstance(key, str) else None

    @property
    def shared_api_key(self) -> str | None:
        """The one key of those workers that ask for one."""
        return next(iter(self._api_keys()), None)

    def _api_keys(self) -> set[str]:
        workers = [self.base, *(module.settings for module in self.decode)]
        return {key for settings in workers if (key := self.worker_api_key(settings)) is not None}


def load_topology(path: Path | str) -> Topology:
    """Read a topology file. Raises `ConfigError` naming file, line and key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the topology {path}: {reason}.") from error
    return parse_topology(text, source=str(path), directory=path.parent)


def topology_from(data: Mapping[str, Any], *, directory: Path | str = ".") -> Topology:
    """The same checks for a topology that a program wrote as plain values."""
    return parse_topology(yaml.safe_dump(dict(data)), source="topology", directory=Path(directory))


def parse_topology(text: str, *, source: str, directory: Path) -> Topology:
    """Parse YAML `text`; `source` names it in errors, and models are looked up from `directory` first."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{source} is empty, wanted the keys base and decode.")
        return _Parser(loader, source, directory).topology(root)
    except yaml.YAMLError as error:
        raise yaml_error(error, source) from error
    finally:
        loader.dispose()


def yaml_error(error: yaml.YAMLError, source: str) -> ConfigError:
    """What is wrong with YAML that could not be read, with file and line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return ConfigError(f"{source}: not valid YAML: {error}.")
    mark = error.problem_mark or error.context_mark
    where = f"{source}:{mark.line + 1}" if mark else source
    return ConfigError(f"{where}: not valid YAML: {error.problem or error.context}.")


def flags_of(args: Mapping[str, ArgValue], *, is_repeated: bool = False) -> list[str]:
    """`args` as command-line arguments. A list follows its flag, or repeats it for each value."""
    flags: list[str] = []
    for name, value in args.items():
        if value is None or value is False:
            continue
        if isinstance(value, tuple) and is_repeated:
            flags += [part for item in value for part in (f"--{name}", item)]
            continue
        flags.append(f"--{name}")
        if isinstance(value, tuple):
            flags.extend(value)
        elif value is not True:
            flags.append(str(value))
    return flags


def resolve_model(model: str, directory: Path) -> str:
    """An absolute path if `model` exists beside the topology or in the working directory, else `model` as a hub id."""
    expanded = Path(model).expanduser()
    for candidate in (directory / expanded, expanded):
        if candidate.exists():
            return str(candidate.resolve())
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(
            f"model {model!r} does not exist, neither from {directory.resolve()} nor from the working directory. "
            "Give the folder of a checkpoint, or a hub id such as org/name."
        )
    return model


def _check_flags(args: Mapping[str, ArgValue], ours: frozenset[str], command: str) -> None:
    for name in args:
        if not _FLAG.fullmatch(name):
            raise ConfigError(
                f"args has {name!r}, wanted a flag of `{command}` without its dashes, such as {_plain_flag(name)!r}."
            )
        if name in ours:
            raise ConfigError(f"args sets {name}, which `prefillshare up` sets itself. {_instead(name)}")


def _plain_flag(name: str) -> str:
    return name.strip("-").replace("_", "-").lower() or "max-total-tokens"


def _instead(name: str) -> str:
    if name in ("model", "model-path", "served-model-name", "prefill-share-base"):
        return "Use the keys model and name."
    if name == "base-gpu-id":
        return "Use the key gpus."
    if name in ("prefill", "decode"):
        return "The router is given every worker of this topology."
    if name in ("host", "port"):
        return "Remove it; only the router's own host and port keys can be chosen."
    return "Remove it."


class _Parser:
    """Walks YAML nodes rather than values, because nodes know their line."""

    def __init__(self, loader: yaml.SafeLoader, source: str, directory: Path) -> None:
        self._loader = loader
        self._source = source
        self._directory = directory

    def topology(self, root: yaml.Node) -> Topology:
        self._refuse_repeats(root)
        keys = self._mapping(
            root, "the topology", required=("base", "decode"), optional=("unified", "router", "args", "env")
        )
        decode = keys["decode"]
        if not isinstance(decode, yaml.SequenceNode):
            raise self._error(decode, f"decode is {self._kind(decode)}, wanted a list of decode modules.")
        is_unified = self._bool(keys["unified"], "unified") if "unified" in keys else False

        def is_adapter(node: yaml.Node) -> bool:
            keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            return "adapter" in keys or (is_unified and "model" not in keys)

        places = [(node, f"decode[{index}]") for index, node in enumerate(decode.value)]
        return self._build(
            root,
            Topology,
            base=self._settings(keys["base"], "base"),
            decode=tuple(self._module(node, where) for node, where in places if not is_adapter(node)),
            adapters=tuple(self._adapter(node, where) for node, where in places if is_adapter(node)),
            is_unified=is_unified,
            router=self._router(keys["router"]) if "router" in keys else RouterSettings(),
            args=self._shared_args(keys["args"]) if "args" in keys else {},
            env=self._env(keys["env"], "env") if "env" in keys else {},
        )

    def _settings(self, node: yaml.Node, where: str, *, extra: tuple[str, ...] = ()) -> WorkerSettings:
        keys = self._mapping(node, where, required=(*extra, "model"), optional=("workers", "gpus", "args", "env"))
        model = keys["model"]
        try:
            path = resolve_model(self._text(model, f"{where}.model"), self._directory)
        except ConfigError as error:
            raise self._error(model, f"{where}: {error}") from error
        return self._build(
            node,
            WorkerSettings,
            where,
            model=path,
            workers=self._int(keys["workers"], f"{where}.workers") if "workers" in keys else 1,
            gpus=self._gpus(keys["gpus"], f"{where}.gpus") if "gpus" in keys else (),
            args=self._args(keys["args"], f"{where}.args") if "args" in keys else {},
            env=self._env(keys["env"], f"{where}.env") if "env" in keys else {},
        )

    def _module(self, node: yaml.Node, where: str) -> DecodeModule:
        settings = self._settings(node, where, extra=("name",))
        name = self._mapping(node, where, optional=None)["name"]
        return self._build(name, DecodeModule, where, name=self._text(name, f"{where}.name"), settings=settings)

    def _adapter(self, node: yaml.Node, where: str) -> AdapterModule:
        keys = self._mapping(node, where, required=("name", "adapter"))
        folder = self._text(keys["adapter"], f"{where}.adapter")
        try:
            path = resolve_model(folder, self._directory)
        except ConfigError as error:
            raise self._error(keys["adapter"], f"{where}: {error}") from error
        return self._build(node, AdapterModule, where, name=self._text(keys["name"], f"{where}.name"), folder=path)

    def _router(self, node: yaml.Node) -> RouterSettings:
        keys = self._mapping(node, "router", optional=("host", "port", "args"))
        return self._build(
            node,
            RouterSettings,
            "router",
            host=self._text(keys["host"], "router.host") if "host" in keys else "127.0.0.1",
            port=self._int(keys["port"], "router.port") if "port" in keys else 0,
            args=self._args(keys["args"], "router.args") if "args" in keys else {},
        )

    def _shared_args(self, node: yaml.Node) -> dict[str, ArgValue]:
        args = self._args(node, "args")
        # Checked by `Topology` too, which does not know the line.
        self._build(node, _check_flags, args=args, ours=WORKER_FLAGS_OF_UP, command="sglang.launch_server")
        return args

    def _args(self, node: yaml.Node, where: str) -> dict[str, ArgValue]:
        # SGLang spells its flags with dashes, its own configuration files with either: both name the same flag.
        args: dict[str, ArgValue] = {}
        for key, value in self._mapping(node, where, optional=None).items():
            flag = key.replace("_", "-") if _NAME.fullmatch(key) else key
            if flag in args:
                raise self._error(value, f"{where} has {flag} twice.")
            args[flag] = self._arg(value, f"{where}.{flag}")
        return args

    def _arg(self, node: yaml.Node, where: str) -> ArgValue:
        if isinstance(node, yaml.SequenceNode):
            if not node.value:
                raise self._error(node, f"{where} is an empty list. Leave the flag out, or give `true` for a switch.")
            return tuple(self._text(item, f"{where}[{index}]") for index, item in enumerate(node.value))
        if isinstance(node, yaml.MappingNode):
            return json.dumps(self._value(node))
        value = self._value(node)
        return value if value is None or isinstance(value, bool) else str(node.value)

    def _env(self, node: yaml.Node, where: str) -> dict[str, str | None]:
        env: dict[str, str | None] = {}
        for name, value in self._mapping(node, where, optional=None).items():
            is_absent = isinstance(value, yaml.ScalarNode) and self._value(value) is None
            env[name] = None if is_absent else self._text(value, f"{where}.{name}")
        return env

    def _gpus(self, node: yaml.Node, where: str) -> tuple[int, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node, f"{where} is {self._kind(node)}, wanted a list such as [0, 1].")
        return tuple(self._int(item, f"{where}[{index}]") for index, item in enumerate(node.value))

    def _mapping(
        self,
        node: yaml.Node,
        where: str,
        *,
        required: Sequence[str] = (),
        optional: Sequence[str] | None = (),
    ) -> dict[str, yaml.Node]:
        """The values of a mapping by key. `optional=None` allows any key."""
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{where} is {self._kind(node)}, wanted a mapping.")
        self._loader.flatten_mapping(node)  # resolves `<<`, whose keys ours may override
        keys = {str(key.value): value for key, value in node.value}
        known = (*required, *optional) if optional is not None else None
        for key, _ in node.value:
            if known is not None and key.value not in known:
                near = difflib.get_close_matches(str(key.value), known, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise self._error(
                    key, f"{where} has an unknown key {key.value!r}, wanted {', '.join(sorted(known))}.{hint}"
                )
        if missing := [key for key in required if key not in keys]:
            raise self._error(node, f"{where} lacks the key {' and '.join(missing)}. Add it.")
        return keys

    def _refuse_repeats(self, node: yaml.Node) -> None:
        """Looks at the whole tree before merges; after them, a key that is there twice may be one overridden."""
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._refuse_repeats(item)
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise self._error(key, f"{self._kind(key)} is used as a key, wanted a name.")
                if key.value in seen:
                    raise self._error(key, f"the key {key.value!r} is there twice. Keep one.")
                seen.add(key.value)
                self._refuse_repeats(value)

    def _text(self, node: yaml.Node, where: str) -> str:
        """The scalar as it was written, so that 0.850 stays 0.850 and a numeric name stays a name."""
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, f"{where} is {self._kind(node)}, wanted text.")
        value = self._value(node)
        if value is None:
            raise self._error(node, f"{where} is empty, wanted text.")
        if isinstance(value, bool):
            raise self._error(node, f"{where} is {node.value}, which YAML reads as a boolean. Quote it.")
        return str(node.value)

    def _int(self, node: yaml.Node, where: str) -> int:
        value = self._value(node) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(value, bool) or not isinstance(value, int):
            found = repr(node.value) if isinstance(node, yaml.ScalarNode) else self._kind(node)
            raise self._error(node, f"{where} is {found}, wanted a whole number.")
        return value

    def _bool(self, node: yaml.Node, where: str) -> bool:
        value = self._value(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(value, bool):
            found = repr(node.value) if isinstance(node, yaml.ScalarNode) else self._kind(node)
            raise self._error(node, f"{where} is {found}, wanted true or false.")
        return value

    def _value(self, node: yaml.Node) -> Any:
        return self._loader.construct_object(node, deep=True)

    def _build(self, node: yaml.Node, make: Callable[..., T], where: str = "", **values: Any) -> T:
        """Construct a value; what its own checks refuse is told with file and line."""
        try:
            return make(**values)
        except ConfigError as error:
            raise self._error(node, f"{where}: {error}" if where else str(error)) from error

    def _error(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(f"{self._source}:{node.start_mark.line + 1}: {message}")

    @staticmethod
    def _kind(node: yaml.Node) -> str:
        if isinstance(node, yaml.MappingNode):
            return "a mapping"
        if isinstance(node, yaml.SequenceNode):
            return "a list"
        return f"the value {node.value!r}" if node.value else "empty"
