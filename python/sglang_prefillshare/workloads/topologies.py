"""The servers that a benchmark asks, ours and stock SGLang's, as equal as can be.

    shared      N prefill workers of the base, one decode worker per model, our router
    isolated    per model a prefill worker and a decode worker of its own, NIXL, our router picks the pair (stock)
    colocated   per model one ordinary server, asked without a router (stock)

Where the models are LoRA adapters of one base:

    unified     one server, whose adapters read one KV cache
    shared_lora N prefill workers of the base, one decode worker with all adapters, our router
    stock_lora  one ordinary server with --enable-lora, in which each adapter has KV of its own (stock)

N is the number of models unless the benchmark says otherwise, so `shared` and `isolated` have as many workers of each
kind. Every worker has the same model shape and is given the same `args`, the size of its KV pool among them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from sglang_prefillshare.config import (
    AdapterModule,
    ArgValue,
    DecodeModule,
    RouterSettings,
    Topology,
    WorkerSettings,
)
from sglang_prefillshare.deployment import Deployment, DeploymentOptions, Observer
from sglang_prefillshare.environment import has_accelerator
from sglang_prefillshare.plans import Commands, WorkerPlan, plan_router, plan_worker
from sglang_prefillshare.preload import Preloader
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.workloads.config import Benchmark, TopologyName, Workers

PAIR_ROUTER_COMMAND: Final = (sys.executable, "-m", "sglang_prefillshare.routing.pairs")

STOCK_LORA_NAME: Final = "lora"

METRICS: Final[dict[str, ArgValue]] = {"enable-metrics": True, "enable-cache-report": True}
"""What our roles turn on by themselves and stock workers must be told, so that both count, and pay for counting."""


def topology_of(benchmark: Benchmark, name: TopologyName, models: Mapping[str, Path]) -> Topology:
    """The topology's workers as values. Those of stock SGLang only use `decode`, a model each."""
    if name in ("unified", "shared_lora"):
        return _of_adapters(benchmark, name, models)
    workers = benchmark.workers
    agents = benchmark.models.names
    prefill_count = workers.shared_prefill or len(agents)
    own = workers.shared_args if name == "shared" else {}
    own_decode = workers.shared_decode_args if name == "shared" else {}
    own_router = _own_router_args(benchmark) if name == "shared" else {}
    return Topology(
        base=WorkerSettings(
            str(models["base"]),
            workers=prefill_count,
            gpus=workers.prefill_gpus[:prefill_count],
            args=_args(workers.args, workers.prefill_args, own),
        ),
        decode=tuple(
            DecodeModule(
                agent,
                WorkerSettings(
                    str(models[agent]),
                    gpus=_dealt(workers.decode_gpus, place),
                    args=_args(workers.args, workers.decode_args, own, own_decode),
                ),
            )
            for place, agent in enumerate(agents)
        ),
        router=RouterSettings(args=_args(workers.router_args, own_router)),
        env=dict(workers.env),
    )


def _of_adapters(benchmark: Benchmark, name: TopologyName, models: Mapping[str, Path]) -> Topology:
    """Modules that are adapters run on workers that are started as the base's are."""
    workers = benchmark.workers
    is_unified = name == "unified"
    count = 1 if is_unified else workers.shared_prefill or len(benchmark.models.names)
    own = workers.unified_args if is_unified else workers.shared_lora_args
    both = {} if is_unified else _args(workers.prefill_args, workers.decode_args)
    return Topology(
        base=WorkerSettings(
            str(models["base"]),
            workers=count,
            gpus=workers.prefill_gpus[:count],
            args=_args(workers.args, both, own),
        ),
        decode=(),
        adapters=tuple(AdapterModule(agent, str(models[agent])) for agent in benchmark.models.names),
        is_unified=is_unified,
        router=RouterSettings(args={} if is_unified else _args(workers.router_args, _own_router_args(benchmark))),
        env=dict(workers.env),
    )


def _own_router_args(benchmark: Benchmark) -> dict[str, ArgValue]:
    """Of the router of our topologies: a request may wait for room as long as stock SGLang lets it wait in a worker."""
    return _args({"queue-timeout": benchmark.limits.request_s}, benchmark.workers.shared_router_args)


def make_deployment(
    benchmark: Benchmark,
    name: TopologyName,
    models: Mapping[str, Path],
    *,
    log_dir: Path | None = None,
    observer: Observer | None = None,
    preloader: Preloader | None = None,
) -> Deployment:
    """The topology's processes, not started yet."""
    options: dict[str, Any] = {
        "ready_timeout_s": benchmark.limits.ready_s,
        "log_dir": log_dir,
        "preloader": preloader,
    }
    topology = topology_of(benchmark, name, models)
    if name in ("shared", "unified", "shared_lora"):
        return Deployment(topology, options=DeploymentOptions(**options), observer=observer)
    if name == "isolated":
        pairs = DeploymentOptions(**options, commands=Commands(router=PAIR_ROUTER_COMMAND))
        return IsolatedDeployment(topology, workers=benchmark.workers, options=pairs, observer=observer)
    stock = ColocatedDeployment if name == "colocated" else StockLoraDeployment
    return stock(topology, workers=benchmark.workers, options=DeploymentOptions(**options), observer=observer)


