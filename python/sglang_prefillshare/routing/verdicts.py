"""Which workers fit, and which base each decode module belongs to: pure functions of what the workers say.

Every base has a pool of its own behind the router: its prefill workers, and the decode workers that read its KV. A
module is bound to the base that its workers name, so that a request is never prefilled by another (contract 4).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from sglang_prefillshare.protocol import BOUNDARY_RULE, Role, WorkerInfo
from sglang_prefillshare.routing.membership import MODULE_NAME_RULE, is_module_name


class Status(StrEnum):
    """`STARTING`: never reached yet. `REFUSED`: reachable, but does not fit. `DOWN`: was reachable. `DRAINING`: gets no
    new requests, because it leaves or somebody said so."""

    STARTING = "starting"
    READY = "ready"
    REFUSED = "refused"
    DOWN = "down"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known of one worker when it is judged; `info` is what it said last, `None` if it said nothing usable."""

    url: str
    role: Role | None
    """What it is configured as; `None` where it says itself what it is."""
    model: str | None
    info: WorkerInfo | None
    problem: str | None
    """Why a reachable worker gave no `info`."""
    lost: str | None
    """Why it is not reachable (any more)."""
    was_seen: bool
    modules: tuple[str, ...] = ()
    """The decode modules that it is there for."""
    is_draining: bool = False
    withdrawn: frozenset[str] = frozenset()
    """Modules that are not missed on it, since an administrator took them away."""

    @property
    def base(self) -> str | None:
        """The base whose KV it writes or reads, by its last word."""
        return base_named(self.info)

    @property
    def is_asked(self) -> bool:
        """It answered once, or could not be reached."""
        return self.was_seen or self.lost is not None

    def serves(self, module: str) -> bool:
        """Whether it is a decode worker that has `module`, by its last word."""
        if self.info is None or self.info.role is not Role.DECODE or module not in self.modules:
            return False
        return self.info.modules is None or module in self.info.modules


@dataclass(frozen=True, slots=True)
class Verdict:
    status: Status
    reason: str | None


NOT_REACHED: Final = Verdict(Status.STARTING, "not reached yet")


def base_named(info: WorkerInfo | None) -> str | None:
    """The base that a worker names, if it names one."""
    found = info.base_fingerprint if info is not None else None
    return found if isinstance(found, str) else None


@dataclass(frozen=True, slots=True)
class Bases:
    """What is settled between judgements."""

    known: tuple[str, ...] = ()
    """Bases that a prefill worker holds, or held while somebody still names them; the one seen first comes first."""
    of_module: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """The base that each decode module is bound to."""
    tentative: frozenset[str] = frozenset()
    """Modules that were bound before everybody had been asked once: who answers first is not to decide for good."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Verdicts by URL. `strangers` has, by URL, the modules that a ready worker serves for another base than theirs."""

    bases: Bases
    verdicts: Mapping[str, Verdict]
    strangers: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))


def judge(workers: Sequence[Observation], *, before: Bases | None = None) -> Judgement:
    """Judge all workers anew; `before` is what the last judgement settled.

    A prefill worker is of its own base's pool. A decode worker fits if a prefill worker holds its base, or held it: it
    keeps its verdict while prefill restarts. Of the bases on which reachable workers serve a module, one with a ready
    prefill worker comes before one without; among those the one that it is bound to; else that of the worker that comes
    first in `workers`. Workers that drain do not hold it.
    """
    before = before or Bases()
    verdicts = {worker.url: misfit for worker in workers if (misfit := _own_misfit(worker)) is not None}
    fitting = [worker for worker in workers if worker.url not in verdicts]
    pools: dict[str, list[WorkerInfo]] = {}
    for worker in fitting:
        assert worker.info is not None
        if worker.info.role is Role.PREFILL:
            pools.setdefault(worker.info.base_fingerprint, []).append(worker.info)
    named = {worker.base for worker in workers}
    known = tuple(dict.fromkeys([*(base for base in before.known if base in named), *pools]))
    holding = [worker for worker in fitting if not worker.is_draining]
    fed = {worker.base for worker in holding if worker.info is not None and worker.info.role is Role.PREFILL}
    is_somebody_unasked = not all(worker.is_asked for worker in workers)
    of_module: dict[str, str] = {}
    tentative: set[str] = set()
    for module in dict.fromkeys(module for worker in workers for module in worker.modules):
        is_settled = module in before.of_module and module not in before.tentative
        incumbent = before.of_module[module] if is_settled else None
        bound = _binding(module, workers, holding, fed=fed, known=known, incumbent=incumbent)
        if bound is not None:
            of_module[module] = bound
            if is_somebody_unasked and not is_settled:
                tentative.add(module)
    bases = Bases(known, MappingProxyType(of_module), frozenset(tentative))
    may_come = any(worker.role is not Role.DECODE and not worker.is_asked for worker in workers)
    strangers: dict[str, frozenset[str]] = {}
    for worker in fitting:
        assert worker.info is not None
        strange = frozenset(m for m in worker.modules if worker.serves(m) and of_module.get(m) != worker.base)
        verdicts[worker.url] = _base_verdict(worker, strange, bases=bases, pools=pools, may_come=may_come)
        strangers[worker.url] = strange
    return Judgement(bases, verdicts, strangers)


