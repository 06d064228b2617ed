"""The workers the router may use: what they say of themselves, whether they fit, and the legs they carry.

`judge` decides (pure); `WorkerPool` asks them once a poll interval and keeps the verdicts. A worker takes requests
only while it fits: a process that comes back with another base is refused at the next poll (contract 4).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from sglang_prefillshare.errors import WorkerError
from sglang_prefillshare.protocol import BOUNDARY_RULE, WORKER_INFO_PATH, Role, WorkerInfo
from sglang_prefillshare.request_fields import NO_LIMITS, Limits
from sglang_prefillshare.routing.admission import Stock, foreign_tokens
from sglang_prefillshare.routing.breaker import Breaker, Permit
from sglang_prefillshare.routing.config import BreakerConfig, RouterConfig
from sglang_prefillshare.routing.holdings import NOTHING, Hold, Holdings
from sglang_prefillshare.routing.policy import DecodeSnapshot, PrefillSnapshot
from sglang_prefillshare.routing.prefix_index import BYTES_PER_TOKEN, PrefixIndex
from sglang_prefillshare.routing.sharing import ComputeRate
from sglang_prefillshare.routing.worker_metrics import WORKER_METRICS_PATH

logger = logging.getLogger(__name__)


class Status(StrEnum):
    """`STARTING`: never reached yet. `REFUSED`: reachable, but does not fit. `DOWN`: was reachable."""

    STARTING = "starting"
    READY = "ready"
    REFUSED = "refused"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known of one worker when it is judged; `info` is `None` while it is not reachable."""

    url: str
    role: Role
    model: str | None
    info: WorkerInfo | None
    problem: str | None
    """Why a reachable worker gave no `info`."""
    lost: str | None
    """Why it is not reachable (any more)."""
    was_seen: bool
    modules: tuple[str, ...] = ()
    """The decode modules that it is configured for."""


@dataclass(frozen=True, slots=True)
class Verdict:
    status: Status
    reason: str | None


def judge(workers: Sequence[Observation], *, incumbent: str | None) -> tuple[str | None, dict[str, Verdict]]:
    """The reference base and a verdict for each worker by URL.

    The reference is the fingerprint that most fitting prefill workers have; among equals the `incumbent` (the last
    reference), then the one configured first. It outlives its last prefill worker, so that decode workers keep
    their verdict while prefill restarts.
    """
    verdicts: dict[str, Verdict] = {}
    prefill_infos: list[WorkerInfo] = []
    for worker in workers:
        misfit = _own_misfit(worker)
        if misfit is not None:
            verdicts[worker.url] = misfit
        elif worker.role is Role.PREFILL:
            assert worker.info is not None
            prefill_infos.append(worker.info)

    votes = Counter(info.base_fingerprint for info in prefill_infos)
    reference = incumbent
    if votes:
        most = max(votes.values())
        leaders = [fingerprint for fingerprint, count in votes.items() if count == most]
        reference = incumbent if incumbent in leaders else leaders[0]
    pool = [info for info in prefill_infos if info.base_fingerprint == reference]

    for worker in workers:
        if worker.url not in verdicts:
            assert worker.info is not None
            verdicts[worker.url] = _base_verdict(worker.info, reference=reference, pool=pool)
    return reference, verdicts


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
    if info.role is not worker.role:
        return Verdict(Status.REFUSED, f"its role is {info.role}, and it is configured as {worker.role}")
    if info.boundary != BOUNDARY_RULE:
        return Verdict(
            Status.REFUSED,
            f"its prompt boundary is {info.boundary!r}, and this router's is {BOUNDARY_RULE!r}: "
            "run the same sglang-prefillshare version everywhere",
        )
    if worker.role is Role.PREFILL and not isinstance(info.bootstrap_port, int):
        return Verdict(Status.REFUSED, f"its bootstrap_port is {info.bootstrap_port!r}, and decode needs a port")
    if worker.role is Role.DECODE and info.modules is not None:
        if not set(worker.modules) & set(info.modules):
            return Verdict(
                Status.REFUSED,
                f"it serves the modules {', '.join(info.modules) or '(none)'}, and it is configured for "
                f"{', '.join(worker.modules)}: start it with --lora-paths of that name, or correct the router's "
                "configuration",
            )
    elif worker.role is Role.DECODE and info.model != worker.model:
        return Verdict(
            Status.REFUSED,
            f"it serves the model {info.model!r}, and it is configured for {worker.model!r}: "
            "start it with that --served-model-name, or correct the router's configuration",
        )
    return None


