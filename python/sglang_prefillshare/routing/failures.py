"""What goes wrong with a worker while a leg runs on it, in one form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp

from sglang_prefillshare.routing.answers import WorkerFailure, failure_told
from sglang_prefillshare.routing.breaker import Fault
from sglang_prefillshare.routing.endings import LegEnd
from sglang_prefillshare.routing.workers import Worker


@dataclass(frozen=True, slots=True)
class LegFailure:
    """Why a leg could not give its part. `worker` is to blame, which is not always the leg's own.

    `answer` is the worker's own error (content type, body) to pass on with `status`, if it gave one.
    """

    worker: Worker
    end: LegEnd
    status: int
    message: str
    answer: tuple[bytes, bytes] | None = None

    @property
    def is_backpressure(self) -> bool:
        """Whether the worker said that it is full, which is no fault."""
        return self.answer is not None and self.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)

    @property
    def fault(self) -> Fault | None:
        """What the worker did wrong; None where it did nothing, or where polls say of it what there is to say."""
        match self.end:
            case LegEnd.UNSENT | LegEnd.BROKEN:
                return Fault.TRANSPORT
            case LegEnd.SILENT | LegEnd.FAILED | LegEnd.CUT_FAILED:
                return None if self.is_backpressure else Fault.ANSWER
            case _:
                return None


class LegError(Exception):
    """Ends a leg, and through the task group the other one."""

    def __init__(self, failure: LegFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@contextlib.contextmanager
def peer_errors(worker: Worker) -> Iterator[None]:
    """Turns what aiohttp raises about a worker into `LegError`."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        message = f"The {worker.label} cannot be reached: {error}."
        raise LegError(LegFailure(worker, LegEnd.UNSENT, 503, message)) from error
    except aiohttp.ClientError as error:
        message = f"The connection to the {worker.label} broke: {str(error) or type(error).__name__}."
        raise LegError(LegFailure(worker, LegEnd.BROKEN, 502, message)) from error


def lost(worker: Worker, reason: str) -> LegError:
    return LegError(LegFailure(worker, LegEnd.DOWN, 503, reason))


def ended_early(worker: Worker, failure: WorkerFailure) -> LegError:
    end = LegEnd.CUT_REFUSED if failure.status < 500 else LegEnd.CUT_FAILED
    message = f"The {worker.label} ended the answer before it was whole: {failure.message}"
    return LegError(LegFailure(worker, end, failure.status, message))


def refused_by(worker: Worker, response: aiohttp.ClientResponse, body: bytes, *, is_silent: bool = False) -> LegError:
    end = LegEnd.REFUSED if response.status < 500 else LegEnd.SILENT if is_silent else LegEnd.FAILED
    message = failure_told(worker.label, response.status, body)
    return LegError(LegFailure(worker, end, response.status, message, (_content_type(response), body)))


def _content_type(response: aiohttp.ClientResponse) -> bytes:
    return next((value for name, value in response.raw_headers if name.lower() == b"content-type"), b"application/json")
