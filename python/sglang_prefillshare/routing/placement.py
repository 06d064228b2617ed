"""The workers of a request: `policy` chooses among them, `admission` says whether they have room, and `Placer`
remembers for the policy what was chosen before.

What a choice leaves behind (the session's worker, the prefixes, the turn, the count, and the legs, which hold room from
then on) is noted here, before the KV is there. Nothing waits, and nothing is sent.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sglang_prefillshare.protocol import BLOCKS_HEADER, Role
from sglang_prefillshare.routing.admission import has_room, output_tokens
from sglang_prefillshare.routing.block_index import parse_told
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.holdings import Hold
from sglang_prefillshare.routing.policy import (
    Decision,
    DecodeSnapshot,
    PrefillSnapshot,
    Reason,
    pick_decode,
    pick_prefill,
)
from sglang_prefillshare.routing.prefix_index import BYTES_PER_TOKEN, PrefixIndex
from sglang_prefillshare.routing.request import ClientRequest
from sglang_prefillshare.routing.residency import Residency, SessionName, Stay
from sglang_prefillshare.routing.sessions import SessionMap
from sglang_prefillshare.routing.sharing import common_blocks, wait_for_prefix_s
from sglang_prefillshare.routing.telemetry import Metrics
from sglang_prefillshare.routing.workers import Leg, Worker, WorkerPool

logger = logging.getLogger(__name__)

Chains = Sequence[Sequence[int]]
"""The block hashes of a request's prompts (`ClientRequest.chains`)."""

_CLAIMS: Final = (Reason.SESSION, Reason.PREFIX)
"""Why a request had better wait for a prefill worker than have its prefix computed by another."""


class MatchedBy(StrEnum):
    """What says how much of a prompt a worker holds; a label of the prediction counters."""

    EVENTS = "events"  # its own, of what its tree takes and gives up
    GUESS = "guess"  # what was sent there


class UnplacedError(Exception):
    """No worker is there that a request needs; the message says which, to the client."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A worker, and why it."""

    worker: Worker
    decision: Decision
    matched_by: MatchedBy = MatchedBy.GUESS


@dataclass(frozen=True, slots=True)
class Placed:
    """The two workers of a request, and its legs there, which are counted and hold room until they are released; its
    session's `stay` ends with them."""

    prefill: Choice
    decode: Choice
    prefill_leg: Leg
    decode_leg: Leg
    stay: Stay | None = None

    def release(self) -> None:
        """Uncount both legs; doing it again changes nothing."""
        if self.stay is not None:
            self.stay.end(time.monotonic())
        self.prefill.worker.end(self.prefill_leg)
        self.decode.worker.end(self.decode_leg)


@dataclass(frozen=True, slots=True)
class NoRoom:
    """The workers, by URL, that a request has to wait for; `is_by_choice` where others have room that it had rather not
    go to."""

    workers: frozenset[str]
    is_by_choice: bool = False


