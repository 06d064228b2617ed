"""A benchmark as frozen values, parsed once from one YAML file. docs/benchmark.md describes every key.

Paths are looked up beside the file first, then in the working directory.
"""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec

from sglang_prefillshare.config import resolve_model
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.parsing import parse_yaml, read_yaml
from sglang_prefillshare.workloads.presets import PresetName

TopologyName = Literal["shared", "isolated", "colocated", "unified", "shared_lora", "stock_lora"]
ADAPTER_TOPOLOGIES: Final[tuple[TopologyName, ...]] = ("unified", "shared_lora", "stock_lora")
"""Those whose modules are LoRA adapters of the base; those of the others have weights of their own."""
SGLANG_RESERVED_TOKENS: Final = 512
"""What decode workers keep free for new tokens unless --num-reserved-decode-tokens says otherwise."""
TOPOLOGIES: Final[tuple[TopologyName, ...]] = get_args(TopologyName)
Flag = bool | int | float | str | None


def _check(name: str, value: object, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise ConfigError(f"{name} is {value!r}, wanted {wanted}.")


class RandomModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Llama of this shape with random weights: speed does not depend on what they are. Made under `folder`."""

    folder: str = "out/models"
    hidden_size: int = 512
    intermediate_size: int = 1536
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    vocab_size: int = 2048
    context_length: int = 8192
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora_rank: int = 16
    """Of the adapters, which change every product of a layer."""
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "context_length", "lora_rank")
        for name in names:
            _check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        _check("vocab_size", self.vocab_size, self.vocab_size >= 300, "300 or more")
        _check("heads", self.heads, self.hidden_size % self.heads == 0, f"a divisor of hidden_size {self.hidden_size}")
        _check("kv_heads", self.kv_heads, self.heads % self.kv_heads == 0, f"a divisor of heads {self.heads}")


class Models(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which models: a base and, for each agent, a decode module or an adapter or both; or all of them at random."""

    agents: tuple[str, ...] | dict[str, str]
    base: str | None = None
    adapters: dict[str, str] | None = None
    random: RandomModel | None = None

    def __post_init__(self) -> None:
        _check("agents", self.agents, len(self.agents) >= 1, "one agent or more")
        _check("agents", self.agents, len(set(self.agents)) == len(self.agents), "each name once")
        is_own = self.base is not None or self.adapters is not None or isinstance(self.agents, dict)
        if self.random is not None and is_own:
            raise ConfigError(
                "random is given with models of your own. Keep one: random with a list of agents, or base "
                "with agents: {NAME: MODEL} or adapters: {NAME: FOLDER}."
            )
        has_modules = isinstance(self.agents, dict) or self.adapters is not None
        if self.random is None and (self.base is None or not has_modules):
            raise ConfigError(
                "agents is to be {NAME: MODEL}, or adapters {NAME: FOLDER}, together with base: MODEL; or agents a "
                "list of names together with random: {}."
            )
        if self.adapters is not None:
            wanted = f"the agents: {', '.join(self.names)}"
            _check("adapters", sorted(self.adapters), set(self.adapters) == set(self.names), wanted)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.agents)


