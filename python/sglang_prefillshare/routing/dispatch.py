"""One request = one prefill leg + one decode leg, both or neither (contract 6).

The legs run in one task group, so the failure of either ends the other; a leg that is left before its worker has
answered in full is aborted there, whatever the way out: error, client gone, deadline or cancellation. The decode
leg's bytes are the client's answer and pass through untouched.

A pair that failed because its prefill worker was lost, or because a worker refused the connection, is replaced once
by a new pair, as long as the client has seen nothing of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from typing import Final

import aiohttp

from sglang_prefillshare.protocol import (
    CACHED_TOKENS_HEADER,
    CROSS_MODEL_HEADER,
    PROMPT_TOKENS_HEADER,
    Role,
)
from sglang_prefillshare.routing.answers import (
    ClientIds,
    Events,
    WorkerFailure,
    client_error,
    failure_in,
    failure_in_events,
)
from sglang_prefillshare.routing.client import ClientGoneError, Receive, Reply, Send, read_body, wait_until_gone
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.placement import Placed, Placer, UnplacedError
from sglang_prefillshare.routing.prefix_index import PrefixIndex
from sglang_prefillshare.routing.request import (
    HOP_BY_HOP,
    REQUEST_ID_HEADER,
    ClientRequest,
    Endpoint,
    Pairing,
    RequestError,
    decode_leg_body,
    draw_rids,
    draw_rooms,
    forwarded_headers,
    header_safe,
    parse_request,
    prefill_leg_body,
    prefill_leg_headers,
)
from sglang_prefillshare.routing.telemetry import CallLog, CallRecord, Metrics, Outcome
from sglang_prefillshare.routing.workers import Leg, Worker, WorkerPool

logger = logging.getLogger(__name__)

_EVENT_STREAM: Final = "text/event-stream"
_NOT_RETURNED: Final = frozenset(
    name.encode() for name in (*HOP_BY_HOP, "content-length", "date", "server", REQUEST_ID_HEADER)
)
_ACCOUNTING_WAIT_S: Final = 0.05
_TRANSFER_FAILURES: Final = (b"Decode transfer failed", b"Decode handshake failed")
"""How SGLang's decode workers begin the error of a request whose KV did not come, whatever the reason."""


