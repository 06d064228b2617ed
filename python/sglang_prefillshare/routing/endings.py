"""How legs and calls end, and what follows from it: one table (pure).

`legs` says how each leg of a pair ended, `dispatch` what else ended the call; `conclude` says what the client is told
and what is recorded, or that another pair is to be tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.telemetry import Outcome


class LegEnd(StrEnum):
    """How a leg ended, as far as what follows depends on it."""

    WHOLE = "whole"  # it gave its part
    LEFT = "left"  # it was ended for a reason that lies elsewhere
    UNSENT = "unsent"  # no byte reached its worker
    DOWN = "down"  # its worker is lost, or the router stops
    BROKEN = "broken"  # its connection broke
    SILENT = "silent"  # its worker answered 5xx, and nothing more
    REFUSED = "refused"  # its worker answered 4xx
    FAILED = "failed"  # its worker answered 5xx
    CUT_REFUSED = "cut_refused"  # its answer ended before it was whole, with a status below 500
    CUT_FAILED = "cut_failed"  # likewise, with 5xx


class Cut(StrEnum):
    """What ended a call apart from its legs."""

    REJECTED = "rejected"  # the request is wrong
    UNPLACED = "unplaced"  # no worker is there that it needs
    OVERLOADED = "overloaded"  # no worker had room for it in time
    CLIENT_GONE = "client_gone"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"  # the router was made to stop at once
    FAULT = "fault"  # a bug of ours


class Said(StrEnum):
    """What the client was sent of its answer."""

    NOTHING = "nothing"
    PART = "part"
    ALL = "all"


class Step(StrEnum):
    """What is to be done once a pair, or a call, has ended."""

    NOTHING = "nothing"
    RETRY = "retry"  # place the request again, with another worker for the one that failed
    PASS_ON = "pass_on"  # answer with the worker's own error and its status
    TELL = "tell"  # answer with an error of ours
    END_STREAM = "end_stream"  # an error event, and no [DONE]


@dataclass(frozen=True, slots=True)
class Conclusion:
    """`outcome` is what the call is recorded as; `None` as long as another pair is to be tried."""

    step: Step
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class _Row:
    outcome: Outcome
    step: Step
    retried: tuple[Role, ...] = ()
    """The roles whose leg may be replaced. Prefilling again elsewhere changes nothing but time. A decode leg that was
    under way may have sampled."""


_LEGS: Final[Mapping[LegEnd, _Row]] = MappingProxyType(
    {
        LegEnd.UNSENT: _Row(Outcome.UNAVAILABLE, Step.TELL, (Role.PREFILL, Role.DECODE)),
        LegEnd.DOWN: _Row(Outcome.UNAVAILABLE, Step.TELL, (Role.PREFILL,)),
        LegEnd.BROKEN: _Row(Outcome.WORKER_FAILED, Step.TELL, (Role.PREFILL,)),
        LegEnd.SILENT: _Row(Outcome.WORKER_FAILED, Step.PASS_ON, (Role.PREFILL,)),
        LegEnd.REFUSED: _Row(Outcome.WORKER_REFUSED, Step.PASS_ON),
        LegEnd.FAILED: _Row(Outcome.WORKER_FAILED, Step.PASS_ON),
        LegEnd.CUT_REFUSED: _Row(Outcome.WORKER_REFUSED, Step.TELL),
        LegEnd.CUT_FAILED: _Row(Outcome.WORKER_FAILED, Step.TELL),
    }
)
"""By the end of the leg that failed first. What the other leg came to does not matter then."""

_CUTS: Final[Mapping[Cut, _Row]] = MappingProxyType(
    {
        Cut.REJECTED: _Row(Outcome.REJECTED, Step.TELL),
        Cut.UNPLACED: _Row(Outcome.UNAVAILABLE, Step.TELL),
        Cut.OVERLOADED: _Row(Outcome.OVERLOADED, Step.TELL),
        Cut.CLIENT_GONE: _Row(Outcome.DISCONNECTED, Step.NOTHING),
        Cut.DEADLINE: _Row(Outcome.TIMEOUT, Step.TELL),
        Cut.CANCELLED: _Row(Outcome.CANCELLED, Step.NOTHING),
        Cut.FAULT: _Row(Outcome.INTERNAL, Step.TELL),
    }
)
_WHOLE: Final = _Row(Outcome.OK, Step.NOTHING)


def conclude(
    *,
    said: Said,
    cut: Cut | None = None,
    prefill: LegEnd = LegEnd.LEFT,
    decode: LegEnd = LegEnd.LEFT,
    first: Role | None = None,
    may_retry: bool = False,
) -> Conclusion:
    """What follows when a call, or a pair of its legs, has ended.

    A `cut` comes before whatever the legs did, but for a deadline that comes when the client has its whole answer and
    only prefill's leg is still waited for. Without one, the call is well if decode's answer is whole and the client
    has it, since the KV did arrive then; else the leg of `first`, which failed first, decides. `may_retry` says that
    another pair may follow this one and that the router still places requests.
    """
    if cut is Cut.DEADLINE and said is Said.ALL:
        row = _WHOLE
    elif cut is not None:
        row = _CUTS[cut]
    elif decode is LegEnd.WHOLE and said is Said.ALL:
        row = _WHOLE
    else:
        assert first is not None, "a pair ends with an answer, with a failed leg, or by a cut"
        end = prefill if first is Role.PREFILL else decode
        assert end in _LEGS, f"a leg that is {end} has not failed"
        row = _LEGS[end]
        if may_retry and said is Said.NOTHING and first in row.retried:
            return Conclusion(Step.RETRY, None)
    if row.step is Step.NOTHING or said is Said.ALL:
        return Conclusion(Step.NOTHING, row.outcome)
    return Conclusion(Step.END_STREAM if said is Said.PART else row.step, row.outcome)