def _largest(values: Sequence[int | None]) -> int | None:
    """None, which is no limit, is larger than any."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _least(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return min(known, default=None)


def _base_verdict(info: WorkerInfo, *, reference: str | None, pool: Sequence[WorkerInfo]) -> Verdict:
    """`pool`: the prefill workers of the reference base. Each of them must be able to serve every decode worker."""
    if reference is None:
        return Verdict(Status.STARTING, "no prefill worker has named its base yet")
    if info.base_fingerprint != reference:
        what = "prefills for" if info.role is Role.PREFILL else "reads the KV of"
        return Verdict(
            Status.REFUSED,
            f"it {what} the base {info.base_fingerprint}, and the prefill pool holds {reference}: "
            "start it with the same base",
        )
    if pool and info.transfer_backend != pool[0].transfer_backend:
        return Verdict(
            Status.REFUSED,
            f"its transfer backend is {info.transfer_backend!r}, and the prefill pool's is "
            f"{pool[0].transfer_backend!r}",
        )
    if pool and info.pool_space != pool[0].pool_space:
        return Verdict(
            Status.REFUSED,
            f"it is on another host than the prefill pool, or in a container of its own ({info.pool_space}, and the "
            f"pool is in {pool[0].pool_space}): give the containers one PID namespace and, with GPUs, one IPC "
            "namespace (--pid host --ipc host), or start all workers with --disaggregation-transfer-backend nixl",
        )
    reach = info.gpus_in_reach if info.role is Role.DECODE and isinstance(info.gpus_in_reach, dict) else {}
    for prefill in pool:
        if prefill.gpu is not None and reach.get(prefill.gpu) is False:
            return Verdict(
                Status.REFUSED,
                f"its GPU {info.gpu} cannot read from GPU {prefill.gpu} of a prefill worker, they are no peers "
                "(nvidia-smi topo -p2p r): start both on one GPU or on peers, or start all workers with "
                "--disaggregation-transfer-backend nixl",
            )
    return Verdict(Status.READY, None)


class Leg:
    """One half of a request on its worker. `legs` counts it from the moment its worker is chosen, so that requests
    that arrive together see each other; `fail` ends it from outside."""

    __slots__ = ("began_s", "ended", "hold", "is_complete", "lost_reason", "permit", "task", "tokens")

    def __init__(self, *, tokens: int, hold: Hold = NOTHING) -> None:
        self.tokens = tokens
        self.hold = hold
        self.permit: Permit | None = None  # set when it is counted
        self.began_s = 0.0  # likewise, by `time.monotonic`
        self.ended: asyncio.Event | None = None  # made by whoever waits for its end
        self.task: asyncio.Task[Any] | None = None  # set when the leg starts
        self.is_complete = False  # the worker has nothing left to abort
        self.lost_reason: str | None = None

    def fail(self, reason: str) -> None:
        if self.lost_reason is None:
            self.lost_reason = reason
            if self.task is not None:
                self.task.cancel()


def _ignore() -> None:
    pass


@dataclass(slots=True, eq=False)
class Worker:
    """One configured worker: its last description, verdict, and load.

    `model` is `None` for prefill; on decode it is its module's name, or the names of all.
    """

    url: str
    role: Role
    model: str | None
    info: WorkerInfo | None = None
    problem: str | None = None
    lost: str | None = None
    was_seen: bool = False
    misses: int = 0
    is_silent: asyncio.Event = field(default_factory=asyncio.Event)
    """Set from the first failed attempt to reach it to the next successful poll: long before it counts as down."""
    verdict: Verdict = Verdict(Status.STARTING, "not reached yet")
    legs: set[Leg] = field(default_factory=set)
    inflight_tokens: int = 0
    modules: tuple[str, ...] = ()
    """The decode modules that it is configured for."""
    holdings: Holdings = field(default_factory=lambda: Holdings(block_tokens=1))
    """What `legs` hold there."""
    foreign_tokens: int = 0
    """What others hold there, by the last two polls."""
    foreign_seen: int = 0
    """The same by the last poll alone."""
    full_until_s: float = 0.0
    """By `time.monotonic`: until then it takes nothing more, as it said itself (429, 503)."""
    rate: ComputeRate = field(default_factory=ComputeRate)
    breaker: Breaker = field(default_factory=lambda: Breaker(BreakerConfig()))
    on_change: Callable[[], None] = _ignore
    """Called when it may have more room than before."""

    @property
    def is_ready(self) -> bool:
        return self.verdict.status is Status.READY

    def is_ready_for(self, module: str) -> bool:
        """A decode worker with adapters may be without one of them."""
        return self.is_ready and (self.adapters is None or module in self.adapters)

    @property
    def adapters(self) -> Sequence[str] | None:
        """The modules that it serves as adapters; None where it serves one with weights of its own."""
        return self.info.modules if self.info is not None and self.role is Role.DECODE else None

    @property
    def is_reachable(self) -> bool:
        """It answers, whether or not it fits."""
        return self.lost is None and self.was_seen

    @property
    def label(self) -> str:
        return f"prefill worker {self.url}" if self.role is Role.PREFILL else f"worker {self.url} of {self.model!r}"

    @property
    def served_model(self) -> str | None:
        """The decode module's name, or what a prefill worker calls the base; `None` until it said so."""
        return self.model if self.model is not None else (self.info.model if self.info else None)

    @property
    def bootstrap(self) -> tuple[str, int]:
        """Where decode workers meet this prefill worker. Only for a ready one."""
        assert self.info is not None and self.info.bootstrap_port is not None
        host = urlsplit(self.url).hostname
        assert host is not None
        return (f"[{host}]" if ":" in host else host), self.info.bootstrap_port

    def begin(self, leg: Leg) -> None:
        self.legs.add(leg)
        self.inflight_tokens += leg.tokens
        self.holdings.take(leg.hold)
        leg.permit = self.breaker.permit()
        leg.began_s = time.monotonic()

    def end(self, leg: Leg) -> None:
        """Uncount a leg; doing it again changes nothing."""
        if leg in self.legs:
            self.legs.remove(leg)
            self.inflight_tokens -= leg.tokens
            self.holdings.give_back(leg.hold)
            assert leg.permit is not None
            self.breaker.give_back(leg.permit)
            if leg.ended is not None:
                leg.ended.set()
            self.on_change()

    def stock(self, now_s: float) -> Stock:
        """How full it is, for admission."""
        return Stock(
            self.role,
            self.info.room if self.info is not None else None,
            held_tokens=self.holdings.tokens,
            foreign_tokens=self.foreign_tokens,
            leg_count=len(self.legs),
            backlog_tokens=self.inflight_tokens,
            is_full=now_s < self.full_until_s,
        )

    def observation(self) -> Observation:
        return Observation(
            url=self.url,
            role=self.role,
            model=self.model,
            modules=self.modules,
            info=self.info,
            problem=self.problem,
            lost=self.lost,
            was_seen=self.was_seen,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "role": self.role,
            "model": self.served_model,
            "status": self.verdict.status,
            "reason": self.verdict.reason,
            "inflight_requests": len(self.legs),
            "inflight_prefill_tokens": self.inflight_tokens if self.role is Role.PREFILL else None,
            "missed_polls": self.misses,
            "breaker": {
                "state": self.breaker.state,
                "consecutive_failures": self.breaker.consecutive_failures,
                "openings": self.breaker.opened_count,
            },
            "computed_tokens_per_s": self.rate.tokens_per_s,
            "held_tokens": self.holdings.tokens,
            "foreign_tokens": self.foreign_tokens,
            "info": self.info.to_json() if self.info else None,
        }