class LegError(Exception):
    """A leg could not give its part.

    `answer` is the worker's own error (status, content type, body) to pass on, if it gave one. `is_unsent` says
    that no byte reached the worker, `is_lost` that the leg ended with its worker or its connection.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        status: int,
        message: str,
        outcome: Outcome,
        answer: tuple[int, bytes, bytes] | None = None,
        is_unsent: bool = False,
        is_lost: bool = False,
    ) -> None:
        super().__init__(message)
        self.worker = worker
        self.status = status
        self.message = message
        self.outcome = outcome
        self.answer = answer
        self.is_unsent = is_unsent
        self.is_lost = is_lost

    @property
    def allows_another_try(self) -> bool:
        """Prefilling again elsewhere changes nothing but time. A decode leg that was under way may have sampled."""
        return self.is_unsent or (self.is_lost and self.worker.role is Role.PREFILL)


class Call:
    """What is known of one request while it is served; `record` is what remains of it."""

    def __init__(self, endpoint: Endpoint, reply: Reply) -> None:
        self.endpoint = endpoint
        self.reply = reply
        self.started_at = time.time()
        self.began_s = time.perf_counter()
        self.request: ClientRequest | None = None
        self.headers: list[tuple[str, str]] = []
        self.placed: Placed | None = None
        self.attempts = 0
        self.worker_rids: tuple[str, ...] = ()
        self.prefill_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.cross_model_cached_tokens: int | None = None
        self.received_s: float | None = None
        self.sent_s: float | None = None
        self.first_byte_s: float | None = None
        self.answered_s: float | None = None
        self.is_answered = False  # decode's answer was read to its end
        self.deadline: asyncio.Timeout | None = None
        self.is_settled = False
        self.prefill_ended = asyncio.Event()
        self.abort_cause: str | None = None
        self.drain: asyncio.Timeout | None = None

    @property
    def is_expired(self) -> bool:
        return any(timeout is not None and timeout.expired() for timeout in (self.deadline, self.drain))

    @property
    def authorization(self) -> str | None:
        return next((value for name, value in self.headers if name == "authorization"), None)

    def record(self, outcome: Outcome, *, status: int | None, error: str | None) -> CallRecord:
        request = self.request
        prefill, decode = (self.placed.prefill, self.placed.decode) if self.placed else (None, None)
        end_s = self.answered_s if self.answered_s is not None else time.perf_counter()
        overhead_ms = ttft_ms = None
        if self.sent_s is not None and self.received_s is not None:
            overhead_ms = (self.sent_s - self.received_s) * 1000
        if self.first_byte_s is not None:
            ttft_ms = (self.first_byte_s - self.began_s) * 1000
        return CallRecord(
            rid=request.public_rid if request else (self.reply.request_id or ""),
            worker_rids=self.worker_rids,
            model=request.module if request else "",
            endpoint=self.endpoint,
            prefill_worker=prefill.worker.url if prefill else None,
            decode_worker=decode.worker.url if decode else None,
            decision=prefill.decision.reason if prefill else None,
            matched_tokens=prefill.decision.matched_tokens if prefill else None,
            decode_decision=decode.decision.reason if decode else None,
            decode_matched_tokens=decode.decision.matched_tokens if decode else None,
            attempts=self.attempts,
            prefill_tokens=self.prefill_tokens,
            cached_tokens=self.cached_tokens,
            cross_model_cached_tokens=self.cross_model_cached_tokens,
            overhead_ms=overhead_ms,
            ttft_ms=ttft_ms,
            e2e_ms=(end_s - self.began_s) * 1000,
            status=status,
            outcome=outcome,
            error=error,
            started_at=self.started_at,
        )


class Dispatcher:
    """Serves generation requests over the pool's workers.

    `session` and `background` belong to the app: the dispatcher starts abort messages in `background`, so that
    they survive the request they belong to.
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
    ) -> None:
        self._config = config
        self._pool = pool
        self._metrics = metrics
        self._calls = calls
        self._session = session
        self._background = background
        self._placer = Placer(config, pool=pool, index=index, metrics=metrics)
        self._leg_timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout_s)

    # -- the whole call

    async def serve(
        self,
        endpoint: Endpoint,
        *,
        headers: Sequence[tuple[str, str]],
        receive: Receive,
        send: Send,
        path_module: str | None = None,
    ) -> None:
        """Answer one request. Always leaves a call record; raises only `CancelledError`."""
        reply = Reply(send)
        call = Call(endpoint, reply)
        by_name = dict(headers)
        reply.request_id = by_name.get(REQUEST_ID_HEADER)
        try:
            async with asyncio.timeout(self._config.request_timeout_s) as deadline:
                call.deadline = deadline
                await self._serve(call, by_name, headers, receive, path_module)
                self._settle(call, Outcome.OK)
        except TimeoutError:
            message = f"The request took longer than {self._config.request_timeout_s:g} s."
            await self._fail(call, Outcome.TIMEOUT, 504, message, kind="timeout")
        except RequestError as error:
            await self._fail(call, Outcome.REJECTED, error.status, error.message, kind=error.kind)
        except ClientGoneError:
            self._settle(call, Outcome.DISCONNECTED)
        except UnplacedError as error:
            await self._fail(call, Outcome.UNAVAILABLE, 503, str(error), kind="worker_error")
        except LegError as error:
            await self._fail(call, error.outcome, error.status, error.message, kind="worker_error", answer=error.answer)
        except Exception as error:
            logger.exception("call %s failed in the router", reply.request_id)
            message = f"The router failed ({type(error).__name__}); its log says more."
            await self._fail(call, Outcome.INTERNAL, 500, message, kind="internal_error")
        finally:
            self._settle(call, Outcome.CANCELLED)

    def _settle(self, call: Call, outcome: Outcome, *, status: int | None = None, error: str | None = None) -> None:
        """Record how a call ended. The first time counts; done before the last byte is sent, so that a client
        that has its answer finds its record."""
        if call.is_settled:
            return
        call.is_settled = True
        record = call.record(outcome, status=status if status is not None else call.reply.status, error=error)
        self._calls.add(record)
        self._metrics.observe(record)

    async def _fail(
        self,
        call: Call,
        outcome: Outcome,
        status: int,
        message: str,
        *,
        kind: str,
        answer: tuple[int, bytes, bytes] | None = None,
    ) -> None:
        """Settle the call and answer with an error, without waiting long for a client that does not read."""
        reply = call.reply
        self._settle(call, outcome, status=reply.status if reply.is_started else status, error=message)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.abort_timeout_s):
                if answer is not None and not reply.is_started:
                    code, content_type, body = answer
                    content_type, body = client_error(call.endpoint, code, content_type, body)
                    await reply.whole(code, [(b"content-type", content_type)], body)
                else:
                    await reply.fail(status, message, kind=kind)

    async def _serve(
        self,
        call: Call,
        by_name: dict[str, str],
        headers: Sequence[tuple[str, str]],
        receive: Receive,
        path_module: str | None,
    ) -> None:
        raw = await read_body(receive, by_name.get("content-length", ""), max_bytes=self._config.max_body_bytes)
        call.received_s = time.perf_counter()
        request = parse_request(
            call.endpoint,
            raw,
            headers=by_name,
            modules=self._config.decode,
            path_module=path_module,
            limits_of=self._pool.limits,
        )
        call.request = request
        if call.reply.request_id is None:
            call.reply.request_id = header_safe(request.public_rid)
        call.headers = forwarded_headers(headers, request_id=call.reply.request_id)
        with self._metrics.inflight.labels(request.module).track_inprogress():
            await self._serve_with_retry(call, request, receive)

    async def _serve_with_retry(self, call: Call, request: ClientRequest, receive: Receive) -> None:
        """Place the request and run its legs. If a worker refused the connection, or if prefill was lost before the
        client got a byte, both legs are replaced once, with another worker in the place of that one."""
        chains = request.chains(block_bytes=self._config.prefix_block_bytes)
        call.placed = self._placer.place(request, chains)
        try:
            await self._run_legs(call, request, receive)
        except LegError as error:
            if error.is_unsent:
                self._pool.connection_refused(error.worker)
            if not error.allows_another_try or call.reply.is_started or self._placer.is_stopping:
                raise
            try:
                call.placed = self._placer.place(request, chains, before=call.placed, instead_of=error.worker)
            except UnplacedError:
                raise error from None
            self._metrics.retries.labels(error.worker.role).inc()
            await self._run_legs(call, request, receive)

    # -- the two legs

    async def _run_legs(self, call: Call, request: ClientRequest, receive: Receive) -> None:
        """Both legs, or neither: returns when both are complete, raises `LegError` or `ClientGoneError`."""
        assert call.placed is not None
        prefill, decode = call.placed.prefill.worker, call.placed.decode.worker
        assert prefill.info is not None
        base_model = prefill.info.model
        call.attempts += 1
        call.abort_cause = None
        call.prefill_ended.clear()
        call.prefill_tokens = call.cached_tokens = call.cross_model_cached_tokens = None
        rids = draw_rids(len(request.rids))
        call.worker_rids = rids
        host, port = prefill.bootstrap
        pairing = Pairing(host, port, draw_rooms(len(rids)), rids)
        prefill_leg = Leg(tokens=max(1, request.prompt_tokens - call.placed.prefill.decision.matched_tokens))
        decode_leg = Leg(tokens=request.prompt_tokens)
        prefill.begin(prefill_leg)
        decode.begin(decode_leg)
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch_client(call, receive))
                group.create_task(self._prefill_leg(call, request, prefill, prefill_leg, pairing, base_model))
                group.create_task(self._decode_leg(call, request, decode, decode_leg, pairing, watch))
        except BaseExceptionGroup as group_error:
            raise _cause_of(group_error) from None
        finally:  # a task that is cancelled before it starts ends nothing itself
            prefill.end(prefill_leg)
            decode.end(decode_leg)

    async def _watch_client(self, call: Call, receive: Receive) -> None:
        await wait_until_gone(receive)
        if not call.is_answered:
            call.abort_cause = call.abort_cause or "client"
            raise ClientGoneError

    async def _prefill_leg(
        self, call: Call, request: ClientRequest, worker: Worker, leg: Leg, pairing: Pairing, base_model: str
    ) -> None:
        """Have the base prefill the prompt; its answer is drained and only its accounting is kept."""
        body = self.prefill_body(request, base_model=base_model, pairing=pairing)
        headers = prefill_leg_headers(call.headers, module=request.module)
        call.sent_s = time.perf_counter()
        try:
            async with (
                asyncio.timeout(None) as call.drain,
                self._running(leg, call, worker, pairing.rids),
                self._session.post(
                    worker.url + request.endpoint, data=body, headers=headers, timeout=self._leg_timeout
                ) as response,
            ):
                answer = await response.read()
                leg.is_complete = True
                if response.status != 200:
                    error = _refused_by(worker, response, answer)
                    error.is_lost = response.status >= 500 and await self._goes_silent(worker, call)
                    raise error
                self.account(call, response, answer)
        except (LegError, TimeoutError) as error:
            if not call.is_answered:
                raise
            # The client has its whole answer, so the KV did arrive.
            logger.warning("%s: prefill leg of %s failed after the answer: %s", worker.label, pairing.rids[0], error)
        finally:
            call.prefill_ended.set()

    def prefill_body(self, request: ClientRequest, *, base_model: str, pairing: Pairing) -> bytes:
        """What the prefill worker is sent."""
        return prefill_leg_body(request, base_model=base_model, pairing=pairing)

    def account(self, call: Call, response: aiohttp.ClientResponse, answer: bytes) -> None:
        """Note what the prefill leg says it found and computed."""
        call.prefill_tokens = _count(response, PROMPT_TOKENS_HEADER)
        call.cached_tokens = _count(response, CACHED_TOKENS_HEADER)
        call.cross_model_cached_tokens = _count(response, CROSS_MODEL_HEADER)

    async def _decode_leg(
        self,
        call: Call,
        request: ClientRequest,
        worker: Worker,
        leg: Leg,
        pairing: Pairing,
        watch: asyncio.Task[None],
    ) -> None:
        """Pass the decode module's answer on. A stream starts with its first byte, so that a prefill error that
        comes before it still gets its own status."""
        body = decode_leg_body(request, pairing=pairing, is_adapter=worker.adapters is not None)
        named = ClientIds(pairing.rids, request.rids)
        reply = call.reply
        call.sent_s = time.perf_counter()
        async with (
            self._running(leg, call, worker, pairing.rids),
            self._session.post(
                worker.url + request.endpoint, data=body, headers=call.headers, timeout=self._leg_timeout
            ) as response,
        ):
            if response.status != 200:
                answer = await response.read()
                leg.is_complete = True
                if response.status == 500:
                    await self._raise_if_prefill_is_lost(call, answer)
                raise _refused_by(worker, response, answer)
            headers = [(name, value) for name, value in response.raw_headers if name.lower() not in _NOT_RETURNED]
            if response.headers.get("content-type", "").startswith(_EVENT_STREAM):
                stream = Events()
                async for data in response.content.iter_any():
                    events = stream.feed(data)
                    if not events:
                        continue
                    if not reply.is_started:
                        await self._raise_if_prefill_is_lost(call, events)
                    events, failure = failure_in_events(events)
                    if events:
                        if not reply.is_started:
                            call.first_byte_s = time.perf_counter()
                            await reply.start(200, headers)
                        await reply.chunk(named(events))
                    if failure is not None:
                        raise _ended_early(worker, failure)
                leg.is_complete = call.is_answered = True
                if not reply.is_started:
                    await reply.start(200, headers)
                await self._settle_answered(call, status=200)
                await reply.finish(named(stream.rest()))
            else:
                answer = await response.read()
                leg.is_complete = True
                failure = failure_in(answer)
                if failure is not None:
                    raise _ended_early(worker, failure)
                call.is_answered = True
                await self._settle_answered(call, status=200)
                await reply.whole(200, headers, named(answer))
        watch.cancel()
        if call.drain is not None and not call.prefill_ended.is_set():
            call.drain.reschedule(asyncio.get_running_loop().time() + self._config.drain_timeout_s)

    async def _raise_if_prefill_is_lost(self, call: Call, data: bytes) -> None:
        """Called with what decode said first. If that is that its KV did not come, and if prefill is lost within
        `loss_wait_s`, the call ends as if prefill's loss had been noticed first: with `LegError` of prefill.

        A lost connection of the prefill leg cancels us here, through the task group. A stream's first event is looked
        at too, because SGLang tells the errors of streams in them; a false alarm only costs it the wait for the
        prefill leg's end, which is near.
        """
        assert call.placed is not None
        worker = call.placed.prefill.worker
        if any(text in data for text in _TRANSFER_FAILURES) and await self._goes_silent(worker, call):
            raise _lost(worker, f"The {worker.label} was lost.")

    async def _goes_silent(self, worker: Worker, call: Call) -> bool:
        """Whether the prefill worker stops answering polls within `loss_wait_s`, while its leg runs. False, without
        a wait, where there is to be no other try anyway."""
        if call.attempts > 1 or call.reply.is_started or not self._placer.can_replace_prefill(worker):
            return False
        waits = [asyncio.ensure_future(event.wait()) for event in (worker.is_silent, call.prefill_ended)]
        try:
            await asyncio.wait(waits, timeout=self._config.loss_wait_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return worker.is_silent.is_set() and not call.prefill_ended.is_set()

    async def _settle_answered(self, call: Call, *, status: int) -> None:
        """Settle a call whose answer is complete but for its last bytes, if the prefill leg's accounting is there.

        It nearly always is, since the KV had to arrive first; otherwise the client is not kept waiting.
        """
        call.answered_s = time.perf_counter()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ACCOUNTING_WAIT_S):
                await call.prefill_ended.wait()
        if call.prefill_ended.is_set():
            self._settle(call, Outcome.OK, status=status)

    @contextlib.asynccontextmanager
    async def _running(self, leg: Leg, call: Call, worker: Worker, rids: Sequence[str]) -> AsyncIterator[None]:
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
                raise _lost(worker, leg.lost_reason)
            with _peer_errors(worker):
                yield
        except LegError as error:
            call.abort_cause = call.abort_cause or "peer"
            leg.is_complete = leg.is_complete or error.is_unsent
            raise
        except asyncio.CancelledError:
            if leg.lost_reason is not None:
                cause = "worker_down"
                call.abort_cause = call.abort_cause or "peer"
                task.uncancel()
                raise _lost(worker, leg.lost_reason) from None
            cause = call.abort_cause or ("timeout" if call.is_expired else "cancelled")
            raise
        finally:
            worker.end(leg)
            if not leg.is_complete:
                self._metrics.legs_aborted.labels(worker.role, cause).inc()
                self._start_abort(worker, rids, call.authorization)

    # -- ending legs

    def _start_abort(self, worker: Worker, rids: Sequence[str], authorization: str | None) -> None:
        abort = self._abort(worker, rids, authorization)
        try:
            self._background.create_task(abort)
        except RuntimeError:  # the app is already down
            abort.close()

    async def _abort(self, worker: Worker, rids: Sequence[str], authorization: str | None) -> None:
        """Tell a worker to drop its leg. Closing the connection alone lets SGLang find out seconds later."""
        headers = {}
        if self._config.worker_api_key is not None:
            headers["authorization"] = f"Bearer {self._config.worker_api_key}"
        elif authorization is not None:
            headers["authorization"] = authorization
        timeout = aiohttp.ClientTimeout(total=self._config.abort_timeout_s)
        for rid in rids:
            try:
                async with self._session.post(
                    worker.url + "/abort_request", json={"rid": rid}, headers=headers, timeout=timeout
                ) as response:
                    await response.read()
                    is_confirmed = response.status == 200
            except Exception as error:  # the leg is lost either way, and nobody waits for this task
                logger.debug("abort of %s at %s: %r", rid, worker.url, error)
                is_confirmed = False
            if not is_confirmed:
                self._metrics.abort_failures.labels(worker.role).inc()
                return

    def forget_sessions(self, workers: Collection[str]) -> None:
        """After a flush: a session's next call is placed as if it were its first."""
        self._placer.forget_sessions(workers)

    def stop(self) -> None:
        """Refuse new requests and end those in flight with 503."""
        self._placer.is_stopping = True
        for worker in self._pool:
            for leg in list(worker.legs):
                leg.fail("The router is stopping.")

    def refuse_new(self) -> None:
        self._placer.is_stopping = True


