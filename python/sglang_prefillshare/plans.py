"""What is to be run for a topology: each worker's and the router's ports, command and environment. Starts nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from sglang_prefillshare.config import ArgValue, RouterSettings, Topology, WorkerSettings, flags_of
from sglang_prefillshare.environment import has_accelerator
from sglang_prefillshare.errors import ConfigError, HandoffError
from sglang_prefillshare.handoff import proof
from sglang_prefillshare.ports import Port, Ports, is_free
from sglang_prefillshare.protocol import WORKER_INFO_PATH, Role
from sglang_prefillshare.router_admin import ADMIN_KEY_VARIABLE
from sglang_prefillshare.settings import BACKEND_NAME

WORKER_COMMAND: Final = (sys.executable, "-m", "sglang.launch_server")
ROUTER_COMMAND: Final = (sys.executable, "-m", "sglang_prefillshare.cli", "route")
WORKER_HOST: Final = "127.0.0.1"
BASE_NAME: Final = "base"
ROUTER_NAME: Final = "router"
UNIFIED_NAME: Final = "unified"
ADAPTERS_NAME: Final = "adapters"

CPU_ENV: Final[Mapping[str, str]] = {
    "OMP_NUM_THREADS": "1",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
}
"""On a host without an accelerator or for `device: cpu`, where neither the topology nor our own environment says
otherwise: several processes with several OpenMP threads each wait for one another at barriers; and a server whose
scheduler died would wait 5 s for a GPU to settle, then up to 60 s for its core dump, before it ends. What else a CPU
needs SGLang gets from our platform (`host/cpu/platform.py`), with or without `up`."""

API_KEY_VARIABLE: Final = "PREFILLSHARE_WORKER_API_KEY"
"""Hands the workers' key to the router, for which a flag would be readable by every user of the machine."""

EVENTS_AUTO: Final = "auto"
"""As that flag's value in a topology: each prefill worker publishes what its tree holds, on ports of its own."""

_UNBUFFERED: Final[Mapping[str, str]] = {"PYTHONUNBUFFERED": "1"}
_GPUS: Final = "CUDA_VISIBLE_DEVICES"
_BACKEND: Final = "disaggregation-transfer-backend"
_EVENTS_FLAG: Final = "kv-events-config"


@dataclass(frozen=True, slots=True)
class Commands:
    """What starts a worker and the router, before their flags."""

    worker: tuple[str, ...] = WORKER_COMMAND
    router: tuple[str, ...] = ROUTER_COMMAND


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What is to be run for one worker or the router, and how it is recognised as ready."""

    name: str
    role: Role | None
    module: str | None
    host: str
    port: int
    bootstrap_port: int | None
    command: tuple[str, ...]
    env: Mapping[str, str]
    ready_paths: tuple[str, ...]
    api_key: str | None = field(default=None, repr=False)
    adapters: tuple[str, ...] = ()
    """The modules of a decode worker that serves several."""
    args: Mapping[str, ArgValue] = field(default_factory=dict, repr=False)
    """The flags in its command that are no ports."""
    is_cpu: bool = False

    @property
    def likeness(self) -> Hashable:
        """What it is, wherever it listens and whatever it is called: equal to another's where that would do as well."""
        return (self.role, self.module, self.adapters, frozenset(self.args.items()), frozenset(self.env.items()))

    def shares_a_gpu_with(self, other: WorkerPlan) -> bool:
        """Whether both would have their weights and pools on one GPU. Without `gpus` SGLang takes any."""
        if self.is_cpu or other.is_cpu:
            return False
        ours, theirs = ({gpu for gpu in plan.env.get(_GPUS, "").split(",") if gpu} for plan in (self, other))
        return not ours or not theirs or bool(ours & theirs)

    @property
    def url(self) -> str:
        # A router that listens everywhere is asked for where we are.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def plan_topology(
    topology: Topology,
    *,
    ports: Ports,
    commands: Commands,
    is_cpu_host: bool,
    environ: Mapping[str, str],
) -> tuple[list[WorkerPlan], WorkerPlan]:
    """The workers, base first, and the router, each with its ports, command and environment."""
    plans = plan_workers(topology, ports=ports, commands=commands, is_cpu_host=is_cpu_host, environ=environ)
    return plans, plan_router(topology, plans, ports=ports, commands=commands, environ=environ)


