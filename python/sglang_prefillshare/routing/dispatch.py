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
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, MutableMapping, Sequence
from typing import Any, Final

import aiohttp

from sglang_prefillshare.protocol import (
    CACHED_TOKENS_HEADER,
    CROSS_MODEL_HEADER,
    PROMPT_TOKENS_HEADER,
    Role,
)
from sglang_prefillshare.routing import _json
from sglang_prefillshare.routing.answers import (
    ClientIds,
    Events,
    WorkerFailure,
    client_error,
    error_body,
    failure_in,
    failure_in_events,
)
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.policy import Decision, pick_decode, pick_prefill
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
from sglang_prefillshare.routing.sessions import SessionMap
from sglang_prefillshare.routing.telemetry import CallLog, CallRecord, Metrics, Outcome
from sglang_prefillshare.routing.workers import Leg, Worker, WorkerPool

logger = logging.getLogger(__name__)

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_EVENT_STREAM: Final = "text/event-stream"
_NOT_RETURNED: Final = frozenset(
    name.encode() for name in (*HOP_BY_HOP, "content-length", "date", "server", REQUEST_ID_HEADER)
)
_RETRY_AFTER_S: Final = 1
_ACCOUNTING_WAIT_S: Final = 0.05
_TRANSFER_FAILURES: Final = (b"Decode transfer failed", b"Decode handshake failed")
"""How SGLang's decode workers begin the error of a request whose KV did not come, whatever the reason."""


class ClientGoneError(Exception):
    """The client left before its answer was complete."""


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