def _cause_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended the legs: a departed client before a failed leg, and any bug of ours before both."""
    errors = list(_leaves(group))
    for error in errors:
        if not isinstance(error, LegError | ClientGoneError | asyncio.CancelledError):
            return group
    for error in errors:
        if isinstance(error, ClientGoneError):
            return error
    return errors[0]


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for child in error.exceptions:
            yield from _leaves(child)
    else:
        yield error


@contextlib.contextmanager
def _peer_errors(worker: Worker) -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise LegError(
            worker,
            status=503,
            message=f"The {worker.label} cannot be reached: {error}.",
            outcome=Outcome.UNAVAILABLE,
            is_unsent=True,
        ) from error
    except aiohttp.ClientError as error:
        raise LegError(
            worker,
            status=502,
            message=f"The connection to the {worker.label} broke: {str(error) or type(error).__name__}.",
            outcome=Outcome.WORKER_FAILED,
            is_lost=True,
        ) from error


def _lost(worker: Worker, reason: str) -> LegError:
    return LegError(worker, status=503, message=reason, outcome=Outcome.UNAVAILABLE, is_lost=True)


def _ended_early(worker: Worker, failure: WorkerFailure) -> LegError:
    return LegError(
        worker,
        status=failure.status,
        message=f"The {worker.label} ended the answer before it was whole: {failure.message}",
        outcome=Outcome.WORKER_REFUSED if failure.status < 500 else Outcome.WORKER_FAILED,
    )


def _refused_by(worker: Worker, response: aiohttp.ClientResponse, body: bytes) -> LegError:
    return LegError(
        worker,
        status=response.status,
        message=f"The {worker.label} answered {response.status}: {body[:500].decode('utf-8', 'replace')}",
        outcome=Outcome.WORKER_REFUSED if response.status < 500 else Outcome.WORKER_FAILED,
        answer=(response.status, _content_type(response), body),
    )


def _content_type(response: aiohttp.ClientResponse) -> bytes:
    return next((value for name, value in response.raw_headers if name.lower() == b"content-type"), b"application/json")


def _count(response: aiohttp.ClientResponse, header: str) -> int | None:
    value = response.headers.get(header)
    return int(value) if value is not None and value.isascii() and value.isdigit() else None