class Placer:
    """Chooses the workers of each request, until the router stops."""

    def __init__(self, config: RouterConfig, *, pool: WorkerPool, index: PrefixIndex, metrics: Metrics) -> None:
        self._config = config
        self._pool = pool
        self._index = index
        self._metrics = metrics
        self._block_tokens = max(1, config.prefix_block_bytes // BYTES_PER_TOKEN)
        self._sessions: dict[tuple[Role, str | None], SessionMap] = {}
        """Of prefill by base, of decode by module."""
        self.residency = Residency(block_tokens=self._block_tokens, idle_s=config.admission.session_idle_s)
        self._turns: Counter[Role] = Counter()
        self.is_stopping = False

    def place(
        self,
        request: ClientRequest,
        chains: Chains,
        *,
        before: Placed | None = None,
        instead_of: Collection[Worker] = (),
    ) -> Placed:
        """Choose the workers, whether or not they have room, and note the choice. With `before`, only those of its
        workers are replaced that cannot serve any more, or are in `instead_of`, which are not chosen again. Raises
        `UnplacedError` where there is none.
        """
        self._raise_if_missing(request.module)
        decoding = self._usable(Role.DECODE, request.module, instead_of)
        prefilling = self._usable(Role.PREFILL, request.module, instead_of)
        prefill, decode = (before.prefill, before.decode) if before is not None else (None, None)
        if decode is None or decode.worker not in decoding:
            decision = self._pick_decode(request, self._decode_snapshots(request, chains, decoding))
            decode = self._noted(Role.DECODE, decision, request, chains)
        if prefill is None or prefill.worker not in prefilling:
            decision = self._pick_prefill(request, self._prefill_snapshots(request, chains, prefilling))
            prefill = self._noted(Role.PREFILL, decision, request, chains)
        holds = {choice.worker.url: self._hold(request, chains, choice.worker) for choice in (prefill, decode)}
        return _begun(request, prefill, decode, holds=holds)

    def place_where_room(
        self, request: ClientRequest, chains: Chains, *, closed: Collection[str] = (), is_patient: bool = True
    ) -> Placed | NoRoom:
        """Likewise, of the workers that have room and are not `closed`; without any, change nothing and say whom the
        request waits for. One `is_patient` waits for the prefill worker that has its prefix although others have room.
        """
        self._raise_if_missing(request.module)
        now_s = time.monotonic()
        holds: dict[str, Hold] = {}

        def takes(worker: Worker) -> bool:
            if worker.url in closed:
                return False
            hold = holds[worker.url] = self._hold(request, chains, worker)
            need, config = worker.holdings.need(hold), self._config.admission
            return has_room(worker.stock(now_s), need, config=config) or (
                worker.role is Role.DECODE and has_room(worker.stock(now_s, at_peak=True), need, config=config)
            )

        decoding = self._usable(Role.DECODE, request.module)
        prefilling = self._usable(Role.PREFILL, request.module)
        roomy = {worker.url for worker in decoding if takes(worker)}
        if not roomy:
            return NoRoom(frozenset(worker.url for worker in decoding))
        of_decode = self._decode_snapshots(request, chains, decoding)
        decode = self._pick_decode(request, of_decode)
        if decode.worker not in roomy:  # what another lacks of the prefix is copied, not computed
            decode = self._pick_decode(request, [snapshot for snapshot in of_decode if snapshot.url in roomy])

        of_prefill = self._prefill_snapshots(request, chains, prefilling)
        prefill = self._pick_prefill(request, of_prefill)
        if not takes(self._pool[prefill.worker]):
            others = [snapshot for snapshot in of_prefill if takes(self._pool[snapshot.url])]
            if not others:
                return NoRoom(frozenset(snapshot.url for snapshot in of_prefill))
            if is_patient and prefill.reason in _CLAIMS:
                return NoRoom(frozenset([prefill.worker]), is_by_choice=True)
            prefill = self._pick_prefill(request, others)
        return _begun(
            request,
            self._noted(Role.PREFILL, prefill, request, chains),
            self._noted(Role.DECODE, decode, request, chains),
            holds=holds,
        )

    def prefix_under_way(self, request: ClientRequest, chains: Chains) -> tuple[Leg, float] | None:
        """A leg on the request's prefill worker that has a long part of its prefix computed now, and for how many
        seconds at most it pays to wait for its end. Changes nothing. Raises `UnplacedError` where no worker is ready.
        """
        config = self._config.admission
        first_block = -(-config.min_shared_tokens // self._block_tokens) - 1
        if len(chains) != 1 or len(chains[0]) <= first_block:
            return None
        (chain,) = chains
        if not any(worker.holdings.has_block(chain[first_block]) for worker in self._pool.prefill):
            return None
        self._raise_if_missing(request.module)
        usable = self._usable(Role.PREFILL, request.module)
        decision = self._pick_prefill(request, self._prefill_snapshots(request, chains, usable))
        worker = self._pool[decision.worker]
        best: tuple[Leg, float] | None = None
        now_s = time.monotonic()
        for leg in worker.legs:
            if len(leg.hold.chains) != 1:
                continue
            (other,) = leg.hold.chains
            cached = len(other) * self._block_tokens - leg.tokens  # of the leg's prompt, before it began
            pending = common_blocks(chain, other) * self._block_tokens - max(0, cached)
            wait_s = wait_for_prefix_s(
                pending_tokens=pending,
                leg_tokens=leg.tokens,
                elapsed_s=now_s - leg.began_s,
                tokens_per_s=worker.rate.tokens_per_s,
                min_tokens=config.min_shared_tokens,
            )
            if wait_s is not None and (best is None or wait_s > best[1]):
                best = leg, wait_s
        return best

    def needs_stay(self, request: ClientRequest, chains: Chains) -> bool:
        """Whether the request goes on with a context that somebody may want kept."""
        return (
            request.session_key is not None and len(chains) == 1 and self._config.admission.session_hold_s is not None
        )

    def is_resident(self, request: ClientRequest) -> bool:
        """Whether the context of its session is kept."""
        return self.residency.has(self._session_name(request))

    def stay(self, request: ClientRequest, chains: Chains, *, is_due: bool = False) -> Stay | None:
        """Room for the context of a request that `needs_stay`, on the prefill worker that it would go to, or on
        another, which is its session's from then on; None where it has to wait for some. One that `is_due` need not.
        Raises `UnplacedError` where no worker is ready."""
        assert request.session_key is not None
        self._raise_if_missing(request.module)
        usable = self._usable(Role.PREFILL, request.module)
        choice = self._pick_prefill(request, self._prefill_snapshots(request, chains, usable)).worker
        now_s = time.monotonic()
        for worker in sorted(usable, key=lambda worker: worker.url != choice):
            room = worker.info.room if worker.info is not None else None
            is_pressed = worker.pressure.is_high(now_s, tokens_per_s=worker.rate.best_tokens_per_s)
            stay = self.residency.enter(
                self._session_name(request),
                worker.url,
                self._hold(request, chains, worker),
                pool_tokens=room.pool_tokens if room is not None and is_pressed else None,
                now_s=now_s,
                is_due=is_due,
                compute_s=worker.rate.seconds_for(request.prompt_tokens),
            )
            if stay is not None:
                if worker.url != choice:
                    self._sessions_of(Role.PREFILL, request.module).assign(request.session_key, worker.url)
                return stay
        return None

    def moved(self, stay: Stay, request: ClientRequest, chains: Chains, placed: Placed) -> Stay:
        """The request's stay, where it was placed in the end: elsewhere if its worker had no room for too long."""
        worker = placed.prefill.worker
        if worker.url == stay.worker:
            return stay
        now_s = time.monotonic()
        stay.end(now_s)
        other = self.residency.enter(
            self._session_name(request),
            worker.url,
            self._hold(request, chains, worker),
            pool_tokens=None,
            now_s=now_s,
        )
        assert other is not None, "a pool of None has room for all"
        return other

    def _session_name(self, request: ClientRequest) -> SessionName:
        assert request.session_key is not None
        return self.base_of(request), request.session_key

    def adopt(self, session_key: str, module: str, workers: tuple[str, str]) -> None:
        """Let a session that is not known begin on these (prefill, decode) workers."""
        for role, worker in zip((Role.PREFILL, Role.DECODE), workers, strict=True):
            sessions = self._sessions_of(role, module)
            if sessions.is_new(session_key):
                sessions.assign(session_key, worker)

    def computed(self, request: ClientRequest, worker: Worker, told: str | None) -> None:
        """A prefill worker has computed the request's prompts, and `told` what it calls their blocks."""
        known = self._pool.blocks.known(worker.url)
        if told is None or known is None:
            return
        try:
            known.computed(request.prompts, parse_told(told), now_s=time.monotonic())
        except ValueError as error:
            logger.warning("%s: %s cannot be read: %s", worker.label, BLOCKS_HEADER, error)

    def can_replace_prefill(self, worker: Worker) -> bool:
        """Whether a request could be prefilled by another worker than this one, of its base."""
        return not self.is_stopping and any(
            other.is_ready and other is not worker and other.base == worker.base and not other.breaker.is_shut
            for other in self._pool.prefill
        )

    def is_new_session(self, request: ClientRequest) -> bool:
        """Whether no call of its session was placed before; of a request without one, that too."""
        return self._sessions_of(Role.PREFILL, request.module).worker_of(request.session_key) is None

    def base_of(self, request: ClientRequest) -> str | None:
        """Whose KV its module reads."""
        return self._pool.base_of(request.module)

    def forget_sessions(self, workers: Collection[str]) -> None:
        """Of workers that are gone, or were flushed: a session's next call is placed as if it were its first."""
        self.residency.forget(set(workers))
        for sessions in self._sessions.values():
            sessions.forget(workers)
        self._sessions = {key: sessions for key, sessions in self._sessions.items() if sessions}

    def forget_module(self, module: str) -> None:
        """A module is gone, and with it where its sessions were."""
        self._sessions.pop((Role.DECODE, module), None)

    def _raise_if_missing(self, module: str) -> None:
        missing = ["the router is stopping"] if self.is_stopping else self._pool.missing([module])
        if missing:
            text = "; ".join(missing)
            raise UnplacedError(f"{text[0].upper()}{text[1:]}.")

    # -- choosing

    def _usable(self, role: Role, module: str, without: Collection[Worker] = ()) -> list[Worker]:
        """The ready workers of one side whose breakers let a request through, or those that are only better avoided.
        Raises `UnplacedError` where there are none.
        """
        if role is Role.PREFILL:
            ready = [worker for worker in self._pool.prefill_workers(module) if worker.is_ready]
        else:
            ready = [worker for worker in self._pool.decode.get(module, ()) if worker.is_ready_for(module)]
        others = [worker for worker in ready if worker not in without]
        found = [worker for worker in others if not worker.breaker.is_avoided]
        found = found or [worker for worker in others if not worker.breaker.is_shut]
        if found:
            return found
        which = "prefill worker" if role is Role.PREFILL else f"worker of the decode module {module!r}"
        if not others:
            raise UnplacedError(f"No other {which} is ready.")
        failing = ", ".join(worker.url for worker in others)
        raise UnplacedError(f"No {which} takes requests now: {failing} failed several times in a row.")

    def _prefill_snapshots(
        self, request: ClientRequest, chains: Chains, among: Collection[Worker]
    ) -> list[PrefillSnapshot]:
        counts = self._counts_for(request, self._sessions_of(Role.PREFILL, request.module))
        return self._pool.prefill_snapshots(request.module, chains, request.prompts, among=among, session_counts=counts)

    def _decode_snapshots(
        self, request: ClientRequest, chains: Chains, among: Collection[Worker]
    ) -> list[DecodeSnapshot]:
        counts = self._counts_for(request, self._sessions_of(Role.DECODE, request.module))
        return self._pool.decode_snapshots(request.module, chains, request.prompts, among=among, session_counts=counts)

    def _pick_prefill(self, request: ClientRequest, snapshots: Sequence[PrefillSnapshot]) -> Decision:
        sessions = self._sessions_of(Role.PREFILL, request.module)
        return pick_prefill(
            snapshots,
            session_worker=sessions.worker_of(request.session_key),
            is_new_session=sessions.is_new(request.session_key),
            session_key=request.session_key,
            turn=self._turns[Role.PREFILL],
            config=self._config.policy,
        )

    def _pick_decode(self, request: ClientRequest, snapshots: Sequence[DecodeSnapshot]) -> Decision:
        sessions = self._sessions_of(Role.DECODE, request.module)
        return pick_decode(
            snapshots,
            session_worker=sessions.worker_of(request.session_key),
            is_new_session=sessions.is_new(request.session_key),
            session_key=request.session_key,
            turn=self._turns[Role.DECODE],
            config=self._config.policy,
        )

    def _counts_for(self, request: ClientRequest, sessions: SessionMap) -> Mapping[str, int]:
        return sessions.live_counts() if sessions.is_new(request.session_key) else {}

    # -- what a choice leaves behind

    def _noted(self, role: Role, decision: Decision, request: ClientRequest, chains: Chains) -> Choice:
        """Before the KV is there: the session's next request may come before this one is prefilled."""
        sessions = self._sessions_of(role, request.module)
        self._metrics.decisions.labels(role, decision.reason).inc()
        self._turns[role] += 1
        for chain in chains:
            self._index.insert(decision.worker, chain)
        sessions.assign(request.session_key, decision.worker)
        is_known = self._pool.blocks.current(decision.worker) is not None
        return Choice(self._pool[decision.worker], decision, MatchedBy.EVENTS if is_known else MatchedBy.GUESS)

    def _hold(self, request: ClientRequest, chains: Chains, worker: Worker) -> Hold:
        """What a leg of `request` holds at most: its prompts, on decode its answers too, each to a whole page."""
        info = worker.info
        in_blocks = sum(map(len, chains)) * self._block_tokens
        own = max(0, request.prompt_tokens - in_blocks) + len(request.prompts) * (info.page_size if info else 1)
        if worker.role is Role.DECODE:
            reserved = info.room.reserved_tokens if info is not None and info.room is not None else 0
            answers = [
                max(answer, reserved) for answer in output_tokens(request.output_limits, config=self._config.admission)
            ]
            return Hold(chains, own + sum(answers), answer_tokens=answers[0] if len(answers) == 1 else 0)
        return Hold(chains, own)

    def _sessions_of(self, role: Role, module: str) -> SessionMap:
        group = (role, self._pool.base_of(module) if role is Role.PREFILL else module)
        found = self._sessions.get(group)
        if found is None:
            found = SessionMap(capacity=self._config.session_capacity, live_s=self._config.session_live_s)
            self._sessions[group] = found
        return found


def _begun(request: ClientRequest, prefill: Choice, decode: Choice, *, holds: Mapping[str, Hold]) -> Placed:
    to_compute = max(1, request.prompt_tokens - prefill.decision.matched_tokens)
    prefill_leg = Leg(tokens=to_compute, hold=holds[prefill.worker.url])
    decode_leg = Leg(tokens=request.prompt_tokens, hold=holds[decode.worker.url])
    prefill.worker.begin(prefill_leg)
    prefill.worker.pressure.begins(request.prompt_tokens, prefill_leg.began_s)
    decode.worker.begin(decode_leg)
    return Placed(prefill, decode, prefill_leg, decode_leg)
