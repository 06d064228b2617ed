"""The two legs of a request, both or neither (contract 6).

The legs of a pair run in one task group, so the failure of either ends the other; a leg that is left before its worker
has answered in full is aborted there, whatever the way out: error, client gone, deadline or cancellation. The decode
leg's bytes are the client's answer and pass through untouched.

How the legs ended is handed back as a value; what follows from it is `endings`' to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator
from typing import Final

import aiohttp

from sglang_prefillshare.protocol import (
    BLOCKS_HEADER,
    CACHED_TOKENS_HEADER,
    CROSS_MODEL_HEADER,
    PROMPT_TOKENS_HEADER,
    Role,
)
from sglang_prefillshare.request_fields import whole_number
from sglang_prefillshare.routing.aborts import Aborts
from sglang_prefillshare.routing.answers import UNSAID, ClientIds, Events, failure_in, failure_in_events
from sglang_prefillshare.routing.attempt import Accounting, Attempt, AttemptEnd
from sglang_prefillshare.routing.client import ClientGoneError, Receive, wait_until_gone
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.endings import LegEnd
from sglang_prefillshare.routing.failures import LegError, LegFailure, ended_early, lost, peer_errors, refused_by
from sglang_prefillshare.routing.placement import Placer
from sglang_prefillshare.routing.request import (
    HOP_BY_HOP,
    REQUEST_ID_HEADER,
    ClientRequest,
    Endpoint,
    Pairing,
    decode_leg_body,
    decode_leg_headers,
    prefill_leg_body,
    prefill_leg_headers,
)
from sglang_prefillshare.routing.telemetry import Metrics
from sglang_prefillshare.routing.tracing import Attributes, LegTrace
from sglang_prefillshare.routing.workers import Leg, Worker

logger = logging.getLogger(__name__)

_EVENT_STREAM: Final = "text/event-stream"
_NOT_RETURNED: Final = frozenset(
    name.encode() for name in (*HOP_BY_HOP, "content-length", "date", "server", REQUEST_ID_HEADER)
)
_ACCOUNTING_WAIT_S: Final = 0.05
_FULL_FOR_S: Final = 1.0
"""How long a worker that says it is full gets nothing."""
_TRANSFER_FAILURES: Final = (b"Decode transfer failed", b"Decode handshake failed")
"""How SGLang's decode workers begin the error of a request whose KV did not come, whatever the reason."""