class Sweep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Points: every arrival rate (sessions a second; .inf: all at once) with every cap on concurrent sessions.

    `sessions` is how many are run at each; the workload's number otherwise.
    """

    arrival_rates: tuple[float, ...]
    max_sessions: tuple[int, ...]
    sessions: int | None = None

    def __post_init__(self) -> None:
        _check("sessions", self.sessions, self.sessions is None or self.sessions >= 1, "1 or more")
        for name in ("arrival_rates", "max_sessions"):
            values = getattr(self, name)
            _check(name, list(values), len(values) > 0 and all(value > 0 for value in values), "numbers above 0")


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sessions: a preset's or a trace's, and at which points they are asked."""

    preset: PresetName | None = None
    trace: str | None = None
    name: str | None = None
    sessions: int = 16
    turns: int | None = None
    length_scale: float = 1.0
    shares_prefix: bool = True
    answer_tokens: int | None = None
    observation_tokens: int | None = None
    shared_prefix_tokens: int | None = None
    trace_arrivals: bool = False
    sweeps: tuple[Sweep, ...] = ()

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.trace is None):
            raise ConfigError("preset or trace is to be given, and not both.")
        _check("sessions", self.sessions, self.sessions >= 1, "1 or more")
        _check("turns", self.turns, self.turns is None or self.turns >= 1, "1 or more")
        _check("length_scale", self.length_scale, 0 < self.length_scale < math.inf, "a number above 0")
        if self.trace is not None:
            for name in ("turns", "answer_tokens", "observation_tokens", "shared_prefix_tokens"):
                _check(name, getattr(self, name), getattr(self, name) is None, "nothing, since the trace says it")
        elif self.trace_arrivals:
            raise ConfigError("trace_arrivals is true without a trace. Leave it out.")
        _check("sweeps", list(self.sweeps), bool(self.points), "one sweep or more")

    @property
    def label(self) -> str:
        return self.name or self.preset or Path(self.trace or "").stem

    @property
    def points(self) -> list[tuple[float, int, int]]:
        """(arrival rate, cap, number of sessions), each rate with each cap once, in the order given."""
        found: dict[tuple[float, int], int] = {}
        for sweep in self.sweeps:
            for place in itertools.product(sweep.arrival_rates, sweep.max_sessions):
                found.setdefault(place, sweep.sessions or self.sessions)
        return [(rate, cap, sessions) for (rate, cap), sessions in found.items()]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Deadlines, in seconds: nothing waits for ever."""

    ready_s: float = 300.0
    request_s: float = 120.0
    point_s: float = 180.0
    idle_s: float = 30.0
    """After a point whose sessions all ended, for the workers to have nothing left to do. What is left is aborted."""
    stuck_s: float = 600.0
    """After that: it is waited for as long as there is less of it, and given up when nothing has changed for so long.
    SGLang's own deadlines for a handoff whose other side is gone are half of it."""

    total_s: float | None = None
    """All of it on a CPU: the machine is measured first, and lengths are made shorter to keep it."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            is_right = value is None if name == "total_s" and value is None else 0 < value < math.inf
            _check(name, value, is_right, "a number of seconds above 0")


class Workers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many of them, and their flags. `args` go to every worker of every topology, the others to some."""

    shared_prefill: int | None = None
    args: dict[str, Flag] = {}
    prefill_args: dict[str, Flag] = {}
    decode_args: dict[str, Flag] = {}
    shared_args: dict[str, Flag] = {}
    shared_decode_args: dict[str, Flag] = {}
    isolated_args: dict[str, Flag] = {}
    isolated_decode_args: dict[str, Flag] = msgspec.field(
        default_factory=lambda: {"disaggregation-decode-enable-radix-cache": True}
    )
    colocated_args: dict[str, Flag] = {}
    unified_args: dict[str, Flag] = {}
    shared_lora_args: dict[str, Flag] = {}
    stock_lora_args: dict[str, Flag] = {}
    env: dict[str, str | None] = {}
    router_args: dict[str, Flag] = {}
    shared_router_args: dict[str, Flag] = {}
    prefill_gpus: tuple[int, ...] = ()
    decode_gpus: tuple[int, ...] = ()
    """GPUs that a side's workers are dealt out to, one each; without, SGLang's choice. Colocated ones are on both."""
    cuda_mps: bool = False
    """Start CUDA MPS where it can be had, so that processes share a GPU at the same time."""
    prefill_cores: tuple[int, ...] = ()
    decode_cores: tuple[int, ...] = ()
    """Processor cores that the workers of a side run on, once they are ready; without, the system's choice."""

    def __post_init__(self) -> None:
        for name in ("prefill_cores", "decode_cores"):
            cores = getattr(self, name)
            _check(name, list(cores), set(cores) <= os.sched_getaffinity(0), f"of {sorted(os.sched_getaffinity(0))}")
        _check(
            "shared_prefill", self.shared_prefill, self.shared_prefill is None or self.shared_prefill >= 1, "1 or more"
        )

    @property
    def flags(self) -> dict[str, Flag]:
        """What decode workers of every topology are given, spelled with dashes."""
        return {name.replace("_", "-"): value for name, value in {**self.args, **self.decode_args}.items()}

    @property
    def reserved_tokens(self) -> int:
        """What decode workers keep free for new tokens."""
        reserved = self.flags.get("num-reserved-decode-tokens")
        return reserved if isinstance(reserved, int) else SGLANG_RESERVED_TOKENS


