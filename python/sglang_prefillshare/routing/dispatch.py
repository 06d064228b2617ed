"""One request from its body to its answer and its record: parse, place, run both legs, answer.

A pair of legs that failed because its prefill worker was lost, or because a worker refused the connection, is replaced
by a new pair (`retries` times), as long as the client has seen nothing of the first. That, and what each way to end
means for the client and for the record, is `endings`' to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import aiohttp

from sglang_prefillshare.routing.aborts import Aborts
from sglang_prefillshare.routing.answers import client_error
from sglang_prefillshare.routing.attempt import Attempt, AttemptEnd, Job
from sglang_prefillshare.routing.client import ClientGoneError, Receive, Reply, Send, read_body
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.endings import Conclusion, Cut, LegEnd, Step, conclude
from sglang_prefillshare.routing.failures import LegFailure
from sglang_prefillshare.routing.gate import Gate, OverloadedError
from sglang_prefillshare.routing.legs import Legs
from sglang_prefillshare.routing.placement import Chains, Placed, Placer, UnplacedError
from sglang_prefillshare.routing.prefix_index import PrefixIndex
from sglang_prefillshare.routing.request import (
    REQUEST_ID_HEADER,
    ClientRequest,
    Continued,
    Endpoint,
    RequestError,
    forwarded_headers,
    header_safe,
    parse_request,
)
from sglang_prefillshare.routing.responses import ResponseStore
from sglang_prefillshare.routing.telemetry import CallLog, CallRecord, Metrics, Outcome, Timings
from sglang_prefillshare.routing.tracing import CallTrace, Tracer
from sglang_prefillshare.routing.workers import Worker, WorkerPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trouble:
    """What the client is told of a call that did not end well; `answer` (content type, body) is a worker's own."""

    status: int
    message: str
    kind: str
    answer: tuple[bytes, bytes] | None = None
    retry_after_s: int | None = None

    def is_passed_on_at(self, endpoint: Endpoint) -> bool:
        """Whether the worker's own words are told. At `/v1/messages` its failures are all one text."""
        return self.answer is not None and not (endpoint is Endpoint.MESSAGES and self.status >= 500)


@dataclass(slots=True, eq=False)
class Call:
    """What is known of one request while it is served; `record` is what remains of it."""

    endpoint: Endpoint
    reply: Reply
    timings: Timings = field(default_factory=Timings)
    request: ClientRequest | None = None
    attempt: Attempt | None = None  # the last
    attempts: int = 0
    is_settled: bool = False
    caller: str | None = None
    trace: CallTrace = field(default_factory=CallTrace)

    def record(self, outcome: Outcome, *, status: int | None, error: str | None) -> CallRecord:
        request, attempt, timings = self.request, self.attempt, self.timings
        prefill, decode = (attempt.placed.prefill, attempt.placed.decode) if attempt else (None, None)
        return CallRecord(
            rid=request.public_rid if request else (self.reply.request_id or ""),
            worker_rids=attempt.pairing.rids if attempt else (),
            model=request.module if request else "",
            endpoint=self.endpoint,
            prefill_worker=prefill.worker.url if prefill else None,
            decode_worker=decode.worker.url if decode else None,
            decision=prefill.decision.reason if prefill else None,
            matched_tokens=prefill.decision.matched_tokens if prefill else None,
            matched_by=prefill.matched_by if prefill else None,
            decode_decision=decode.decision.reason if decode else None,
            decode_matched_tokens=decode.decision.matched_tokens if decode else None,
            attempts=self.attempts,
            prefill_tokens=attempt.accounting.prefill_tokens if attempt else None,
            cached_tokens=attempt.accounting.cached_tokens if attempt else None,
            cross_model_cached_tokens=attempt.accounting.cross_model_cached_tokens if attempt else None,
            queue_ms=timings.queue_ms,
            overhead_ms=timings.overhead_ms,
            ttft_ms=timings.ttft_ms,
            e2e_ms=timings.e2e_ms,
            status=status,
            outcome=outcome,
            error=error,
            started_at=timings.started_at,
            caller=self.caller,
        )


