"""The workers the router may use, what they say of themselves, and the legs they carry.

`verdicts` decides who fits (pure); `WorkerPool` asks the members once a poll interval and keeps the verdicts. A worker
takes requests only while it fits, and only those of its base's modules: a process that comes back with another base
gets no more of them from the next poll on (contract 4). `roster` says who is a member.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from sglang_prefillshare.errors import WorkerError
from sglang_prefillshare.protocol import WORKER_INFO_PATH, Role, WorkerInfo
from sglang_prefillshare.request_fields import NO_LIMITS, Limits
from sglang_prefillshare.routing.admission import Stock, foreign_tokens, peak_tokens
from sglang_prefillshare.routing.block_index import BlockIndex
from sglang_prefillshare.routing.breaker import Breaker, Permit
from sglang_prefillshare.routing.config import BreakerConfig, RouterConfig
from sglang_prefillshare.routing.holdings import NOTHING, Hold, Holdings
from sglang_prefillshare.routing.membership import Member, is_module_name
from sglang_prefillshare.routing.policy import DecodeSnapshot, PrefillSnapshot
from sglang_prefillshare.routing.prefix_index import BYTES_PER_TOKEN, PrefixIndex
from sglang_prefillshare.routing.residency import Pressure
from sglang_prefillshare.routing.sharing import ComputeRate
from sglang_prefillshare.routing.under_way import UnderWay
from sglang_prefillshare.routing.verdicts import (
    NOT_REACHED,
    Bases,
    Judgement,
    Observation,
    Status,
    Verdict,
    base_named,
    judge,
)
from sglang_prefillshare.routing.worker_metrics import WORKER_METRICS_PATH

logger = logging.getLogger(__name__)


def _largest(values: Sequence[int | None]) -> int | None:
    """None, which is no limit, is larger than any."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _least(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return min(known, default=None)