class Benchmark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One benchmark: which models, on which topologies, asked what, how often."""

    models: Models
    workloads: tuple[Workload, ...]
    out: str = "out/bench/serving"
    topologies: tuple[TopologyName, ...] = ("shared", "isolated")
    repeats: int = 3
    seed: int = 0
    token_ids: tuple[int, int] | None = None
    load_poll_s: float = 1.0
    workers: Workers = Workers()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        _check("repeats", self.repeats, self.repeats >= 1, "1 or more")
        _check("topologies", list(self.topologies), len(self.topologies) > 0, "one or more")
        _check("topologies", list(self.topologies), len(set(self.topologies)) == len(self.topologies), "each once")
        labels = [workload.label for workload in self.workloads]
        _check("workloads", labels, len(labels) > 0, "one or more")
        _check("workloads", labels, len(set(labels)) == len(labels), "different names: give each a name")
        _check("load_poll_s", self.load_poll_s, self.load_poll_s > 0, "a number of seconds above 0")
        own = self.models.random is None
        if own and self.has_adapters:
            found = [name for name in self.topologies if name in ADAPTER_TOPOLOGIES]
            _check("topologies", found, self.models.adapters is not None, "models.adapters with them")
        if own and self.has_modules:
            found = [name for name in self.topologies if name not in ADAPTER_TOPOLOGIES]
            _check("topologies", found, isinstance(self.models.agents, dict), "agents: {NAME: MODEL} with them")
        if self.token_ids is not None:
            low, high = self.token_ids
            _check("token_ids", list(self.token_ids), 0 <= low < high, "[LOW, HIGH] with 0 <= LOW < HIGH")

    @property
    def has_adapters(self) -> bool:
        return any(name in ADAPTER_TOPOLOGIES for name in self.topologies)

    @property
    def has_modules(self) -> bool:
        """Modules with weights of their own."""
        return any(name not in ADAPTER_TOPOLOGIES for name in self.topologies)

    @property
    def point_count(self) -> int:
        """Of all topologies and repeats."""
        points = sum(len(workload.points) for workload in self.workloads)
        return points * self.repeats * len(self.topologies)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as result files store them."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def load_benchmark(path: Path | str, **changes: Any) -> Benchmark:
    """Read a benchmark's file. `changes` replace keys of the top level, `length_scale` that of every workload. Raises
    `ConfigError` naming file, line and key."""
    path = Path(path)
    return _finish(read_yaml(path, Benchmark, what="benchmark"), str(path), path.parent, changes)


def parse_benchmark(text: str, *, source: str = "benchmark", directory: Path = Path(), **changes: Any) -> Benchmark:
    """The same from text."""
    return _finish(parse_yaml(text, Benchmark, source=source, what="benchmark"), source, directory, changes)


def _finish(benchmark: Benchmark, source: str, directory: Path, changes: dict[str, Any]) -> Benchmark:
    try:
        scale = changes.pop("length_scale", None)
        workloads = tuple(_with_path(workload, directory, scale) for workload in benchmark.workloads)
        models = benchmark.models
        if models.base is not None:
            models = msgspec.structs.replace(
                models,
                base=resolve_model(models.base, directory),
                agents=_resolved(models.agents, directory) if isinstance(models.agents, dict) else models.agents,
                adapters=None if models.adapters is None else _resolved(models.adapters, directory),
            )
        given = {name: value for name, value in changes.items() if value is not None}
        return msgspec.structs.replace(benchmark, models=models, workloads=workloads, **given)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _resolved(models: dict[str, str], directory: Path) -> dict[str, str]:
    return {name: resolve_model(model, directory) for name, model in models.items()}


def _with_path(workload: Workload, directory: Path, scale: float | None) -> Workload:
    given: dict[str, Any] = {} if scale is None else {"length_scale": scale}
    if workload.trace is not None:
        expanded = Path(workload.trace).expanduser()
        found = [path for path in (directory / expanded, expanded) if path.exists()]
        _check("trace", workload.trace, bool(found), "a JSONL file beside the benchmark or in the working directory")
        given["trace"] = str(found[0].resolve())
    return msgspec.structs.replace(workload, **given)