class WorkerPool:
    """Every configured worker with its current verdict.

    Polls keep the verdicts fresh. When a worker goes down, the legs on it are failed, and what the prefix index knew of
    it is forgotten.
    """

    def __init__(self, config: RouterConfig, *, index: PrefixIndex) -> None:
        self._config = config
        self._index = index
        self.reference: str | None = None
        self.on_change: Callable[[], None] = _ignore
        """Called when a worker may take more than before: a leg ended, or a poll told something."""
        self._block_tokens = max(1, config.prefix_block_bytes // BYTES_PER_TOKEN)
        self.prefill = [self._worker(url, Role.PREFILL, None) for url in config.prefill]
        named: dict[str, list[str]] = {}
        for name, urls in config.decode.items():
            for url in urls:
                named.setdefault(url, []).append(name)
        decode = {
            url: self._worker(url, Role.DECODE, ", ".join(names), modules=tuple(names)) for url, names in named.items()
        }
        self.decode: Mapping[str, list[Worker]] = {
            name: [decode[url] for url in urls] for name, urls in config.decode.items()
        }
        self._decode = tuple(decode.values())
        self._by_url = {worker.url: worker for worker in self}

    def _worker(self, url: str, role: Role, model: str | None, modules: tuple[str, ...] = ()) -> Worker:
        holdings = Holdings(block_tokens=self._block_tokens)
        return Worker(
            url,
            role,
            model,
            modules=modules,
            holdings=holdings,
            breaker=Breaker(self._config.breaker),
            on_change=lambda: self.on_change(),
        )

    def __iter__(self) -> Iterator[Worker]:
        yield from self.prefill
        yield from self._decode

    def __getitem__(self, url: str) -> Worker:
        return self._by_url[url]

    @property
    def leg_count(self) -> int:
        return sum(len(worker.legs) for worker in self)

    # -- snapshots for the policy

    def prefill_workers(self, module: str) -> Sequence[Worker]:
        """Those that can prefill for `module`: all, since the base's KV is every module's."""
        return self.prefill

    def prefill_snapshots(
        self,
        module: str,
        chains: Sequence[Sequence[int]],
        *,
        among: Collection[Worker] | None = None,
        session_counts: Mapping[str, int] = MappingProxyType({}),
    ) -> list[PrefillSnapshot]:
        """The ready prefill workers (`among` these), with what the index expects each to hold of all of a request's
        prompts."""
        return [
            PrefillSnapshot(
                worker.url,
                worker.inflight_tokens,
                self._matched_tokens(worker, chains),
                session_counts.get(worker.url, 0),
            )
            for worker in self.prefill_workers(module)
            if worker.is_ready and (among is None or worker in among)
        ]

    def decode_snapshots(
        self,
        module: str,
        chains: Sequence[Sequence[int]],
        *,
        among: Collection[Worker] | None = None,
        session_counts: Mapping[str, int] = MappingProxyType({}),
    ) -> list[DecodeSnapshot]:
        """Likewise the ready workers of a decode module."""
        return [
            DecodeSnapshot(
                worker.url, len(worker.legs), self._matched_tokens(worker, chains), session_counts.get(worker.url, 0)
            )
            for worker in self.decode[module]
            if worker.is_ready_for(module) and (among is None or worker in among)
        ]

    def limits(self, module: str) -> Limits:
        """What a request for `module` may index and hold, by what its ready workers say."""
        sides = (self.prefill_workers(module), self.decode[module])
        infos = [[worker.info for worker in side if worker.is_ready and worker.info is not None] for side in sides]
        if not all(infos):
            return NO_LIMITS
        return Limits(
            vocab_size=_least([_largest([info.vocab_size for info in side]) for side in infos]),
            context_length=_least([_largest([info.context_length or None for info in side]) for side in infos]),
            max_prompt_bytes=_least([_largest([info.max_prompt_bytes for info in side]) for side in infos]),
        )

    def _matched_tokens(self, worker: Worker, chains: Sequence[Sequence[int]]) -> int:
        return sum(self._index.match(worker.url, chain) for chain in chains) * self._block_tokens

    def missing(self, modules: Sequence[str] | None = None) -> list[str]:
        """What keeps requests for `modules` (default: all) from being served, in words; empty if nothing."""
        lines: list[str] = []
        for name in modules if modules is not None else self.decode:
            prefill, workers = self.prefill_workers(name), self.decode[name]
            if not any(worker.is_ready for worker in prefill):
                line = f"no prefill worker is ready: {_reasons(prefill)}"
                lines += [line] if line not in lines else []
            if not any(worker.is_ready_for(name) for worker in workers):
                lines.append(f"no worker of the decode module {name!r} is ready: {_reasons(workers)}")
        return lines

    # -- polling

    async def poll(self, worker: Worker, session: aiohttp.ClientSession) -> None:
        """Ask one worker for its description and judge all anew."""
        info: WorkerInfo | None = None
        problem: str | None = None
        try:
            async with self.get(worker, WORKER_INFO_PATH, session) as response:
                status = response.status
                if status == HTTPStatus.OK:
                    info = WorkerInfo.from_json(await response.json(content_type=None), source=worker.url)
                elif status == HTTPStatus.NOT_FOUND:
                    problem = f"it has no {WORKER_INFO_PATH}: start it with a PrefillShare role"
                elif status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                    problem = f"it answered {status} at {WORKER_INFO_PATH}: give the router the workers' API key"
                else:
                    self.missed(worker, f"answered {status} at {WORKER_INFO_PATH}")
                    return
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.missed(worker, f"does not answer: {str(error) or type(error).__name__}", is_refused=_is_refused(error))
            return
        except WorkerError as error:
            problem = str(error)
        except ValueError as error:
            problem = f"its answer at {WORKER_INFO_PATH} is not JSON: {error}"
        self.seen(worker, info, problem)

    def seen(self, worker: Worker, info: WorkerInfo | None, problem: str | None) -> None:
        """Note what a worker that was reached says of itself, or why it cannot be used, and judge all anew."""
        if worker.was_seen and (worker.lost is not None or info != worker.info):
            # It restarted, or its weights changed: whatever KV it held is gone.
            self._index.drop(worker.url)
            if info != worker.info or worker.misses >= self._config.poll_misses_until_down:
                worker.breaker.reset()
        worker.info, worker.problem, worker.lost = info, problem, None
        foreign = foreign_tokens(info.room if info is not None else None, held_tokens=worker.holdings.tokens)
        # Twice in a row: of a request that has just ended, a worker's word may still count what it held.
        worker.foreign_tokens, worker.foreign_seen = min(foreign, worker.foreign_seen), foreign
        worker.was_seen = True
        worker.misses = 0
        worker.is_silent.clear()
        self._judge_all()

    async def metrics_page(self, worker: Worker, session: aiohttp.ClientSession) -> str | None:
        """A worker's metrics as it shows them (Prometheus text); `None` if it shows none."""
        try:
            async with self.get(worker, WORKER_METRICS_PATH, session) as response:
                page = await response.read()
                return page.decode("utf-8", "replace") if response.status == HTTPStatus.OK else None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.debug("%s does not show its metrics: %r", worker.label, error)
            return None

    def get(
        self, worker: Worker, path: str, session: aiohttp.ClientSession
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Ask a worker something small, with our key and the polls' deadline."""
        headers = {}
        if self._config.worker_api_key is not None:
            headers["Authorization"] = f"Bearer {self._config.worker_api_key}"
        timeout = aiohttp.ClientTimeout(total=self._config.poll_timeout_s)
        return session.get(worker.url + path, headers=headers, timeout=timeout)

    def connection_refused(self, worker: Worker) -> None:
        """A leg found nobody listening: send nothing more there until a poll succeeds.

        Legs already on it are left alone, since a server that stops gracefully closes its door first; the polls
        fail them if it is really gone.
        """
        worker.lost = "refused a connection"
        worker.is_silent.set()
        self._judge_all()

    def missed(self, worker: Worker, why: str, *, is_refused: bool = False) -> None:
        """Note that a worker was not reached; after some misses it is down, and its legs fail. One at which nobody
        listens (`is_refused`) is sent nothing more from the first on, as in `connection_refused`."""
        worker.misses += 1
        worker.is_silent.set()
        if is_refused or worker.misses >= self._config.poll_misses_until_down or not worker.was_seen:
            worker.lost = why
        self._judge_all()
        if worker.misses >= self._config.poll_misses_until_down:
            for leg in list(worker.legs):
                leg.fail(f"The {worker.label} went down: {why}.")

    def verdicts(self) -> dict[str, Verdict]:
        """A verdict for each worker by URL, from what they said last; may change the reference."""
        self.reference, verdicts = judge([worker.observation() for worker in self], incumbent=self.reference)
        return verdicts

    def _judge_all(self) -> None:
        self._apply(self.verdicts())
        self.on_change()

    def _apply(self, verdicts: Mapping[str, Verdict]) -> None:
        for worker in self:
            verdict = verdicts[worker.url]
            if verdict == worker.verdict:
                continue
            was = worker.verdict.status
            worker.verdict = verdict
            if verdict.status is not was:
                level = logging.INFO if verdict.status in (Status.READY, Status.STARTING) else logging.WARNING
                logger.log(level, "%s: %s -> %s%s", worker.label, was, verdict.status, _because(verdict.reason))


def _is_refused(error: Exception) -> bool:
    return isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionRefusedError)


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _reasons(workers: Sequence[Worker]) -> str:
    return "; ".join(f"{worker.url} is {worker.verdict.status}{_because(worker.verdict.reason)}" for worker in workers)