def _binding(
    module: str,
    workers: Sequence[Observation],
    holding: Sequence[Observation],
    *,
    fed: Collection[str | None],
    known: Collection[str],
    incumbent: str | None,
) -> str | None:
    """The base of `module`: of those that reachable workers name one that prefill holds now (`fed`), else one that it
    held, else any; where there is none, one that was named last. Among such the incumbent, else the first."""
    live = [worker.base for worker in holding if worker.serves(module)]
    said = [worker.base for worker in workers if worker.serves(module) and worker.base is not None]
    named = [base for base in live if base in fed] or [base for base in live if base in known] or live or said
    return incumbent if incumbent in named else next(iter(named), None)


def _own_misfit(worker: Observation) -> Verdict | None:
    if worker.lost is not None or (worker.info is None and worker.problem is None):
        return Verdict(Status.DOWN if worker.was_seen else Status.STARTING, worker.lost or "not reached yet")
    if worker.info is None:
        return Verdict(Status.REFUSED, worker.problem)
    info = worker.info
    if info.handoff_failure is not None:
        return Verdict(Status.REFUSED, f"it can hand no KV over: {info.handoff_failure}")
    if not isinstance(info.base_fingerprint, str):
        return Verdict(Status.REFUSED, f"its base_fingerprint is {info.base_fingerprint!r}, wanted a string")
    if worker.role is not None and info.role is not worker.role:
        return Verdict(Status.REFUSED, f"its role is {info.role}, and it is configured as {worker.role}")
    if info.role is Role.UNIFIED:
        return Verdict(Status.REFUSED, "its role is unified: it needs no router, ask it directly")
    if info.boundary != BOUNDARY_RULE:
        return Verdict(
            Status.REFUSED,
            f"its prompt boundary is {info.boundary!r}, and this router's is {BOUNDARY_RULE!r}: "
            "run the same sglang-prefillshare version everywhere",
        )
    if info.role is Role.PREFILL and not isinstance(info.bootstrap_port, int):
        return Verdict(Status.REFUSED, f"its bootstrap_port is {info.bootstrap_port!r}, and decode needs a port")
    if info.role is Role.DECODE:
        return _named_misfit(worker, info)
    return None


def _named_misfit(worker: Observation, info: WorkerInfo) -> Verdict | None:
    """Whether a decode worker is there for what it serves."""
    if worker.role is None:
        odd = [name for name in info.modules or [info.model] if not is_module_name(name)]
        if odd:
            return Verdict(Status.REFUSED, f"it calls a module {odd[0]!r}: {MODULE_NAME_RULE}")
    elif info.modules is not None:
        wanted = set(worker.modules) - worker.withdrawn
        if wanted and not wanted & set(info.modules):
            return Verdict(
                Status.REFUSED,
                f"it serves the modules {', '.join(info.modules) or '(none)'}, and it is configured for "
                f"{', '.join(worker.modules)}: start it with --lora-paths of that name, or correct the router's "
                "configuration",
            )
    elif info.model != worker.model:
        return Verdict(
            Status.REFUSED,
            f"it serves the model {info.model!r}, and it is configured for {worker.model!r}: "
            "start it with that --served-model-name, or correct the router's configuration",
        )
    return None


def _base_verdict(
    worker: Observation,
    strange: frozenset[str],
    *,
    bases: Bases,
    pools: Mapping[str, Sequence[WorkerInfo]],
    may_come: bool,
) -> Verdict:
    """Of a worker that fits as far as it alone is concerned. `pools` are the fitting prefill workers by base; with
    `may_come` one that was not asked yet may hold another."""
    info = worker.info
    assert info is not None
    if info.role is Role.DECODE:
        is_known = info.base_fingerprint in bases.known
        if not bases.known or (not is_known and may_come):
            return Verdict(Status.STARTING, "no prefill worker has named its base yet")
        if not is_known:
            return Verdict(
                Status.REFUSED,
                f"it reads the KV of the base {info.base_fingerprint}, and the prefill workers hold "
                f"{', '.join(bases.known)}: start it with the same base, or a prefill worker with its own",
            )
        if strange and strange >= {module for module in worker.modules if worker.serves(module)}:
            module = min(strange)
            return Verdict(
                Status.REFUSED,
                f"it reads the KV of the base {info.base_fingerprint}, and the module {module!r} is served on "
                f"{bases.of_module[module]}: give it another name, or take that module's other workers out first",
            )
    pool = pools.get(info.base_fingerprint, ())
    misfit = _pool_misfit(info, pool)
    if misfit is not None:
        return Verdict(Status.REFUSED, misfit)
    return Verdict(Status.READY, None)


def _pool_misfit(info: WorkerInfo, pool: Sequence[WorkerInfo]) -> str | None:
    """Why a worker cannot exchange KV with its base's `pool`: all of it must be able to serve every decode worker."""
    if pool and info.transfer_backend != pool[0].transfer_backend:
        return (
            f"its transfer backend is {info.transfer_backend!r}, and the prefill pool's is {pool[0].transfer_backend!r}"
        )
    if pool and info.pool_space != pool[0].pool_space:
        return (
            f"it is on another host than the prefill pool, or in a container of its own ({info.pool_space}, and the "
            f"pool is in {pool[0].pool_space}): give the containers one PID namespace and, with GPUs, one IPC "
            "namespace (--pid host --ipc host), or start all workers with --disaggregation-transfer-backend nixl"
        )
    reach = info.gpus_in_reach if info.role is Role.DECODE and isinstance(info.gpus_in_reach, dict) else {}
    for prefill in pool:
        if prefill.gpu is not None and reach.get(prefill.gpu) is False:
            return (
                f"its GPU {info.gpu} cannot read from GPU {prefill.gpu} of a prefill worker, they are no peers "
                "(nvidia-smi topo -p2p r): start both on one GPU or on peers, or start all workers with "
                "--disaggregation-transfer-backend nixl"
            )
    return None
