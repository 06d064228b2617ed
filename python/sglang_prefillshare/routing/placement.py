"""The workers of a request: `policy` chooses among them, and `Placer` remembers for it what was chosen before.

What a choice leaves behind (the session's worker, the prefixes, the turn, the count) is noted here, before the KV is
there. Nothing waits, and nothing is sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.policy import Decision, pick_decode, pick_prefill
from sglang_prefillshare.routing.prefix_index import PrefixIndex
from sglang_prefillshare.routing.request import ClientRequest
from sglang_prefillshare.routing.sessions import SessionMap
from sglang_prefillshare.routing.telemetry import Metrics
from sglang_prefillshare.routing.workers import Worker, WorkerPool


class UnplacedError(Exception):
    """No worker is there that a request needs; the message says which, to the client."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A worker, and why it."""

    worker: Worker
    decision: Decision


@dataclass(frozen=True, slots=True)
class Placed:
    """The two workers of a request."""

    prefill: Choice
    decode: Choice


class Placer:
    """Chooses the workers of each request, until the router stops."""

    def __init__(self, config: RouterConfig, *, pool: WorkerPool, index: PrefixIndex, metrics: Metrics) -> None:
        self._config = config
        self._pool = pool
        self._index = index
        self._metrics = metrics
        self._prefill_sessions = self._new_sessions()
        self._decode_sessions = {name: self._new_sessions() for name in config.decode}
        self._prefill_turns = itertools.count()
        self._decode_turns = itertools.count()
        self.is_stopping = False

    def place(
        self,
        request: ClientRequest,
        chains: Sequence[Sequence[int]],
        *,
        before: Placed | None = None,
        instead_of: Worker | None = None,
    ) -> Placed:
        """Choose the workers and note the choice. With `before`, only those of its workers are replaced that are not
        ready any more, or are `instead_of`, which is not chosen again. Raises `UnplacedError` where there is none.

        `chains` are the block hashes of the request's prompts (`ClientRequest.chains`).
        """
        missing = ["the router is stopping"] if self.is_stopping else self._pool.missing([request.module])
        if missing:
            text = "; ".join(missing)
            raise UnplacedError(f"{text[0].upper()}{text[1:]}.")
        prefill = decode = None
        if before is not None:
            if before.prefill.worker is not instead_of and before.prefill.worker.is_ready:
                prefill = before.prefill
            if before.decode.worker is not instead_of and before.decode.worker.is_ready_for(request.module):
                decode = before.decode
        return Placed(
            prefill or self._choose_prefill(request, chains, instead_of),
            decode or self._choose_decode(request, chains, instead_of),
        )

    def can_replace_prefill(self, worker: Worker) -> bool:
        """Whether a request could be prefilled by another worker than this one."""
        return not self.is_stopping and any(other.is_ready and other is not worker for other in self._pool.prefill)

    def forget_sessions(self, workers: Collection[str]) -> None:
        """After a flush: a session's next call is placed as if it were its first."""
        for sessions in (self._prefill_sessions, *self._decode_sessions.values()):
            sessions.forget(workers)

    def _choose_prefill(
        self, request: ClientRequest, chains: Sequence[Sequence[int]], instead_of: Worker | None
    ) -> Choice:
        sessions = self._prefill_sessions
        is_new = sessions.is_new(request.session_key)
        snapshots = self._pool.prefill_snapshots(
            request.module, chains, without=instead_of, session_counts=sessions.live_counts() if is_new else {}
        )
        if not snapshots:
            raise UnplacedError("No other prefill worker is ready.")
        decision = pick_prefill(
            snapshots,
            session_worker=sessions.worker_of(request.session_key),
            is_new_session=is_new,
            turn=next(self._prefill_turns),
            config=self._config.policy,
        )
        return self._noted(Role.PREFILL, decision, request, chains, sessions)

    def _choose_decode(
        self, request: ClientRequest, chains: Sequence[Sequence[int]], instead_of: Worker | None
    ) -> Choice:
        sessions = self._decode_sessions[request.module]
        is_new = sessions.is_new(request.session_key)
        snapshots = self._pool.decode_snapshots(
            request.module, chains, without=instead_of, session_counts=sessions.live_counts() if is_new else {}
        )
        if not snapshots:
            raise UnplacedError(f"No other worker of the decode module {request.module!r} is ready.")
        decision = pick_decode(
            snapshots,
            session_worker=sessions.worker_of(request.session_key),
            is_new_session=is_new,
            turn=next(self._decode_turns),
            config=self._config.policy,
        )
        return self._noted(Role.DECODE, decision, request, chains, sessions)

    def _noted(
        self,
        role: Role,
        decision: Decision,
        request: ClientRequest,
        chains: Sequence[Sequence[int]],
        sessions: SessionMap,
    ) -> Choice:
        """Before the KV is there: the session's next request may come before this one is prefilled."""
        self._metrics.decisions.labels(role, decision.reason).inc()
        for chain in chains:
            self._index.insert(decision.worker, chain)
        sessions.assign(request.session_key, decision.worker)
        return Choice(self._pool[decision.worker], decision)

    def _new_sessions(self) -> SessionMap:
        return SessionMap(capacity=self._config.session_capacity, live_s=self._config.session_live_s)