class Dispatcher:
    """Serves generation requests over the pool's workers.

    `on_finished` is told of every call once. `session` and `background` belong to the app: messages that outlive their
    request are sent in `background`.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        pool: WorkerPool,
        index: PrefixIndex,
        metrics: Metrics,
        calls: CallLog,
        session: aiohttp.ClientSession,
        background: asyncio.TaskGroup,
        legs_type: type[Legs] = Legs,
        responses: ResponseStore | None = None,
        tracer: Tracer | None = None,
        on_finished: Callable[[CallRecord], None] = lambda _record: None,
    ) -> None:
        self._config = config
        self._pool = pool
        self._metrics = metrics
        self._calls = calls
        self._responses = responses or ResponseStore(max_bytes=0)
        self._tracer = tracer or Tracer()
        self._on_finished = on_finished
        self._credentials: list[tuple[str, str]] | None = None
        """What workers see instead of a client's key, where those are the router's own."""
        if config.api_keys_file is not None:
            key = config.worker_api_key
            self._credentials = [] if key is None else [("authorization", f"Bearer {key}")]
        self._placer = Placer(config, pool=pool, index=index, metrics=metrics)
        self.gate = Gate(config.admission, placer=self._placer, metrics=metrics)
        pool.on_change = self.gate.call
        aborts = Aborts(config, metrics=metrics, session=session, background=background)
        self._legs = legs_type(config, placer=self._placer, metrics=metrics, session=session, aborts=aborts)

    async def serve(
        self,
        endpoint: Endpoint,
        *,
        headers: Sequence[tuple[str, str]],
        receive: Receive,
        send: Send,
        path_module: str | None = None,
        caller: str | None = None,
    ) -> None:
        """Answer one request. Always leaves a call record; raises only `CancelledError`."""
        call = Call(endpoint, Reply(send, endpoint), caller=caller, trace=self._tracer.call(endpoint, headers))
        try:
            conclusion, trouble = await self._concluded(call, headers, receive, path_module)
            await self._close(call, conclusion, trouble)
        finally:
            if not call.is_settled:
                self._settle(call, conclude(cut=Cut.CANCELLED, said=call.reply.said))
            call.attempt = None  # it refers back to the call: prompts must not wait for the garbage collector

    async def _concluded(
        self, call: Call, headers: Sequence[tuple[str, str]], receive: Receive, path_module: str | None
    ) -> tuple[Conclusion, Trouble | None]:
        """Serve a request until nothing is left to do for it but to tell the client of trouble, if there was any."""
        trouble: Trouble | None
        try:
            async with asyncio.timeout(self._config.request_timeout_s) as deadline:
                job = await self._accept(call, headers, receive, path_module, deadline)
                module = job.request.module
                with self._pool.under_way.one(module), self._metrics.inflight.labels(module).track_inprogress():
                    return await self._run_attempts(call, job, receive)
        except TimeoutError:
            message = f"The request took longer than {self._config.request_timeout_s:g} s."
            cut, trouble = Cut.DEADLINE, Trouble(504, message, "timeout")
        except RequestError as error:
            cut, trouble = Cut.REJECTED, Trouble(error.status, error.message, error.kind)
        except UnplacedError as error:
            cut, trouble = Cut.UNPLACED, Trouble(503, str(error), "worker_error")
        except OverloadedError as error:
            cut, trouble = Cut.OVERLOADED, Trouble(429, str(error), "overloaded", retry_after_s=error.retry_after_s)
        except ClientGoneError:
            cut, trouble = Cut.CLIENT_GONE, None
        except Exception as error:
            logger.exception("call %s failed in the router", call.reply.request_id)
            message = f"The router failed ({type(error).__name__}); its log says more."
            cut, trouble = Cut.FAULT, Trouble(500, message, "internal_error")
        conclusion = conclude(cut=cut, said=call.reply.said)
        return conclusion, None if conclusion.outcome is Outcome.OK else trouble

    async def _accept(
        self,
        call: Call,
        headers: Sequence[tuple[str, str]],
        receive: Receive,
        path_module: str | None,
        deadline: asyncio.Timeout,
    ) -> Job:
        """Read and check a request: what its legs are to do."""
        by_name = dict(headers)
        call.reply.request_id = by_name.get(REQUEST_ID_HEADER)
        raw = await read_body(receive, by_name.get("content-length", ""), max_bytes=self._config.max_body_bytes)
        call.timings.received_s = time.perf_counter()
        request = parse_request(
            call.endpoint,
            raw,
            headers=by_name,
            modules=self._pool.modules,
            path_module=path_module,
            limits_of=self._pool.limits,
            continued_of=self._continued_of(call.caller),
        )
        call.request = request
        if request.continued is not None:
            self._placer.adopt(request.continued.session_key, request.module, request.continued.workers)
        if call.reply.request_id is None:
            call.reply.request_id = header_safe(request.public_rid)
        return Job(
            request,
            headers=forwarded_headers(headers, request_id=call.reply.request_id, credentials=self._credentials),
            reply=call.reply,
            timings=call.timings,
            deadline=deadline,
            on_answered=lambda: self._settle(call, Conclusion(Step.NOTHING, Outcome.OK), status=200),
            on_said=self._responses.listener(request, caller=call.caller, workers=lambda: _workers(call)),
            trace=call.trace,
        )

    def _continued_of(self, caller: str | None) -> Callable[[str], Continued | None] | None:
        if not self._config.response_store_bytes:
            return None
        return lambda response_id: self._responses.continued(response_id, caller=caller)

    async def _run_attempts(self, call: Call, job: Job, receive: Receive) -> tuple[Conclusion, Trouble | None]:
        """Place the request and run its legs; as often as `endings` says so, and `retries` allows it, once more, with
        other workers in the place of those that failed."""
        request = job.request
        chains = request.chains(block_bytes=self._config.prefix_block_bytes)
        placed = await self._enter(call, request, chains, receive)
        failed: list[Worker] = []
        while True:
            retries_left = self._config.retries - len(failed)
            end = await self._run_attempt(call, Attempt(job, placed, may_retry=retries_left > 0), receive)
            failure = end.failure
            if failure is not None and failure.end is LegEnd.UNSENT:
                self._pool.connection_refused(failure.worker)
            if job.deadline.expired():
                raise TimeoutError  # a leg that failed at that very moment took the cancellation with it
            conclusion = _conclusion(call, end, may_retry=retries_left > 0 and not self._placer.is_stopping)
            if failure is None or conclusion.step is not Step.RETRY:
                return conclusion, _trouble(failure)
            failed.append(failure.worker)
            try:
                placed = self._placer.place(request, chains, before=placed, instead_of=failed)
            except UnplacedError:  # the client is told what came before
                return _conclusion(call, end, may_retry=False), _trouble(failure)
            self._metrics.retries.labels(failure.worker.role).inc()

    async def _enter(self, call: Call, request: ClientRequest, chains: Chains, receive: Receive) -> Placed:
        """The request's workers, once they have room."""
        try:
            return await self.gate.enter(request, chains, receive, timings=call.timings)
        finally:
            call.reply.queue_ms = call.timings.queue_ms

    async def _run_attempt(self, call: Call, attempt: Attempt, receive: Receive) -> AttemptEnd:
        call.attempt = attempt
        call.attempts += 1
        return await self._legs.run(attempt, receive)

    async def _close(self, call: Call, conclusion: Conclusion, trouble: Trouble | None) -> None:
        """Settle the call and say what is left to say, without waiting long for a client that does not read."""
        reply = call.reply
        if trouble is None:
            assert conclusion.step is Step.NOTHING
            self._settle(call, conclusion)
            return
        status = reply.status if reply.is_started else trouble.status
        self._settle(call, conclusion, status=status, error=trouble.message)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.abort_timeout_s):
                match conclusion.step:
                    case Step.PASS_ON if trouble.is_passed_on_at(call.endpoint):
                        assert trouble.answer is not None
                        content_type, body = client_error(call.endpoint, trouble.status, *trouble.answer)
                        await reply.whole(trouble.status, [(b"content-type", content_type)], body)
                    case Step.TELL | Step.PASS_ON:
                        await reply.error(
                            trouble.status, trouble.message, kind=trouble.kind, retry_after_s=trouble.retry_after_s
                        )
                    case Step.END_STREAM:
                        await reply.error_event(trouble.status, trouble.message, kind=trouble.kind)

    def _settle(
        self, call: Call, conclusion: Conclusion, *, status: int | None = None, error: str | None = None
    ) -> None:
        """Record how a call ended. The first time counts; done before the last byte is sent, so that a client
        that has its answer finds its record."""
        if call.is_settled:
            return
        call.is_settled = True
        assert conclusion.outcome is not None
        status = status if status is not None else call.reply.status
        record = call.record(conclusion.outcome, status=status, error=error)
        self._calls.add(record)
        self._metrics.observe(record)
        call.trace.end(record)
        self._on_finished(record)

    # -- for the app

    def forget_sessions(self, workers: Collection[str]) -> None:
        """Of workers that are gone, or were flushed: a session's next call is placed as if it were its first."""
        self._placer.forget_sessions(workers)

    def forget_module(self, module: str) -> None:
        """A module is gone, and with it where its sessions were."""
        self._placer.forget_module(module)

    @property
    def is_stopping(self) -> bool:
        return self._placer.is_stopping

    def stop(self) -> None:
        """Refuse new requests and end those in flight with 503."""
        self.refuse_new()
        for worker in self._pool:
            for leg in list(worker.legs):
                leg.fail("The router is stopping.")

    def refuse_new(self) -> None:
        """Answer those that come, and those that wait for room, with 503."""
        self._placer.is_stopping = True
        self.gate.clear()


def _workers(call: Call) -> tuple[str, str]:
    assert call.attempt is not None
    placed = call.attempt.placed
    return placed.prefill.worker.url, placed.decode.worker.url


def _conclusion(call: Call, end: AttemptEnd, *, may_retry: bool) -> Conclusion:
    return conclude(
        prefill=end.prefill,
        decode=end.decode,
        first=end.failure.worker.role if end.failure is not None else None,
        said=call.reply.said,
        may_retry=may_retry,
    )


def _trouble(failure: LegFailure | None) -> Trouble | None:
    return None if failure is None else Trouble(failure.status, failure.message, "worker_error", failure.answer)