def plan_workers(
    topology: Topology,
    *,
    ports: Ports,
    commands: Commands,
    is_cpu_host: bool,
    environ: Mapping[str, str],
) -> list[WorkerPlan]:
    """The workers, base first; each takes one block of `ports`, in this order."""
    plans: list[WorkerPlan] = []
    base_args = {"prefill-share-role": Role.PREFILL.value, "served-model-name": BASE_NAME}
    groups: list[tuple[str, Role, WorkerSettings, Mapping[str, ArgValue]]] = [
        (BASE_NAME, Role.PREFILL, topology.base, base_args)
    ]
    for module in topology.decode:
        own_args = _decode_args(topology, served_name=module.name)
        groups.append((module.name, Role.DECODE, module.settings, own_args))
    if topology.adapters:
        own_args = {**_decode_args(topology, served_name=BASE_NAME), "lora-paths": _lora_paths(topology)}
        groups.append((ADAPTERS_NAME, Role.DECODE, replace(topology.base, workers=1), own_args))
    for name, role, settings, told in groups:
        for index in range(settings.workers):
            plan = plan_worker(
                topology,
                settings,
                name=name if settings.workers == 1 else f"{name}.{index}",
                role=role,
                module=None if role is Role.PREFILL else name,
                own_args=told,
                ready_paths=(WORKER_INFO_PATH, "/health"),
                index=index,
                ports=ports,
                commands=commands,
                is_cpu_host=is_cpu_host,
                environ=environ,
            )
            adapters = tuple(adapter.name for adapter in topology.adapters) if name == ADAPTERS_NAME else ()
            plans.append(replace(plan, adapters=adapters))
    return plans


def _lora_paths(topology: Topology) -> tuple[str, ...]:
    return tuple(f"{adapter.name}={adapter.folder}" for adapter in topology.adapters)


def plan_unified(
    topology: Topology,
    *,
    ports: Ports,
    commands: Commands,
    is_cpu_host: bool,
    environ: Mapping[str, str],
) -> WorkerPlan:
    """The one server of a topology whose modules are adapters. It listens where the router would."""
    host, port = topology.router.host, _router_port(topology.router, ports)
    plan = plan_worker(
        topology,
        topology.base,
        name=UNIFIED_NAME,
        role=Role.UNIFIED,
        module=None,
        own_args={
            "host": host,
            "port": port,
            "prefill-share-role": Role.UNIFIED.value,
            "served-model-name": BASE_NAME,
            "lora-paths": _lora_paths(topology),
        },
        ready_paths=(WORKER_INFO_PATH, "/health"),
        index=0,
        ports=ports,
        commands=commands,
        is_cpu_host=is_cpu_host,
        environ=environ,
    )
    return replace(plan, host=host, port=port)


def choose_backend(plans: Sequence[WorkerPlan]) -> list[WorkerPlan]:
    """The plans, with NIXL for all of them where GPUs that they are dealt cannot read from each other.

    That is tried, with two short processes that see what such workers would see; a worker alone cannot know it before
    it meets another. Raises `ConfigError` where the topology asks for our own backend all the same.
    """
    named = {plan.name: _backend_of(plan) for plan in plans if plan.role is not None}
    if "nixl" in named.values():
        return list(plans)
    gpus = {
        (prefill.env.get(_GPUS, ""), decode.env.get(_GPUS, "")): (prefill, decode)
        for prefill in plans
        for decode in plans
        if (prefill.role, decode.role) == (Role.PREFILL, Role.DECODE)
    }
    for (ours, theirs), (prefill, decode) in gpus.items():
        if not ours or not theirs or ours == theirs:
            continue  # on one GPU each worker finds out by itself
        try:
            proof.prove_between(prefill.env, decode.env)
        except proof.UntriedError as error:
            print(f"prefillshare: from GPU {ours} to GPU {theirs} no handoff was tried: {error}", file=sys.stderr)
        except HandoffError as error:
            reason = f"GPU {theirs} of {decode.name} cannot take KV over from GPU {ours} of {prefill.name}: {error}"
            if BACKEND_NAME in named.values():
                raise ConfigError(f"{reason} The topology asks for {BACKEND_NAME}.") from error
            print(f"prefillshare: {reason} All workers use nixl.", file=sys.stderr)
            return [plan if plan.role is None else _with_nixl(plan) for plan in plans]
    return list(plans)


def with_backend_of(beside: Sequence[WorkerPlan], new: Sequence[WorkerPlan]) -> list[WorkerPlan]:
    """The new workers with the backend of those they come to. Raises `ConfigError` where they could not use that."""
    if "nixl" in {_backend_of(plan) for plan in beside}:
        return [plan if _backend_of(plan) else _with_nixl(plan) for plan in new]
    chosen = choose_backend([*beside, *new])
    if chosen[: len(beside)] != list(beside):
        raise ConfigError("all workers would have to use nixl then, and those who serve do not. Restart `up`.")
    return chosen[len(beside) :]


def _with_nixl(plan: WorkerPlan) -> WorkerPlan:
    return replace(plan, command=(*plan.command, *flags_of({_BACKEND: "nixl"})))


def _backend_of(plan: WorkerPlan) -> str | None:
    """The transfer backend that its command names."""
    command = list(plan.command)
    return command[command.index(f"--{_BACKEND}") + 1] if f"--{_BACKEND}" in command else None