class IsolatedDeployment(Deployment):
    """Stock disaggregation, per model: a prefill worker, a decode worker, SGLang's bootstrap, NIXL. No role of ours."""

    def __init__(self, topology: Topology, *, workers: Workers, **more: Any) -> None:
        super().__init__(topology, **more)
        self._settings = workers

    def _plan(self) -> tuple[list[WorkerPlan], WorkerPlan | None]:
        workers = self._settings
        plans = []
        for place, module in enumerate(self._topology.decode):
            for role, own, gpus in (
                (Role.PREFILL, workers.prefill_args, workers.prefill_gpus),
                (Role.DECODE, workers.decode_args, workers.decode_gpus),
            ):
                disaggregation: dict[str, ArgValue] = {
                    **METRICS,
                    "disaggregation-mode": role.value,
                    "disaggregation-transfer-backend": "nixl",
                }
                extra = workers.isolated_decode_args if role is Role.DECODE else {}
                args = _args(disaggregation, workers.args, own, workers.isolated_args, extra)
                name = f"{module.name}.{role.value}"
                plans.append(self._plan_stock(module, role, name, args, gpus=_dealt(gpus, place)))
        router = plan_router(
            self._topology, plans, ports=self._ports, commands=self._options.commands, environ=os.environ
        )
        return plans, router

    def _plan_stock(
        self, module: DecodeModule, role: Role | None, name: str, args: dict[str, ArgValue], *, gpus: tuple[int, ...]
    ) -> WorkerPlan:
        is_cpu_host = not has_accelerator()
        env: dict[str, str | None] = {}
        if is_cpu_host and role is Role.DECODE:
            args = {"disaggregation-decode-retraction-backup": "cpu_tensor", **args}  # the default calls CUDA
        if is_cpu_host and role is Role.PREFILL:
            # Sending a cached prefix early waits for a CUDA event.
            env["SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"] = "0"
        return plan_worker(
            self._topology,
            WorkerSettings(module.settings.model, gpus=gpus, args=args, env=env),
            name=name,
            role=role,
            module=module.name,
            own_args={"served-model-name": module.name},
            ready_paths=("/health",),
            index=0,
            ports=self._ports,
            commands=self._options.commands,
            is_cpu_host=is_cpu_host,
            environ=os.environ,
        )


class ColocatedDeployment(IsolatedDeployment):
    """One ordinary SGLang server per model, and no router: a client knows which model it wants."""

    def _plan(self) -> tuple[list[WorkerPlan], WorkerPlan | None]:
        workers = self._settings
        plans = [
            self._plan_stock(
                module,
                None,
                module.name,
                _args(METRICS, workers.args, workers.colocated_args),
                gpus=_dealt((*workers.decode_gpus, *workers.prefill_gpus), place),
            )
            for place, module in enumerate(self._topology.decode)
        ]
        return plans, None


class StockLoraDeployment(IsolatedDeployment):
    """One ordinary SGLang server with all adapters. Its radix tree keeps each one's KV by itself."""

    def _plan(self) -> tuple[list[WorkerPlan], WorkerPlan | None]:
        workers, topology = self._settings, self._topology
        lora: dict[str, ArgValue] = {
            "enable-lora": True,
            "lora-paths": tuple(f"{module.name}={module.settings.model}" for module in topology.decode),
            **({} if has_accelerator() else {"lora-backend": "torch_native"}),
        }
        server = DecodeModule(STOCK_LORA_NAME, topology.base)
        args = _args(METRICS, lora, workers.args, workers.stock_lora_args)
        gpus = _dealt(workers.prefill_gpus, 0)
        return [self._plan_stock(server, None, STOCK_LORA_NAME, args, gpus=gpus)], None


def _dealt(gpus: tuple[int, ...], place: int) -> tuple[int, ...]:
    return (gpus[place % len(gpus)],) if gpus else ()


def urls_by_agent(deployment: Deployment, agents: tuple[str, ...]) -> dict[str, str]:
    """Where each agent's calls go."""
    if deployment.router is not None:
        return dict.fromkeys(agents, deployment.router_url)
    if len(deployment.workers) == 1:
        return dict.fromkeys(agents, deployment.workers[0].url)
    return {agent: deployment.worker(agent).url for agent in agents}


def pin_workers(deployment: Deployment, workers: Workers) -> None:
    """Keep each side on its own cores, as the paper's prefill and decode workers have GPUs of their own.

    Done when all are ready, so that loading uses every core; threads that are made later inherit it.
    """
    cores: dict[Role | None, tuple[int, ...]] = {
        Role.PREFILL: workers.prefill_cores,
        Role.DECODE: workers.decode_cores,
    }
    for worker in deployment.workers:
        wanted = cores.get(worker.plan.role, ())  # a server that does both is free
        if wanted and worker.pid is not None:
            root = psutil.Process(worker.pid)
            for process in [root, *root.children(recursive=True)]:
                for thread in process.threads():
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setaffinity(thread.id, wanted)


@contextlib.contextmanager
def running(deployment: Deployment) -> Iterator[None]:
    """Inside, all its servers are ready; after it, none is left.

    Ctrl-C, SIGTERM and SIGHUP end it, also while it starts, and `KeyboardInterrupt` comes out. While it ends they only
    hurry it, so that no process is forgotten.
    """
    is_ending = was_asked = False

    def stop(*_: Any) -> None:
        nonlocal is_ending, was_asked
        was_asked = True
        if is_ending:
            deployment.request_stop()
            return
        is_ending = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with deployment:
            try:
                yield
            finally:
                is_ending = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if was_asked:
        raise KeyboardInterrupt


def _args(*layers: Mapping[str, Any]) -> dict[str, ArgValue]:
    """Flags of all layers, later ones winning; spelled with dashes."""
    return {name.replace("_", "-"): value for layer in layers for name, value in layer.items()}
