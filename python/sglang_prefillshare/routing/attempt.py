"""One attempt at a call: what its pair of legs is to do, and how far they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.client import Reply
from sglang_prefillshare.routing.endings import LegEnd
from sglang_prefillshare.routing.failures import LegFailure
from sglang_prefillshare.routing.placement import Placed
from sglang_prefillshare.routing.request import ClientRequest, Pairing, draw_rids, draw_rooms
from sglang_prefillshare.routing.telemetry import Timings
from sglang_prefillshare.routing.tracing import CallTrace
from sglang_prefillshare.routing.workers import Worker


@dataclass(frozen=True, slots=True)
class Accounting:
    """What a prefill leg says it found and computed; `None` what it did not say."""

    prefill_tokens: int | None = None
    cached_tokens: int | None = None
    cross_model_cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What legs are run for: the same for each pair of a call.

    `on_answered` is called before the last bytes of the answer are sent, if prefill's accounting is there by then.
    `on_said` sees what the client is sent, whole events or a whole answer at a time, if anybody wants to keep it.
    """

    request: ClientRequest
    headers: list[tuple[str, str]]
    reply: Reply
    timings: Timings
    deadline: asyncio.Timeout
    on_answered: Callable[[], None]
    on_said: Callable[[bytes], None] | None = None
    trace: CallTrace = field(default_factory=CallTrace)

    @property
    def authorization(self) -> str | None:
        return next((value for name, value in self.headers if name == "authorization"), None)


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How both legs ended, and the first failure; of prefill only one that came before decode's answer was whole."""

    prefill: LegEnd
    decode: LegEnd
    failure: LegFailure | None


@dataclass(slots=True, eq=False)
class Attempt:
    """Two legs for a job, and how far they are. Run once; `may_retry` says that another pair could follow."""

    job: Job
    placed: Placed
    may_retry: bool
    pairing: Pairing = field(init=False)
    accounting: Accounting = Accounting()
    prefill_end: LegEnd = LegEnd.LEFT
    decode_end: LegEnd = LegEnd.LEFT
    failure: LegFailure | None = None
    prefill_ended: asyncio.Event = field(default_factory=asyncio.Event)
    drain: asyncio.Timeout | None = None
    abort_cause: str | None = None

    def __post_init__(self) -> None:
        host, port = self.prefill_worker.bootstrap
        request = self.job.request
        rids = draw_rids(request.endpoint, len(request.answer_rids))
        self.pairing = Pairing(host, port, draw_rooms(len(rids)), rids)

    @property
    def prefill_worker(self) -> Worker:
        return self.placed.prefill.worker

    def end_of(self, role: Role) -> LegEnd:
        """How a leg ended, or that it did not yet."""
        return self.prefill_end if role is Role.PREFILL else self.decode_end

    @property
    def is_answered(self) -> bool:
        """Decode's answer was read to its end."""
        return self.decode_end is LegEnd.WHOLE

    @property
    def is_expired(self) -> bool:
        return self.job.deadline.expired() or (self.drain is not None and self.drain.expired())

    def failed(self, failure: LegFailure) -> None:
        """Note that a leg failed: the other, if it still runs, is left for its peer's sake."""
        self.abort_cause = self.abort_cause or "peer"
        if failure.worker.role is Role.PREFILL:
            self.prefill_end = failure.end
        else:
            self.decode_end = failure.end
        if not self.is_answered:
            self.failure = self.failure or failure