class Leg:
    """One half of a request on its worker. `legs` counts it from the moment its worker is chosen, so that requests
    that arrive together see each other; `fail` ends it from outside."""

    __slots__ = ("began_s", "came", "ended", "hold", "is_complete", "lost_reason", "permit", "task", "tokens")

    def __init__(self, *, tokens: int, hold: Hold = NOTHING) -> None:
        self.tokens = tokens
        self.hold = hold
        self.permit: Permit | None = None  # set when it is counted
        self.began_s = 0.0  # likewise, by `time.monotonic`
        self.ended: asyncio.Event | None = None  # made by whoever waits for its end
        self.task: asyncio.Task[Any] | None = None  # set when the leg starts
        self.came = 0  # tokens of its answer, where that is streamed
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
    """One member: its last description, verdict, and load.

    `role` is what it is configured as, or what it says that it is; `None` until it said so. `model` is `None` for
    prefill; on decode it is its module's name, or the names of all.
    """

    url: str
    role: Role | None
    model: str | None
    info: WorkerInfo | None = None
    problem: str | None = None
    lost: str | None = None
    was_seen: bool = False
    misses: int = 0
    is_silent: asyncio.Event = field(default_factory=asyncio.Event)
    """Set from the first failed attempt to reach it to the next successful poll: long before it counts as down."""
    verdict: Verdict = NOT_REACHED
    legs: set[Leg] = field(default_factory=set)
    inflight_tokens: int = 0
    modules: tuple[str, ...] = ()
    """The decode modules that it is configured for, or that it says it serves."""
    holdings: Holdings = field(default_factory=lambda: Holdings(block_tokens=1))
    """What `legs` hold there."""
    foreign_tokens: int = 0
    """What others hold there, by the last two polls."""
    foreign_seen: int = 0
    """The same by the last poll alone."""
    full_until_s: float = 0.0
    """By `time.monotonic`: until then it takes nothing more, as it said itself (429, 503)."""
    rate: ComputeRate = field(default_factory=ComputeRate)
    pressure: Pressure = field(default_factory=Pressure)
    """Of our legs there, on its computing."""
    breaker: Breaker = field(default_factory=lambda: Breaker(BreakerConfig()))
    on_change: Callable[[], None] = _ignore
    """Called when it may have more room than before."""
    is_configured: bool = True
    """Role and modules are the configuration's, and it must keep to them."""
    strange_modules: frozenset[str] = frozenset()
    """Those that it serves for another base than the one they are bound to."""
    is_leaving: bool = False
    is_drained: bool = False
    """An administrator keeps new requests away from it."""
    has_no_leg: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.has_no_leg.set()

    @property
    def is_draining(self) -> bool:
        return self.is_leaving or self.is_drained

    @property
    def is_ready(self) -> bool:
        """It fits, and takes new requests."""
        return self.verdict.status is Status.READY and not self.is_draining

    def is_ready_for(self, module: str) -> bool:
        """A decode worker with adapters may be without one of them, or have it for another base."""
        if not self.is_ready or module in self.strange_modules:
            return False
        return self.adapters is None or module in self.adapters

    @property
    def status(self) -> Status:
        is_ready = self.verdict.status is Status.READY
        return Status.DRAINING if is_ready and self.is_draining else self.verdict.status

    @property
    def reason(self) -> str | None:
        if self.status is Status.DRAINING:
            return "it leaves" if self.is_leaving else "an administrator keeps new requests away from it"
        return self.verdict.reason

    @property
    def base(self) -> str | None:
        """The base whose KV it writes or reads, by its last word."""
        return base_named(self.info)

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
        if self.role is Role.PREFILL:
            return f"prefill worker {self.url}"
        return f"worker {self.url}" if self.model is None else f"worker {self.url} of {self.model!r}"

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
        self.has_no_leg.clear()
        self.holdings.take(leg.hold)
        leg.permit = self.breaker.permit()
        leg.began_s = time.monotonic()
        if len(self.legs) == 1:
            self.pressure.note(True, leg.began_s)

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
            if not self.legs:
                self.pressure.note(False, time.monotonic())
            self.on_change()
        if not self.legs:
            self.has_no_leg.set()

    def stock(self, now_s: float, *, at_peak: bool = False) -> Stock:
        """How full it is, for admission: with all that its answers will have, or as much of that as they will hold at
        one time. Only for one that said what it is."""
        assert self.role is not None
        room = self.info.room if self.info is not None else None
        held_tokens = self.holdings.tokens
        if at_peak and room is not None:
            held_tokens -= self._never_held_tokens(room.reserved_tokens)
        return Stock(
            self.role,
            room,
            held_tokens=held_tokens,
            foreign_tokens=self.foreign_tokens,
            leg_count=len(self.legs),
            backlog_tokens=self.inflight_tokens,
            is_full=now_s < self.full_until_s,
        )

    def _never_held_tokens(self, reserved_tokens: int) -> int:
        """Of what the answers that are coming will have, what is not held at one time."""
        answers = [(leg.came, leg.hold.answer_tokens) for leg in self.legs if leg.came and leg.hold.answer_tokens]
        in_the_end = sum(tokens for _, tokens in answers)
        return max(0, in_the_end - peak_tokens(answers, reserved_tokens=reserved_tokens))

    def note_came(self, leg: Leg, tokens: int) -> None:
        """So many tokens of a leg's answer came; from the first on it is known when it will end."""
        is_first = not leg.came
        leg.came = tokens
        if is_first:
            self.on_change()

    def fail_legs(self, reason: str) -> None:
        for leg in list(self.legs):
            leg.fail(reason)

    def told(self, info: WorkerInfo | None) -> bool:
        """Note what it says of itself; whether that changes what it is there for."""
        self.info = info
        if self.is_configured or info is None:
            return False
        before = (self.role, self.model, self.modules)
        names = [info.model] if info.modules is None else info.modules
        is_decode = info.role is Role.DECODE
        self.role = info.role
        self.modules = tuple(name for name in names if is_module_name(name)) if is_decode else ()
        self.model = ", ".join(self.modules) if is_decode else None
        return before != (self.role, self.model, self.modules)

    def observation(self, *, withdrawn: Iterable[str] = ()) -> Observation:
        return Observation(
            url=self.url,
            role=self.role if self.is_configured else None,
            model=self.model,
            modules=self.modules,
            info=self.info,
            problem=self.problem,
            lost=self.lost,
            was_seen=self.was_seen,
            is_draining=self.is_draining,
            withdrawn=frozenset(withdrawn),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "role": self.role,
            "model": self.served_model,
            "modules": list(self.modules),
            "base_fingerprint": self.base,
            "status": self.status,
            "reason": self.reason,
            "is_configured": self.is_configured,
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
    """Every member with its current verdict: the prefill workers, and the decode workers of each module.

    Polls keep the verdicts fresh. When a worker goes down, the legs on it are failed, and what the prefix index knew of
    it is forgotten.
    """

    def __init__(self, config: RouterConfig, *, index: PrefixIndex) -> None:
        self._config = config
        self._index = index
        self.blocks = BlockIndex(
            capacity_bytes=config.prefix_capacity_blocks * config.prefix_block_bytes,
            capacity_blocks=config.event_capacity_blocks,
        )
        """What the workers hold that publish it; of the others `index` has a guess."""
        self._workers: dict[str, Worker] = {}
        self._block_tokens = max(1, config.prefix_block_bytes // BYTES_PER_TOKEN)
        self.on_change: Callable[[], None] = _ignore
        """Called when a worker may take more than before: a leg ended, or a poll told something."""
        self.bases = Bases()
        self.under_way = UnderWay()
        self.withdrawn: set[str] = set()
        """Modules that an administrator took away: whoever serves them, no new request gets there."""
        self._abandoned: set[str] = set()
        """Modules of the configuration that are none any more while they have no member."""
        self.prefill: list[Worker] = []
        self.decode: dict[str, list[Worker]] = {}
        for member in config.members:
            self._add(member)
        self._arrange()

    def __iter__(self) -> Iterator[Worker]:
        ranks = {Role.PREFILL: 0, Role.DECODE: 1}
        return iter(sorted(self._workers.values(), key=lambda w: 2 if w.role is None else ranks.get(w.role, 2)))

    def __contains__(self, url: str) -> bool:
        return url in self._workers

    def __getitem__(self, url: str) -> Worker:
        return self._workers[url]

    @property
    def urls(self) -> list[str]:
        """Of all members, in the order in which they came."""
        return list(self._workers)

    @property
    def leg_count(self) -> int:
        return sum(len(worker.legs) for worker in self)

    @property
    def modules(self) -> list[str]:
        """The decode modules that requests may ask for: those of the configuration, then those that members name."""
        return [name for name in self.decode if name not in self.withdrawn]

    @property
    def reference(self) -> str | None:
        """The base that was seen first."""
        return next(iter(self.bases.known), None)

    def base_of(self, module: str) -> str | None:
        """The base that `module` is bound to; `None` until one of its workers named it."""
        return self.bases.of_module.get(module)

    # -- members

    def join(self, member: Member) -> Worker:
        """A new member. It takes requests once it was polled and fits."""
        worker = self._add(member)
        self._arrange()
        return worker

    def forget(self, worker: Worker) -> None:
        """A member is gone, and with it what the prefix index knew of it."""
        del self._workers[worker.url]
        self._index.drop(worker.url)
        self.blocks.leave(worker.url)
        self._arrange()
        self.judge_all()

    def abandon(self, modules: Iterable[str]) -> None:
        """Those of the configuration go with their last member, as others do, until a member is there for them."""
        self._abandoned.update(modules)
        self._arrange()

    def add_module(self, module: str, workers: Sequence[Worker]) -> None:
        """These workers were given an adapter."""
        for worker in workers:
            if worker.is_configured and module not in worker.modules:
                worker.modules += (module,)
        self.withdrawn.discard(module)
        self._arrange()
        self.judge_all()

    def drop_module(self, module: str) -> None:
        """Its workers unloaded it. One that the configuration names stays there, without being served."""
        for worker in self:
            if worker.is_configured and module not in self._config.decode:
                worker.modules = tuple(name for name in worker.modules if name != module)
        self._arrange()
        self.judge_all()

    def _add(self, member: Member) -> Worker:
        assert member.url not in self._workers
        model = ", ".join(member.modules) if member.role is Role.DECODE else None
        worker = Worker(
            member.url,
            member.role,
            model,
            modules=member.modules,
            is_configured=member.role is not None,
            holdings=Holdings(block_tokens=self._block_tokens),
            breaker=Breaker(self._config.breaker),
            on_change=lambda: self.on_change(),
        )
        self._workers[member.url] = worker
        self._abandoned.difference_update(member.modules)
        return worker

    def _arrange(self) -> None:
        """By role and module, in the configuration's order and then in that in which they came."""
        self.prefill = [worker for worker in self if worker.role is Role.PREFILL]
        decode: dict[str, list[Worker]] = {}
        for name, urls in self._config.decode.items():
            members = [self._workers[url] for url in urls if url in self._workers]
            if members or name not in self._abandoned:
                decode[name] = members
        for worker in self:
            for name in worker.modules:
                if worker not in decode.setdefault(name, []):
                    decode[name].append(worker)
        self.decode = decode

    # -- snapshots for the policy

    def prefill_workers(self, module: str) -> Sequence[Worker]:
        """Those of the module's base, and those that have not said yet which they hold."""
        base = self.base_of(module)
        return [worker for worker in self.prefill if base is None or worker.base in (None, base)]

    def prefill_snapshots(
        self,
        module: str,
        chains: Sequence[Sequence[int]],
        prompts: Sequence[bytes] = (),
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
                self._matched_tokens(worker, chains, prompts),
                session_counts.get(worker.url, 0),
            )
            for worker in self.prefill_workers(module)
            if worker.is_ready and (among is None or worker in among)
        ]

    def decode_snapshots(
        self,
        module: str,
        chains: Sequence[Sequence[int]],
        prompts: Sequence[bytes] = (),
        *,
        among: Collection[Worker] | None = None,
        session_counts: Mapping[str, int] = MappingProxyType({}),
    ) -> list[DecodeSnapshot]:
        """Likewise the ready workers of a decode module."""
        return [
            DecodeSnapshot(
                worker.url,
                len(worker.legs),
                self._matched_tokens(worker, chains, prompts),
                session_counts.get(worker.url, 0),
            )
            for worker in self.decode.get(module, ())
            if worker.is_ready_for(module) and (among is None or worker in among)
        ]

    def limits(self, module: str) -> Limits:
        """What a request for `module` may index and hold, by what its ready workers say."""
        prefill = [worker for worker in self.prefill_workers(module) if worker.is_ready]
        decode = [worker for worker in self.decode.get(module, ()) if worker.is_ready_for(module)]
        infos = [[worker.info for worker in side if worker.info is not None] for side in (prefill, decode)]
        if not all(infos):
            return NO_LIMITS
        return Limits(
            vocab_size=_least([_largest([info.vocab_size for info in side]) for side in infos]),
            context_length=_least([_largest([info.context_length or None for info in side]) for side in infos]),
            max_prompt_bytes=_least([_largest([info.max_prompt_bytes for info in side]) for side in infos]),
        )

    def _matched_tokens(self, worker: Worker, chains: Sequence[Sequence[int]], prompts: Sequence[bytes]) -> int:
        """What it holds, where it says that; and what is being computed there, as a guess has that, too."""
        known = self.blocks.current(worker.url)
        if known is None:
            return sum(self._index.match(worker.url, chain) for chain in chains) * self._block_tokens
        under_way = sum(map(worker.holdings.held_blocks, chains)) * self._block_tokens
        return max(known.expected_tokens(prompts), under_way)

    def missing(self, modules: Sequence[str] | None = None) -> list[str]:
        """What keeps requests for `modules` (default: all) from being served, in words; empty if nothing."""
        names = modules if modules is not None else self.modules
        if not names:
            return ["no decode module is known: no worker has named one yet"]
        lines: list[str] = []
        for name in names:
            prefill, workers, base = self.prefill_workers(name), self.decode.get(name, []), self.base_of(name)
            has_prefill = any(worker.is_ready for worker in prefill)
            if not has_prefill and (base is None or base in self.bases.known or not self.bases.known):
                of = f" of the base {base}" if len(self.bases.known) > 1 else ""
                line = f"no prefill worker{of} is ready: {_reasons(prefill)}"
                lines += [line] if line not in lines else []
            if not any(worker.is_ready_for(name) for worker in workers):
                lines.append(f"no worker of the decode module {name!r} is ready: {_reasons(workers, name)}")
        return lines

    def served_modules(self) -> list[str]:
        """Those that a request could be sent to now."""
        return [name for name in self.modules if not self.missing([name])]

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
        if worker.was_seen and (worker.lost is not None or _has_restarted(worker.info, info)):
            # It restarted, or its weights changed: whatever KV it held is gone.
            self._index.drop(worker.url)
            self.blocks.drop(worker.url)
            if _has_restarted(worker.info, info) or worker.misses >= self._config.poll_misses_until_down:
                worker.breaker.reset()
        is_known = worker.was_seen and worker.lost is None and (info, problem) == (worker.info, worker.problem)
        if worker.told(info):
            self._arrange()
        worker.problem, worker.lost = problem, None
        foreign = foreign_tokens(info.room if info is not None else None, held_tokens=worker.holdings.tokens)
        # Twice in a row: of a request that has just ended, a worker's word may still count what it held.
        worker.foreign_tokens, worker.foreign_seen = min(foreign, worker.foreign_seen), foreign
        worker.was_seen = True
        worker.misses = 0
        worker.is_silent.clear()
        if is_known:
            self.on_change()
        else:
            self.judge_all()

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
        self.judge_all()

    def missed(self, worker: Worker, why: str, *, is_refused: bool = False) -> None:
        """Note that a worker was not reached; after some misses it is down, and its legs fail. One at which nobody
        listens (`is_refused`) is sent nothing more from the first on, as in `connection_refused`."""
        worker.misses += 1
        worker.is_silent.set()
        if is_refused or worker.misses >= self._config.poll_misses_until_down or not worker.was_seen:
            worker.lost = why
        self.judge_all()
        if worker.misses >= self._config.poll_misses_until_down:
            worker.fail_legs(f"The {worker.label} went down: {why}.")

    def judgement(self) -> Judgement:
        """Of everybody, from what they said last."""
        return judge([worker.observation(withdrawn=self.withdrawn) for worker in self], before=self.bases)

    def judge_all(self) -> None:
        """Judge all anew, after something changed of one."""
        found = self.judgement()
        self.bases = found.bases
        for worker in self:
            verdict = found.verdicts[worker.url]
            worker.strange_modules = found.strangers.get(worker.url, frozenset())
            if verdict == worker.verdict:
                continue
            was = worker.verdict.status
            worker.verdict = verdict
            if verdict.status is not was:
                level = logging.INFO if verdict.status in (Status.READY, Status.STARTING) else logging.WARNING
                logger.log(level, "%s: %s -> %s%s", worker.label, was, verdict.status, _because(verdict.reason))
        self.on_change()


_LASTING: Final = [known.name for known in dataclasses.fields(WorkerInfo) if known.compare and known.name != "modules"]
"""What a worker says of itself that stays the same for as long as its process runs."""


def _has_restarted(before: WorkerInfo | None, now: WorkerInfo | None) -> bool:
    """Adapters that come and go leave the base's KV where it is."""
    if before is None or now is None or before == now:
        return before != now
    return any(getattr(before, name) != getattr(now, name) for name in _LASTING)


def _is_refused(error: Exception) -> bool:
    return isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionRefusedError)


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _reasons(workers: Sequence[Worker], module: str | None = None) -> str:
    return "; ".join(_standing(worker, module) for worker in workers) or "there is none"


def _standing(worker: Worker, module: str | None) -> str:
    if module is not None and worker.is_ready and worker.base is not None:
        what = f"serves it on {worker.base}" if module in worker.strange_modules else "does not serve it"
        return f"{worker.url} {what}"
    return f"{worker.url} is {worker.status}{_because(worker.reason)}"