class Reply:
    """The answer to the client, whole or streamed, over ASGI's `send`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.request_id: str | None = None
        self.status: int | None = None
        self._is_finished = False
        self._ends_event = True

    @property
    def is_started(self) -> bool:
        return self.status is not None

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.status = status
        raw = list(headers)
        if self.request_id is not None:
            raw.append((REQUEST_ID_HEADER.encode(), self.request_id.encode("latin-1")))
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def chunk(self, data: bytes) -> None:
        self._ends_event = data.endswith(b"\n\n")
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        self._is_finished = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def whole(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        await self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self.finish(body)

    async def fail(self, status: int, message: str, *, kind: str) -> None:
        """Answer with an error; in a stream, as its last event and without [DONE]. Nothing if all was said."""
        if self._is_finished:
            return
        body = _json.dumps(error_body(status, message, kind=kind))
        if self.is_started:
            await self.finish((b"" if self._ends_event else b"\n\n") + b"data: " + body + b"\n\n")
            return
        headers = [(b"content-type", b"application/json")]
        if status == 503:
            headers.append((b"retry-after", b"%d" % _RETRY_AFTER_S))
        await self.whole(status, headers, body)


class Call:
    """What is known of one request while it is served; `record` is what remains of it."""

    def __init__(self, endpoint: Endpoint, reply: Reply) -> None:
        self.endpoint = endpoint
        self.reply = reply
        self.started_at = time.time()
        self.began_s = time.perf_counter()
        self.request: ClientRequest | None = None
        self.headers: list[tuple[str, str]] = []
        self.decision: Decision | None = None
        self.decode_decision: Decision | None = None
        self.prefill: Worker | None = None
        self.decode: Worker | None = None
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
            prefill_worker=self.prefill.url if self.prefill else None,
            decode_worker=self.decode.url if self.decode else None,
            decision=self.decision.reason if self.decision else None,
            matched_tokens=self.decision.matched_tokens if self.decision else None,
            decode_decision=self.decode_decision.reason if self.decode_decision else None,
            decode_matched_tokens=self.decode_decision.matched_tokens if self.decode_decision else None,
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
        self._index = index
        self._metrics = metrics
        self._calls = calls
        self._session = session
        self._background = background
        self._prefill_sessions = self._new_sessions()
        self._decode_sessions = {name: self._new_sessions() for name in config.decode}
        self._prefill_turns = itertools.count()
        self._decode_turns = itertools.count()
        self._is_stopping = False
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
        raw = await self._read_body(receive, by_name.get("content-length", ""))
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
        self._place(call, request, chains)
        try:
            await self._run_legs(call, request, receive)
        except LegError as error:
            if error.is_unsent:
                self._pool.connection_refused(error.worker)
            if not error.allows_another_try or call.reply.is_started or self._is_stopping:
                raise
            try:
                self._place(call, request, chains, instead_of=error.worker)
            except LegError:
                raise error from None
            self._metrics.retries.labels(error.worker.role).inc()
            await self._run_legs(call, request, receive)

    async def _read_body(self, receive: Receive, announced: str) -> bytes:
        """The whole body; 413 as soon as it is known to be too large."""
        parts: list[bytes] = []
        size = int(announced) if announced.isascii() and announced.isdigit() and len(announced) < 20 else 0
        if size > self._config.max_body_bytes:
            raise RequestError(413, f"The request body is larger than {self._config.max_body_bytes} bytes.")
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            size += len(part)
            if size > self._config.max_body_bytes:
                raise RequestError(413, f"The request body is larger than {self._config.max_body_bytes} bytes.")
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    # -- placement

    def _place(
        self, call: Call, request: ClientRequest, chains: list[list[int]], *, instead_of: Worker | None = None
    ) -> None:
        """Choose the workers and note the choice; with `instead_of`, choose another one in its place. Raises
        `LegError` (503) where there is none."""
        missing = self._pool.missing([request.module])
        if self._is_stopping:
            missing = ["the router is stopping"]
        if missing:
            text = "; ".join(missing)
            raise self._unplaced(f"{text[0].upper()}{text[1:]}.")
        if call.prefill is None or call.prefill is instead_of or not call.prefill.is_ready:
            self._place_prefill(call, request, chains, instead_of)
        if call.decode is None or call.decode is instead_of or not call.decode.is_ready_for(request.module):
            self._place_decode(call, request, chains, instead_of)

    def _place_prefill(
        self, call: Call, request: ClientRequest, chains: list[list[int]], instead_of: Worker | None
    ) -> None:
        sessions = self._prefill_sessions
        is_new = sessions.is_new(request.session_key)
        snapshots = self._pool.prefill_snapshots(
            request.module, chains, without=instead_of, session_counts=sessions.live_counts() if is_new else {}
        )
        if not snapshots:
            raise self._unplaced("No other prefill worker is ready.")
        decision = pick_prefill(
            snapshots,
            session_worker=sessions.worker_of(request.session_key),
            is_new_session=is_new,
            turn=next(self._prefill_turns),
            config=self._config.policy,
        )
        self._metrics.decisions.labels(Role.PREFILL, decision.reason).inc()
        call.decision = decision
        call.prefill = self._pool[decision.worker]
        self._note(decision, request, chains, sessions)

    def _place_decode(
        self, call: Call, request: ClientRequest, chains: list[list[int]], instead_of: Worker | None
    ) -> None:
        sessions = self._decode_sessions[request.module]
        is_new = sessions.is_new(request.session_key)
        snapshots = self._pool.decode_snapshots(
            request.module, chains, without=instead_of, session_counts=sessions.live_counts() if is_new else {}
        )
        if not snapshots:
            raise self._unplaced(f"No other worker of the decode module {request.module!r} is ready.")
        decision = pick_decode(
            snapshots,
            session_worker=sessions.worker_of(request.session_key),
            is_new_session=is_new,
            turn=next(self._decode_turns),
            config=self._config.policy,
        )
        self._metrics.decisions.labels(Role.DECODE, decision.reason).inc()
        call.decode_decision = decision
        call.decode = self._pool[decision.worker]
        self._note(decision, request, chains, sessions)

    def forget_sessions(self, workers: Collection[str]) -> None:
        """After a flush: a session's next call is placed as if it were its first."""
        for sessions in (self._prefill_sessions, *self._decode_sessions.values()):
            sessions.forget(workers)

    def _new_sessions(self) -> SessionMap:
        return SessionMap(capacity=self._config.session_capacity, live_s=self._config.session_live_s)

    def _note(self, decision: Decision, request: ClientRequest, chains: list[list[int]], sessions: SessionMap) -> None:
        """Before the KV is there: the session's next request may come before this one is prefilled."""
        for chain in chains:
            self._index.insert(decision.worker, chain)
        sessions.assign(request.session_key, decision.worker)

    def _unplaced(self, message: str) -> LegError:
        return LegError(self._pool.prefill[0], status=503, message=message, outcome=Outcome.UNAVAILABLE)

    # -- the two legs

    async def _run_legs(self, call: Call, request: ClientRequest, receive: Receive) -> None:
        """Both legs, or neither: returns when both are complete, raises `LegError` or `ClientGoneError`."""
        prefill, decode = call.prefill, call.decode
        assert prefill is not None and call.decision is not None and decode is not None and prefill.info is not None
        base_model = prefill.info.model
        call.attempts += 1
        call.abort_cause = None
        call.prefill_ended.clear()
        call.prefill_tokens = call.cached_tokens = call.cross_model_cached_tokens = None
        rids = draw_rids(len(request.rids))
        call.worker_rids = rids
        host, port = prefill.bootstrap
        pairing = Pairing(host, port, draw_rooms(len(rids)), rids)
        prefill_leg = Leg(tokens=max(1, request.prompt_tokens - call.decision.matched_tokens))
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
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                if call.is_answered:
                    return
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
        worker = call.prefill
        assert worker is not None
        if any(text in data for text in _TRANSFER_FAILURES) and await self._goes_silent(worker, call):
            raise _lost(worker, f"The {worker.label} was lost.")

    async def _goes_silent(self, worker: Worker, call: Call) -> bool:
        """Whether the prefill worker stops answering polls within `loss_wait_s`, while its leg runs. False, without
        a wait, where there is to be no other try anyway."""
        can_be_replaced = any(other.is_ready and other is not worker for other in self._pool.prefill)
        if call.attempts > 1 or call.reply.is_started or self._is_stopping or not can_be_replaced:
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

    def stop(self) -> None:
        """Refuse new requests and end those in flight with 503."""
        self._is_stopping = True
        for worker in self._pool:
            for leg in list(worker.legs):
                leg.fail("The router is stopping.")

    def refuse_new(self) -> None:
        self._is_stopping = True


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
