"""Where a request goes: pure functions from a snapshot of the workers to a choice with its reason.

Nothing here waits, logs or remembers, so that the same code can be tested, replayed and simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import xxhash

from sglang_prefillshare.routing.config import PolicyConfig


class Reason(StrEnum):
    """Why a worker was chosen; each is a label of the decision counter."""

    SESSION = "session"
    NEW_SESSION = "new_session"
    PREFIX = "prefix"
    LOAD = "load"
    LEAST_LOADED = "least_loaded"


@dataclass(frozen=True, slots=True)
class PrefillSnapshot:
    """A ready prefill worker as one request sees it: `inflight_tokens` is what its legs have to compute (prompts less
    what the index expected it to hold), `matched_tokens` what the index expects it to hold of this one,
    `session_count` how many live sessions were placed on it."""

    url: str
    inflight_tokens: int
    matched_tokens: int
    session_count: int = 0


@dataclass(frozen=True, slots=True)
class DecodeSnapshot:
    """A ready decode worker of the wanted module; the rest likewise."""

    url: str
    inflight_requests: int
    matched_tokens: int
    session_count: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """`worker` is a URL; `matched_tokens` is what the index expects it to hold, whatever the reason was."""

    worker: str
    reason: Reason
    matched_tokens: int


def pick_prefill(
    workers: Sequence[PrefillSnapshot],
    *,
    session_worker: str | None,
    is_new_session: bool = False,
    session_key: str | None = None,
    turn: int,
    config: PolicyConfig,
) -> Decision:
    """Prefix-locality-aware choice of the prefill worker (paper §3.3, B.1).

    The session's worker comes first (the paper's "maps a unique User ID to a specific prefill worker"), then the
    worker with the longest known prefix. A session that is seen for the first time goes to the worker with the fewest
    live ones instead, if the prefix's worker has more by over `config.session_margin`: under a common system prompt
    every first call matches the same worker, whose pool the sessions would then crowd while others stay empty. Of
    several that hold the prefix it takes the one with the fewest, so a large margin fills workers one after the other
    and then evenly. Where several would do, `session_key` decides (`home`), so that another router, or this one after a
    restart, sends the session where its KV is: within `config.home_margin` of the fewest sessions.
    Deviation: the paper pins "whenever possible" without saying when not; we leave a worker that is loaded beyond
    `config`'s margins for the least loaded one. `turn` rotates among equals.
    """
    assert workers, "the caller answers 503 when no prefill worker is ready"
    candidates = [
        _Candidate(worker.url, worker.inflight_tokens, worker.matched_tokens, worker.session_count)
        for worker in workers
    ]
    key = session_key if is_new_session else None
    return _pick(candidates, session_worker, is_new_session, key, turn, config, load_margin=config.load_margin_tokens)


def pick_decode(
    workers: Sequence[DecodeSnapshot],
    *,
    session_worker: str | None,
    is_new_session: bool = False,
    session_key: str | None = None,
    turn: int,
    config: PolicyConfig,
) -> Decision:
    """The same choice among a module's workers, which keep the base's KV of the prompts they served: what one holds
    already need not be handed to it. Load is requests in flight. The paper has one worker per module."""
    assert workers, "the caller answers 503 when no worker of the module is ready"
    candidates = [
        _Candidate(worker.url, worker.inflight_requests, worker.matched_tokens, worker.session_count)
        for worker in workers
    ]
    key = session_key if is_new_session else None
    return _pick(candidates, session_worker, is_new_session, key, turn, config, load_margin=config.load_margin_requests)


def home(session_key: str, urls: Sequence[str]) -> str:
    """The worker that a session belongs to by its key alone (rendezvous hashing): the same for everybody who knows the
    same workers. Of a worker that goes only its own sessions move, and a worker that comes takes its share from all.
    """
    assert urls, "a session cannot belong to nobody"
    return max(urls, key=lambda url: (_weight(session_key, url), url))


def _weight(session_key: str, url: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{session_key}\0{url}".encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A worker of either role; `load` is in the role's own unit, as is the margin that it is compared with."""

    url: str
    load: int
    matched_tokens: int
    session_count: int


def _pick(
    workers: Sequence[_Candidate],
    session_worker: str | None,
    is_new_session: bool,
    new_session: str | None,
    turn: int,
    config: PolicyConfig,
    *,
    load_margin: int,
) -> Decision:
    preferred: _Candidate | None = None
    reason = Reason.LEAST_LOADED
    if session_worker is not None:
        preferred = next((worker for worker in workers if worker.url == session_worker), None)
        reason = Reason.SESSION
    if preferred is None:
        longest = max(worker.matched_tokens for worker in workers)
        if longest >= config.min_prefix_tokens:
            holders = [worker for worker in workers if worker.matched_tokens == longest]
            preferred = (
                _for_new_session(holders, new_session, turn, config) if is_new_session else _least_loaded(holders, turn)
            )
            reason = Reason.PREFIX
    if is_new_session:
        fewest = min(worker.session_count for worker in workers)
        if preferred is None or preferred.session_count - fewest > config.session_margin:
            preferred = _for_new_session(workers, new_session, turn, config)
            reason = Reason.NEW_SESSION
    if preferred is None:
        chosen = _least_loaded(workers, turn)
        return Decision(chosen.url, Reason.LEAST_LOADED, chosen.matched_tokens)
    least = min(worker.load for worker in workers)
    if preferred.load - least > load_margin and preferred.load > config.load_margin_ratio * least:
        chosen = _least_loaded(workers, turn)
        return Decision(chosen.url, Reason.LOAD, chosen.matched_tokens)
    return Decision(preferred.url, reason, preferred.matched_tokens)


def _for_new_session(
    workers: Sequence[_Candidate], session_key: str | None, turn: int, config: PolicyConfig
) -> _Candidate:
    """One with the fewest sessions, or, for a session with a key, its home among those that have few."""
    fewest = min(worker.session_count for worker in workers)
    if session_key is None:
        return _least_loaded([worker for worker in workers if worker.session_count == fewest], turn)
    margin = min(config.home_margin, config.session_margin)
    near = {worker.url: worker for worker in workers if worker.session_count - fewest <= margin}
    return near[home(session_key, list(near))]


def _least_loaded(workers: Sequence[_Candidate], turn: int) -> _Candidate:
    """Least in flight; among those the longest match; among those by turn."""
    best = min((worker.load, -worker.matched_tokens) for worker in workers)
    equals = [worker for worker in workers if (worker.load, -worker.matched_tokens) == best]
    return equals[turn % len(equals)]