def plan_worker(
    topology: Topology,
    settings: WorkerSettings,
    *,
    name: str,
    role: Role | None,
    module: str | None,
    own_args: Mapping[str, ArgValue],
    ready_paths: tuple[str, ...],
    index: int,
    ports: Ports,
    commands: Commands,
    is_cpu_host: bool,
    environ: Mapping[str, str],
) -> WorkerPlan:
    """One worker of `settings`, the `index`-th: `own_args` are what it is, which the topology's args can add to."""
    first_port = ports.take()
    bootstrap_port = first_port + Port.BOOTSTRAP if role is Role.PREFILL else None
    its_ports: dict[str, ArgValue] = {"port": first_port + Port.HTTP, "nccl-port": first_port + Port.NCCL}
    if bootstrap_port is not None:
        its_ports["disaggregation-bootstrap-port"] = bootstrap_port
    args = {"model-path": settings.model, "host": WORKER_HOST, **own_args, **topology.args_of(settings)}
    its_events: dict[str, ArgValue] = {}
    if args.get(_EVENTS_FLAG) == EVENTS_AUTO:
        its_events[_EVENTS_FLAG] = _events_config(first_port) if role is Role.PREFILL else None
    is_cpu = args.get("device", "cpu" if is_cpu_host else None) == "cpu"
    return WorkerPlan(
        name=name,
        role=role,
        module=module,
        host=WORKER_HOST,
        port=first_port + Port.HTTP,
        bootstrap_port=bootstrap_port,
        command=(*commands.worker, *flags_of({**its_ports, **args, **its_events})),
        env=_worker_env(topology, settings, index=index, is_cpu=is_cpu, environ=environ),
        ready_paths=ready_paths,
        api_key=topology.worker_api_key(settings),
        args=args,
        is_cpu=is_cpu,
    )


def _events_config(first_port: int) -> str:
    """Events that the router can use, for this machine alone."""
    return json.dumps(
        {
            "publisher": "zmq",
            "format": "dynamo",
            "bind": True,
            "endpoint": f"tcp://{WORKER_HOST}:{first_port + Port.EVENTS}",
            "replay_endpoint": f"tcp://{WORKER_HOST}:{first_port + Port.REPLAY}",
        }
    )


def _decode_args(topology: Topology, *, served_name: str) -> dict[str, ArgValue]:
    return {
        "prefill-share-role": Role.DECODE.value,
        "prefill-share-base": topology.base.model,
        "served-model-name": served_name,
    }


def plan_router(
    topology: Topology,
    workers: Sequence[WorkerPlan],
    *,
    ports: Ports,
    commands: Commands,
    environ: Mapping[str, str],
) -> WorkerPlan:
    """The router before `workers`. A prefill worker that belongs to one module is named with it, as decode's are."""
    router = topology.router
    port = _router_port(router, ports)
    api_key = next((worker.api_key for worker in workers if worker.api_key is not None), None)
    return WorkerPlan(
        name=ROUTER_NAME,
        role=None,
        module=None,
        host=router.host,
        port=port,
        bootstrap_port=None,
        command=router_command(router, workers, port=port, commands=commands),
        env={**environ, **_UNBUFFERED, **({} if api_key is None else {API_KEY_VARIABLE: api_key})},
        ready_paths=("/health",),
    )


def router_command(
    router: RouterSettings, workers: Sequence[WorkerPlan], *, port: int, commands: Commands
) -> tuple[str, ...]:
    """What starts the router at `port` before `workers`."""
    command = [*commands.router, "--host", router.host, "--port", str(port)]
    for worker in workers:
        flag = "--prefill" if worker.role is Role.PREFILL else "--decode"
        names = worker.adapters or (worker.module,)
        for name in names:
            command += [flag, worker.url if name is None else f"{name}={worker.url}"]
    return (*command, *flags_of(router.args, is_repeated=True))


def admin_key(router: RouterSettings, environ: Mapping[str, str]) -> str | None:
    """The key that the router's administrator chose."""
    key = router.args.get("admin-api-key", environ.get(ADMIN_KEY_VARIABLE))
    return key if isinstance(key, str) and key else None


def _router_port(router: RouterSettings, ports: Ports) -> int:
    if router.port and not is_free(router.host, router.port):
        raise ConfigError(
            f"the router cannot listen at {router.host}:{router.port}: the port is taken, or the address is not of "
            "this machine. Choose another port, or 0 for a free one."
        )
    return router.port or ports.take()


def _worker_env(
    topology: Topology, settings: WorkerSettings, *, index: int, is_cpu: bool, environ: Mapping[str, str]
) -> dict[str, str]:
    """Later ones win: CPU defaults, our own environment, the GPUs given, the topology's `env`, the worker's."""
    gpus = settings.gpus_of(index)
    return _merged(
        CPU_ENV if is_cpu else {},
        environ,
        _UNBUFFERED,
        {_GPUS: ",".join(map(str, gpus))} if gpus else {},
        topology.env,
        settings.env,
    )


def default_env(environ: Mapping[str, str], own: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """A worker's environment on this host, `own` being what a topology says of it."""
    return _merged({} if has_accelerator() else CPU_ENV, environ, _UNBUFFERED, own or {})


def _merged(*layers: Mapping[str, str | None]) -> dict[str, str]:
    """Later ones win; `None` takes a name away."""
    env = {name: value for layer in layers for name, value in layer.items()}
    return {name: value for name, value in env.items() if value is not None}