class Legs:
    """Runs pairs of legs over the app's `session`."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        placer: Placer,
        metrics: Metrics,
        session: aiohttp.ClientSession,
        aborts: Aborts,
    ) -> None:
        self._config = config
        self._placer = placer
        self._metrics = metrics
        self._session = session
        self._aborts = aborts
        self._leg_timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout_s)

    async def run(self, attempt: Attempt, receive: Receive) -> AttemptEnd:
        """Both legs, or neither: returns when both have ended. Raises `ClientGoneError`, which counts more than a
        failed leg, and any bug of ours, which counts more than both."""
        base = attempt.prefill_worker.info
        assert base is not None
        placed, task = attempt.placed, asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(_watch_client(attempt, receive))
                group.create_task(self._prefill_leg(attempt, placed.prefill.worker, placed.prefill_leg, base.model))
                group.create_task(self._decode_leg(attempt, placed.decode.worker, placed.decode_leg, watch))
        except ExceptionGroup as errors:
            # Before Python 3.13 a group that fails while it is left does not take back the cancellation that it sent
            # us, and the deadline of a call that is tried again would be taken for somebody's cancellation.
            while task.cancelling() > cancelled_before:
                task.uncancel()
            if not all(isinstance(error, LegError | ClientGoneError) for error in errors.exceptions):
                raise
            if any(isinstance(error, ClientGoneError) for error in errors.exceptions):
                raise ClientGoneError from None
        finally:  # a task that is cancelled before it starts ends nothing itself
            placed.release()
        return AttemptEnd(attempt.prefill_end, attempt.decode_end, attempt.failure)

    # -- prefill

    async def _prefill_leg(self, attempt: Attempt, worker: Worker, leg: Leg, base_model: str) -> None:
        """Have the base prefill the prompt; its answer is drained and only its accounting is kept."""
        job = attempt.job
        body = self.prefill_body(job.request, base_model=base_model, pairing=attempt.pairing)
        headers = prefill_leg_headers(job.headers, request=job.request, pairing=attempt.pairing)
        trace = job.trace.leg(str(worker.role), worker.url)
        job.timings.sent_s = time.perf_counter()
        try:
            async with (
                asyncio.timeout(None) as attempt.drain,
                self._running(attempt, worker, leg, trace),
                self._session.post(
                    worker.url + job.request.endpoint,
                    data=body,
                    headers=trace.carried(headers),
                    timeout=self._leg_timeout,
                ) as response,
            ):
                answer = await response.read()
                leg.is_complete = True
                if response.status != 200:
                    is_silent = response.status >= 500 and await self._goes_silent(attempt)
                    raise refused_by(worker, response, answer, is_silent=is_silent)
                found = attempt.accounting = self.account(response, answer)
                self._placer.computed(job.request, worker, response.headers.get(BLOCKS_HEADER))
                if found.prefill_tokens is not None and found.cached_tokens is not None:
                    worker.rate.note(found.prefill_tokens - found.cached_tokens, time.monotonic() - leg.began_s)
                attempt.prefill_end = LegEnd.WHOLE
                _note_success(worker, leg)
        except (LegError, TimeoutError) as error:
            if not attempt.is_answered:
                raise
            # The client has its whole answer, so the KV did arrive.
            logger.warning(
                "%s: prefill leg of %s failed after the answer: %s", worker.label, attempt.pairing.rids[0], error
            )
        finally:
            attempt.prefill_ended.set()

    def prefill_body(self, request: ClientRequest, *, base_model: str, pairing: Pairing) -> bytes:
        """What the prefill worker is sent."""
        return prefill_leg_body(request, base_model=base_model, pairing=pairing)

    def account(self, response: aiohttp.ClientResponse, answer: bytes) -> Accounting:
        """What the prefill leg says it found and computed."""
        return Accounting(
            prefill_tokens=_count(response, PROMPT_TOKENS_HEADER),
            cached_tokens=_count(response, CACHED_TOKENS_HEADER),
            cross_model_cached_tokens=_count(response, CROSS_MODEL_HEADER),
        )

    # -- decode

    async def _decode_leg(self, attempt: Attempt, worker: Worker, leg: Leg, watch: asyncio.Task[None]) -> None:
        """Pass the decode module's answer on."""
        job = attempt.job
        is_adapter = worker.adapters is not None
        body = decode_leg_body(job.request, pairing=attempt.pairing, is_adapter=is_adapter)
        headers = decode_leg_headers(job.headers, request=job.request, pairing=attempt.pairing, is_adapter=is_adapter)
        trace = job.trace.leg(str(worker.role), worker.url)
        job.timings.sent_s = time.perf_counter()
        async with (
            self._running(attempt, worker, leg, trace),
            self._session.post(
                worker.url + job.request.endpoint,
                data=body,
                headers=trace.carried(headers),
                timeout=self._leg_timeout,
            ) as response,
        ):
            if response.status != 200:
                answer = await response.read()
                leg.is_complete = True
                if response.status == 500:
                    await self._raise_if_prefill_is_lost(attempt, answer)
                raise refused_by(worker, response, answer)
            if response.headers.get("content-type", "").startswith(_EVENT_STREAM):
                await self._pass_stream(attempt, worker, leg, response)
            else:
                await self._pass_whole(attempt, worker, leg, response)
        watch.cancel()
        if attempt.drain is not None and not attempt.prefill_ended.is_set():
            attempt.drain.reschedule(asyncio.get_running_loop().time() + self._config.drain_timeout_s)

    async def _pass_stream(self, attempt: Attempt, worker: Worker, leg: Leg, response: aiohttp.ClientResponse) -> None:
        """A stream starts with its first byte, so that a prefill error that comes before it still gets its own
        status."""
        reply, timings = attempt.job.reply, attempt.job.timings
        headers, named = _returned_headers(response), ClientIds(attempt.pairing.rids, attempt.job.request.answer_rids)
        keep = attempt.job.on_said
        stream = Events()
        async for data in response.content.iter_any():
            events = stream.feed(data)
            if not events:
                continue
            worker.note_came(leg, stream.count)
            if not reply.is_started:
                await self._raise_if_prefill_is_lost(attempt, events)
            events, failure = failure_in_events(events)
            if events:
                if not reply.is_started:
                    timings.first_byte_s = time.perf_counter()
                    await reply.start(200, headers)
                events = named(events)
                if keep is not None:
                    keep(events)
                await reply.chunk(events)
            if failure is not None:
                raise ended_early(worker, failure)
        leg.is_complete = True
        attempt.decode_end = LegEnd.WHOLE
        _note_success(worker, leg)
        if not reply.is_started:
            await reply.start(200, headers)
        await self._account_answered(attempt)
        await reply.finish(named(stream.rest()))

    async def _pass_whole(self, attempt: Attempt, worker: Worker, leg: Leg, response: aiohttp.ClientResponse) -> None:
        answer = await response.read()
        leg.is_complete = True
        failure = failure_in(answer)
        if failure is not None:
            raise ended_early(worker, failure)
        attempt.decode_end = LegEnd.WHOLE
        _note_success(worker, leg)
        await self._account_answered(attempt)
        answer = ClientIds(attempt.pairing.rids, attempt.job.request.answer_rids)(answer)
        if attempt.job.on_said is not None:
            attempt.job.on_said(answer)
        await attempt.job.reply.whole(200, _returned_headers(response), answer)

    async def _account_answered(self, attempt: Attempt) -> None:
        """Let a call be settled whose answer is complete but for its last bytes, if the prefill leg's accounting is
        there.

        It nearly always is, since the KV had to arrive first; otherwise the client is not kept waiting.
        """
        attempt.job.timings.answered_s = time.perf_counter()
        if not attempt.prefill_ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ACCOUNTING_WAIT_S):
                    await attempt.prefill_ended.wait()
        if attempt.prefill_ended.is_set():
            attempt.job.on_answered()

    # -- the loss of prefill

    async def _raise_if_prefill_is_lost(self, attempt: Attempt, data: bytes) -> None:
        """Called with what decode said first. If that is that its KV did not come, and if prefill is lost within
        `loss_wait_s`, the pair ends as if prefill's loss had been noticed first: with `LegError` of prefill.

        A lost connection of the prefill leg cancels us here, through the task group. A stream's first event is looked
        at too, because SGLang tells the errors of streams in them; a false alarm only costs it the wait for the
        prefill leg's end, which is near.
        """
        texts: tuple[bytes, ...] = _TRANSFER_FAILURES
        if attempt.job.request.endpoint is Endpoint.MESSAGES:
            texts = (*texts, b'"%s"' % UNSAID.encode())
        if any(text in data for text in texts) and await self._goes_silent(attempt):
            worker = attempt.prefill_worker
            raise lost(worker, f"The {worker.label} was lost.")

    async def _goes_silent(self, attempt: Attempt) -> bool:
        """Whether the prefill worker stops answering polls within `loss_wait_s`, while its leg runs. False, without
        a wait, where there is to be no other try anyway."""
        worker = attempt.prefill_worker
        if not attempt.may_retry or attempt.job.reply.is_started or not self._placer.can_replace_prefill(worker):
            return False
        waits = [asyncio.ensure_future(event.wait()) for event in (worker.is_silent, attempt.prefill_ended)]
        try:
            await asyncio.wait(waits, timeout=self._config.loss_wait_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return worker.is_silent.is_set() and not attempt.prefill_ended.is_set()

    # -- ending legs

    @contextlib.asynccontextmanager
    async def _running(self, attempt: Attempt, worker: Worker, leg: Leg, trace: LegTrace) -> AsyncIterator[None]:
        """Runs a counted leg in the current task. On leaving, a leg that is not complete is aborted on its worker.

        Translates what can go wrong with the worker into `LegError`.
        """
        task = asyncio.current_task()
        assert task is not None
        leg.task = task
        cause = "error"
        try:
            if leg.lost_reason is not None:
                leg.is_complete = True  # never sent
                raise lost(worker, leg.lost_reason)
            with peer_errors(worker):
                yield
        except LegError as error:
            attempt.failed(error.failure)
            if error.failure.worker is worker:
                _note_failure(worker, leg, error.failure)
            leg.is_complete = leg.is_complete or error.failure.end is LegEnd.UNSENT
            raise
        except asyncio.CancelledError:
            if leg.lost_reason is not None:
                cause = "worker_down"
                task.uncancel()
                down = lost(worker, leg.lost_reason)
                attempt.failed(down.failure)
                raise down from None
            cause = attempt.abort_cause or ("timeout" if attempt.is_expired else "cancelled")
            raise
        finally:
            worker.end(leg)
            role = Role.PREFILL if worker is attempt.prefill_worker else Role.DECODE
            trace.end(attempt.end_of(role), lambda: _traced(attempt, role))
            if not leg.is_complete:
                self._metrics.legs_aborted.labels(worker.role, cause).inc()
                self._aborts.start(worker, attempt.pairing.rids, attempt.job.authorization)


def _traced(attempt: Attempt, role: Role) -> Attributes:
    """What is known of a leg at its end, beyond how it ended."""
    choice = attempt.placed.prefill if role is Role.PREFILL else attempt.placed.decode
    known: dict[str, str | int] = {
        "prefillshare.decision": choice.decision.reason,
        "prefillshare.matched_tokens": choice.decision.matched_tokens,
    }
    if role is Role.PREFILL:
        counted = dataclasses.asdict(attempt.accounting)
        known |= {f"prefillshare.{name}": value for name, value in counted.items() if value is not None}
    return known


async def _watch_client(attempt: Attempt, receive: Receive) -> None:
    await wait_until_gone(receive)
    if not attempt.is_answered:
        attempt.abort_cause = attempt.abort_cause or "client"
        raise ClientGoneError


def _note_success(worker: Worker, leg: Leg) -> None:
    assert leg.permit is not None
    worker.breaker.succeeded(leg.permit)


def _note_failure(worker: Worker, leg: Leg, failure: LegFailure) -> None:
    """What a failure says of its worker: that it is full for a moment, that it is well, or that it is not."""
    assert leg.permit is not None
    if failure.is_backpressure:
        worker.full_until_s = time.monotonic() + _FULL_FOR_S
        return
    fault = failure.fault
    if fault is None:
        if failure.end is not LegEnd.DOWN:
            worker.breaker.succeeded(leg.permit)
        return
    before = worker.breaker.opened_count
    worker.breaker.failed(leg.permit, fault)
    if worker.breaker.opened_count > before:
        failures = worker.breaker.consecutive_failures
        logger.warning("%s failed %d times in a row and is left out: %s", worker.label, failures, failure.message)


def _returned_headers(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in response.raw_headers if name.lower() not in _NOT_RETURNED]


def _count(response: aiohttp.ClientResponse, header: str) -> int | None:
    value = response.headers.get(header)
    return None if value is None else whole_number(value)
