"""Ten thousand requests through real routers and workers, of which one in twenty meets a fault.

Two prefill workers, two decode workers of one module, one of two adapters, and two routers before them, one of which
has a far too short deadline. Sessions grow; each turn is asked at one of three endpoints, streamed or whole. Clients
leave, send half a request or a wrong one; links between router and workers are cut or stall at a byte that is drawn;
workers are told to abort all that they do, or stopped for a second. Every answer is compared with plain Transformers,
token for token; every other request must fail with a reason, within the router's deadline, and one that met no fault
must not fail at all. Afterwards nothing may be left anywhere: no request, no KV, no memory, no connection.

Writes out/soak/storm.json; the exit status is 1 if anything was wrong, leaked or hung.

    python test/soak/storm.py --requests 10000 --fault-share 0.05
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import click
import psutil
import uvloop
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sglang_prefillshare.config import (  # noqa: E402
    AdapterModule,
    DecodeModule,
    RouterSettings,
    Topology,
    WorkerSettings,
)
from sglang_prefillshare.deployment import Deployment, DeploymentOptions, Worker  # noqa: E402
from sglang_prefillshare.plans import Commands, WorkerPlan, router_command  # noqa: E402
from sglang_prefillshare.ports import PortBlocks  # noqa: E402
from sglang_prefillshare.process import SupervisedProcess  # noqa: E402
from sglang_prefillshare.protocol import Role  # noqa: E402
from sglang_prefillshare.routing.request import SESSION_HEADER  # noqa: E402
from sglang_prefillshare.routing.telemetry import Outcome  # noqa: E402
from test.soak.link import FAULT_HEADER, Breaks, LinkFault, Links, Way  # noqa: E402
from test.soak.sessions import Session, Turn, make_sessions  # noqa: E402
from test.soak.tally import Tally  # noqa: E402
from test.support.device import WORKER_ARGS  # noqa: E402
from test.support.models import make_adapter, make_base, make_decode_module  # noqa: E402
from test.support.oracle import Oracle  # noqa: E402
from test.support.servers import (  # noqa: E402
    GRACE,
    answers,
    handoff_counts,
    metric_samples,
    processes,
    session,
    shared_preloader,
    until_idle,
)

NEW_TOKENS: Final = 6
LONG_ANSWER_TOKENS: Final = 200
CONTEXT: Final = 1024
POOL_TOKENS: Final = 4096
"""So few that trees evict all the time, and requests wait for room."""
SESSIONS: Final = 80
CLIENTS: Final = 16

DEADLINE_S: Final = 30.0
HASTY_DEADLINE_S: Final = 0.2
SLACK_S: Final = 5.0
HANGS_AFTER_S: Final = DEADLINE_S + 2 * SLACK_S
PAUSE_S: Final = 1.0
CLOSES_IDLE_AFTER_S: Final = 6.0
"""A router closes idle connections to workers after 3 s."""
EMPTY_WITHIN_S: Final = 5.0
IDLE_WITHIN_S: Final = 30.0
GROWTH_MIB: Final = 24.0
"""What a router's memory may be larger by at the end: its logs of calls and prefixes fill up."""
GROWTH_FILES: Final = 4

ROUTER_ARGS: Final = ("--request-timeout", f"{DEADLINE_S:g}", "--drain-timeout", "3", "--queue-timeout", "20")
HASTY_ARGS: Final = ("--request-timeout", f"{HASTY_DEADLINE_S:g}", "--drain-timeout", "3")


class Fault(StrEnum):
    """What happens to a request, or to its surroundings while it is under way."""

    LEAVES_EARLY = "client leaves before an answer"
    LEAVES_MIDWAY = "client leaves amid its stream"
    HALF = "client sends half a request"
    MALFORMED = "malformed request"
    TOO_LONG = "prompt too long"
    HASTY = "deadline far too short"
    LINK = "link to a worker breaks"
    ABORTED = "a worker is told to abort all"
    PAUSED = "a worker is stopped for a second"


_WEIGHTS: Final[Mapping[Fault, int]] = {
    Fault.LEAVES_EARLY: 3,
    Fault.LEAVES_MIDWAY: 3,
    Fault.HALF: 1,
    Fault.MALFORMED: 2,
    Fault.TOO_LONG: 1,
    Fault.HASTY: 3,
    Fault.LINK: 7,
    Fault.ABORTED: 1,
    Fault.PAUSED: 1,
}
_MAY_FAIL: Final = frozenset({Fault.HASTY, Fault.LINK})
_MUST_BE_REFUSED: Final = frozenset({Fault.MALFORMED, Fault.TOO_LONG})


def draw_faults(requests: int, share: float, draw: random.Random) -> dict[int, Fault]:
    """By the number of the request that it happens to: a `share` of them, each kind as often as it weighs."""
    count = round(requests * share)
    numbers = sorted(draw.sample(range(requests), count))
    whole, total = list(_WEIGHTS.items()), sum(_WEIGHTS.values())
    kinds = [kind for kind, weight in whole for _ in range(-(-count * weight // total))]
    draw.shuffle(kinds)
    return dict(zip(numbers, kinds, strict=False))


class Form(StrEnum):
    """How a turn is asked."""

    GENERATE = "/generate"
    GENERATE_STREAM = "/generate, streamed"
    COMPLETION = "/v1/completions"
    COMPLETION_STREAM = "/v1/completions, streamed"
    CHAT = "/v1/chat/completions"
    CHAT_STREAM = "/v1/chat/completions, streamed"

    @property
    def path(self) -> str:
        return self.value.removesuffix(", streamed")

    @property
    def is_stream(self) -> bool:
        return self.value.endswith(", streamed")


_FORMS_OF_IDS: Final = (Form.GENERATE, Form.GENERATE_STREAM, Form.COMPLETION, Form.COMPLETION_STREAM)
_FORMS_OF_CHAT: Final = (Form.CHAT, Form.CHAT_STREAM)


def forms_of(turn: Turn) -> tuple[Form, ...]:
    return _FORMS_OF_CHAT if turn.messages else _FORMS_OF_IDS


def body_of(turn: Turn, form: Form, *, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    body: dict[str, Any] = {"model": turn.module, "stream": form.is_stream}
    greedy = {"temperature": 0, "ignore_eos": True}
    match form:
        case Form.GENERATE | Form.GENERATE_STREAM:
            params = {**greedy, "max_new_tokens": new_tokens}
            return {**body, "input_ids": list(turn.prompt), "sampling_params": params}
        case Form.COMPLETION | Form.COMPLETION_STREAM:
            own: dict[str, Any] = {"prompt": list(turn.prompt), "return_token_ids": True}
        case Form.CHAT:
            own = {"messages": list(turn.messages), "return_token_ids": True}
        case Form.CHAT_STREAM:
            own = {"messages": list(turn.messages)}
    return {**body, **greedy, **own, "max_tokens": new_tokens}


@dataclass(slots=True)
class Heard:
    """What came back. `said` is token ids, or the text of a chat's stream, which shows no ids."""

    status: int | None = None
    said: list[int] | str | None = None
    is_whole: bool = False
    is_left: bool = False
    """Its client left, as it was meant to."""
    error: str | None = None
    """What an error, or an error event, says; None where nothing was said."""
    seconds: float = 0.0


def judge(
    heard: Heard, wanted: Sequence[int] | str, *, fault: Fault | None, is_beside_abort: bool = False
) -> tuple[str, str | None]:
    """What became of a request ("ok", "failed", "hung"), and what is wrong with that, if anything."""
    if heard.is_whole:
        if fault in _MUST_BE_REFUSED:
            return "ok", "was answered, and should have been refused"
        if heard.said != wanted:
            return "ok", f"{heard.said}, wanted {wanted}"
        return "ok", None
    if heard.seconds > HANGS_AFTER_S:
        return "hung", f"no end within {heard.seconds:.0f} s"
    limit_s = (HASTY_DEADLINE_S if fault is Fault.HASTY else DEADLINE_S) + SLACK_S
    told = f"status {heard.status}, {heard.error or heard.said}"
    if heard.seconds > limit_s:
        return "failed", f"failed only after {heard.seconds:.1f} s: {told}"
    if not heard.error:
        return "failed", f"failed without a reason: {told}"
    if fault in _MUST_BE_REFUSED:
        return "failed", None if heard.status is not None and 400 <= heard.status < 500 else f"{told}, wanted 4xx"
    if heard.status == 500 and "The router failed" in heard.error:
        return "failed", told
    if fault in _MAY_FAIL or is_beside_abort:
        return "failed", None
    return "failed", f"met no fault, and failed: {told}"


_MALFORMED: Final[tuple[tuple[str, bytes, dict[str, str]], ...]] = (
    ("/generate", b'{"model": "coder", "input_ids": [5, 6', {}),
    ("/generate", b"[1, 2, 3]", {}),
    ("/generate", b"", {}),
    ("/generate", b"\xff\xfe\x00", {}),
    ("/generate", b'{"model": "nobody", "input_ids": [5, 6]}', {}),
    ("/generate", b'{"model": "coder", "input_ids": [5, 99999999]}', {}),
    ("/generate", b'{"model": "coder", "input_ids": [5, -1]}', {}),
    ("/generate", b'{"model": "coder", "input_ids": [5], "text": "both"}', {}),
    ("/generate", b'{"model": "coder", "input_ids": [5], "sampling_params": {"temperature": -1}}', {}),
    ("/generate", b'{"model": "coder", "input_ids": [5], "stream": "yes"}', {}),
    ("/generate", b'{"model": "coder", "input_ids": [5, 6]}', {"content-encoding": "gzip"}),
    ("/generate", b"[" * 5000, {}),
    ("/v1/completions", b'{"model": "coder", "prompt": "a", "max_tokens": -3}', {}),
    ("/v1/completions", b'{"model": "coder", "max_tokens": 3}', {}),
    ("/v1/chat/completions", b'{"model": "coder", "messages": "hello"}', {}),
    ("/v1/chat/completions", b'{"model": "base", "messages": [{"role": "user", "content": "a"}]}', {}),
)


@dataclass(slots=True)
class UnderWay:
    """A request that is asked now. What is aborted beside it may end it too."""

    is_beside_abort: bool = False


@dataclass(slots=True)
class Footprint:
    """Of a router: what it holds of the machine."""

    mib: float
    files: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        process = psutil.Process(pid)
        return cls(process.memory_info().rss / 2**20, process.num_fds())


@dataclass(slots=True)
class Result:
    """What a storm came to, beside its tally."""

    tally: Tally = field(default_factory=Tally)
    left: int = 0
    links: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    """Of the routers' own counters."""
    empty_after_s: float | None = None
    slowest_s: float = 0.0
    before: list[Footprint] = field(default_factory=list)
    after: list[Footprint] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        found = {**self.tally.to_json(), "left": self.left}
        found["requests"] = found.pop("handoffs")
        for name in ("links", "forms", "outcomes"):
            found[name] = dict(getattr(self, name))
        found["queue_empty_after_s"] = self.empty_after_s
        found["slowest_s"] = round(self.slowest_s, 2)
        found["routers"] = [
            {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)}
            for before, after in zip(self.before, self.after, strict=False)
        ]
        return {**found, "seconds": round(self.seconds, 1)}

    def line(self) -> str:
        tally = self.tally
        empty = "never" if self.empty_after_s is None else f"after {self.empty_after_s:.1f} s"
        memory = ", ".join(
            f"{before.mib:.0f} to {after.mib:.0f} MiB and {before.files} to {after.files} files"
            for before, after in zip(self.before, self.after, strict=False)
        )
        return (
            f"{tally.handoffs:,} requests, {sum(tally.faults.values()):,} faults: {tally.ok:,} answered right, "
            f"{sum(tally.failed.values()):,} failed with a reason, {self.left:,} left; {len(tally.wrong)} wrong, "
            f"{len(tally.hung)} hung, {len(tally.leaked)} leaked; routers empty {empty}, {memory}; {self.seconds:.0f} s"
        )


class Storm:
    """Asks, has faults happen, and keeps the tally."""

    def __init__(
        self,
        deployment: Deployment,
        routers: Sequence[SupervisedProcess],
        urls: Sequence[str],
        sessions: Sequence[Session],
        *,
        seed: int,
    ) -> None:
        self._deployment = deployment
        self._routers = routers
        self._url, self._hasty_url = urls
        self._sessions = sessions
        self._seed = seed
        self._chats: dict[tuple[int, ...], str] = {}
        """The text of a chat's stream, by its prompt: its ids are not shown."""
        self._flags: dict[int, UnderWay] = {}
        self._paused: set[str] = set()
        self._heard_count = 0
        """Requests that a router must have counted."""
        self._outcomes_before: Counter[str] = Counter()
        self.result = Result()

    # -- without faults

    async def rehearse(self) -> None:
        """Every turn once, before anything goes wrong: what is compared later is right now."""
        gate = asyncio.Semaphore(CLIENTS // 2)
        tally = self.result.tally

        async def one(client: aiohttp.ClientSession, turn: Turn, form: Form) -> None:
            async with gate:
                heard = await self._ask(client, self._url, form.path, body_of(turn, form), {})
            if form is Form.CHAT_STREAM and heard.is_whole:
                assert isinstance(heard.said, str)
                self._chats[turn.prompt] = heard.said
            elif heard.said != list(turn.answer):
                tally.wrong.append(f"rehearsal: {form} by {turn.module}, {len(turn.prompt)} tokens: {heard}")

        async with session() as client:
            await asyncio.gather(
                *(
                    one(client, turn, form)
                    for turns in self._sessions
                    for turn in turns
                    for form in (_FORMS_OF_CHAT if turn.messages else (Form.GENERATE,))
                )
            )
            self._outcomes_before = await self._outcomes(client)

    # -- with faults

    async def rage(self, requests: int, share: float, on_progress: Callable[[int], None]) -> None:
        faults = draw_faults(requests, share, random.Random(self._seed))
        numbers = iter(range(requests))
        turns = self._turns()
        tally = self.result.tally

        async def client_of(client: aiohttp.ClientSession) -> None:
            for key, session_turns in turns:
                for turn in session_turns:
                    if (number := next(numbers, None)) is None:
                        return
                    await self._one(client, number, turn, key, faults.get(number))
                    tally.handoffs += 1
                    on_progress(tally.handoffs)

        async with session() as client:
            await asyncio.gather(*(client_of(client) for _ in range(CLIENTS)))

    def _turns(self) -> Iterator[tuple[str, Session]]:
        """Sessions for ever, in an order that is drawn, each time under a name of its own."""
        round_number, draw = 0, random.Random(self._seed)
        while True:
            round_number += 1
            order = list(range(len(self._sessions)))
            draw.shuffle(order)
            for index in order:
                yield f"session-{round_number}-{index}", self._sessions[index]

    async def _one(self, client: aiohttp.ClientSession, number: int, turn: Turn, key: str, fault: Fault | None) -> None:
        draw = random.Random(f"{self._seed} {number}")  # whoever was answered first, its fault is the same each time
        form = draw.choice(forms_of(turn))
        headers = {SESSION_HEADER: key}
        body = body_of(turn, form)
        path, url = form.path, self._url
        self.result.forms[form] += 1
        if fault is not None:
            self.result.tally.faults[fault] += 1
        flags = self._flags[number] = UnderWay()
        try:
            match fault:
                case Fault.LEAVES_EARLY | Fault.HALF:
                    await self._leave(path, body, headers, is_half=fault is Fault.HALF, draw=draw)
                    self.result.left += 1
                    return
                case Fault.LEAVES_MIDWAY:
                    form = Form.CHAT_STREAM if turn.messages else Form.GENERATE_STREAM
                    body = body_of(turn, form, new_tokens=LONG_ANSWER_TOKENS)
                    heard = await self._ask(client, url, form.path, body, headers, events=draw.randint(1, 30))
                    if heard.is_left:
                        self._note_left(turn, heard)
                        return
                case Fault.MALFORMED:
                    path, raw, more = draw.choice(_MALFORMED)
                    heard = await self._ask(client, url, path, raw, {**headers, **more})
                case Fault.TOO_LONG:
                    form = draw.choice(_FORMS_OF_IDS)
                    long = dataclasses.replace(
                        turn, prompt=(turn.prompt * CONTEXT)[: draw.randint(CONTEXT, 4 * CONTEXT)]
                    )
                    heard = await self._ask(client, url, form.path, body_of(long, form), headers)
                case Fault.HASTY:
                    heard = await self._ask(client, self._hasty_url, path, body, headers)
                case Fault.LINK:
                    headers[FAULT_HEADER] = _draw_link_fault(number, draw).header()
                    heard = await self._ask(client, url, path, body, headers)
                case Fault.ABORTED | Fault.PAUSED:
                    happen = self._abort_all if fault is Fault.ABORTED else self._pause
                    heard, _ = await asyncio.gather(
                        self._ask(client, url, path, body, headers),
                        happen(client, draw.choice(self._deployment.workers), draw.uniform(0.0, 0.4)),
                    )
                case None:
                    heard = await self._ask(client, url, path, body, headers)
        finally:
            del self._flags[number]
        self._note(turn, form, heard, fault, flags, number)

    def _note(self, turn: Turn, form: Form, heard: Heard, fault: Fault | None, flags: UnderWay, number: int) -> None:
        tally = self.result.tally
        self._heard_count += 1
        self.result.slowest_s = max(self.result.slowest_s, heard.seconds)
        is_chat_stream = form is Form.CHAT_STREAM and fault is not Fault.MALFORMED
        wanted = self._chats.get(turn.prompt, "") if is_chat_stream else list(turn.answer)
        what, wrong = judge(heard, wanted, fault=fault, is_beside_abort=flags.is_beside_abort)
        if what == "failed":
            tally.count_failure(f"{fault or 'beside an abort'}: {heard.status} {heard.error}")
        elif what == "ok" and wrong is None:
            tally.ok += 1
        if wrong is not None:
            where = f"request {number}, {form} by {turn.module}, {len(turn.prompt)} tokens, {fault or 'no fault'}"
            (tally.hung if what == "hung" else tally.wrong).append(f"{where}: {wrong}")

    def _note_left(self, turn: Turn, heard: Heard) -> None:
        """Who left amid a stream has heard the beginning of the right answer."""
        self.result.left += 1
        self._heard_count += 1
        if isinstance(heard.said, list):
            said, wanted = heard.said[:NEW_TOKENS], list(turn.answer)[: len(heard.said)]
            if said != wanted:
                self.result.tally.wrong.append(f"the beginning of a stream by {turn.module}: {said}, wanted {wanted}")

    # -- asking

    async def _ask(
        self,
        client: aiohttp.ClientSession,
        url: str,
        path: str,
        body: Mapping[str, Any] | bytes,
        headers: Mapping[str, str],
        *,
        events: int | None = None,
    ) -> Heard:
        """One request to its end, or until so many `events` came."""
        heard = Heard()
        began = time.monotonic()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json", **headers}
        try:
            async with (
                asyncio.timeout(HANGS_AFTER_S + SLACK_S),
                client.post(url + path, data=raw, headers=sent) as response,
            ):
                heard.status = response.status
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    await _hear_stream(response, heard, events)
                else:
                    _hear_whole(await response.read(), heard)
        except TimeoutError:
            pass
        except aiohttp.ClientError as error:
            # The router itself may break a connection for no reason at all.
            heard.status, heard.error = None, None
            heard.said = f"the router's connection broke: {error!r}"
        heard.seconds = time.monotonic() - began
        return heard

    async def _leave(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str], *, is_half: bool, draw: random.Random
    ) -> None:
        """Send a request, or half of one, and go after a moment."""
        raw = json.dumps(body).encode()
        host, port = self._url.removeprefix("http://").split(":")
        head = [f"POST {path} HTTP/1.1", f"host: {host}", "content-type: application/json"]
        head += [f"content-length: {len(raw)}", *(f"{name}: {value}" for name, value in headers.items())]
        whole = "\r\n".join(head).encode() + b"\r\n\r\n" + raw
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(whole[: draw.randint(1, len(whole) - 1)] if is_half else whole)
        await writer.drain()
        await asyncio.sleep(draw.uniform(0.0, 0.5))
        if draw.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()

    # -- what goes wrong around

    async def _abort_all(self, client: aiohttp.ClientSession, worker: Worker, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._mark_beside_abort()
        async with client.post(f"{worker.url}/abort_request", json={"abort_all": True}) as response:
            await response.read()
        await asyncio.sleep(0.2)
        self._mark_beside_abort()

    def _mark_beside_abort(self) -> None:
        for flags in self._flags.values():
            flags.is_beside_abort = True

    async def _pause(self, client: aiohttp.ClientSession, worker: Worker, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        if worker.name in self._paused or worker.pid is None:
            return
        self._paused.add(worker.name)
        root = psutil.Process(worker.pid)
        tree = [root, *root.children(recursive=True)]
        try:
            for process in tree:
                process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(PAUSE_S)
        finally:
            for process in tree:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
            self._paused.discard(worker.name)

    # -- what is left

    async def settle(self) -> None:
        """Nothing is under way in a router, nothing is held by a worker, and the next answers are right."""
        result, tally = self.result, self.result.tally
        began = time.monotonic()
        async with session() as client:
            held = await self._under_way_in_routers(client)
            while held and time.monotonic() - began < IDLE_WITHIN_S:
                await asyncio.sleep(0.1)
                held = await self._under_way_in_routers(client)
            result.empty_after_s = None if held else time.monotonic() - began
            if result.empty_after_s is None or result.empty_after_s > EMPTY_WITHIN_S:
                tally.leaked.append(f"under way in the routers {EMPTY_WITHIN_S:g} s after the last answer: {held}")
            try:
                await until_idle(client, self._deployment.workers, timeout_s=IDLE_WITHIN_S)
            except AssertionError as error:
                tally.leaked.append(str(error))
            for worker in self._deployment.workers:
                if (pages := (await handoff_counts(client, worker)).pages_leased) != 0:
                    tally.leaked.append(f"{worker.name} has {pages} pages leased")
            await self._check_counts(client)
            for turns in self._sessions[:6]:
                heard = await self._ask(client, self._url, "/generate", body_of(turns[-1], Form.GENERATE), {})
                if not turns[-1].messages and heard.said != list(turns[-1].answer):
                    tally.wrong.append(f"after the storm: {heard}")

    async def _under_way_in_routers(self, client: aiohttp.ClientSession) -> dict[str, float]:
        found: Counter[str] = Counter()
        for url in (self._url, self._hasty_url):
            for sample in await metric_samples(client, url):
                if sample.name.removeprefix("prefillshare_router_") in (
                    "inflight_requests",
                    "queued_requests",
                    "worker_inflight_legs",
                ):
                    found[sample.name] += int(sample.value)
        return {name: count for name, count in found.items() if count}

    async def _check_counts(self, client: aiohttp.ClientSession) -> None:
        """Every request that somebody heard of is in the routers' counters, and no more than were sent."""
        outcomes = await self._outcomes(client)
        outcomes.subtract(self._outcomes_before)
        tally = self.result.tally
        self.result.outcomes = +outcomes
        if outcomes[Outcome.INTERNAL]:
            tally.wrong.append(f"the routers failed {outcomes[Outcome.INTERNAL]} requests themselves")
        if not self._heard_count <= outcomes.total() <= tally.handoffs:
            tally.wrong.append(
                f"the routers count {outcomes.total()} requests, wanted {self._heard_count} (those whose clients heard "
                f"of an end) to {tally.handoffs} (those that were sent)"
            )

    async def _outcomes(self, client: aiohttp.ClientSession) -> Counter[str]:
        found: Counter[str] = Counter()
        for url in (self._url, self._hasty_url):
            for sample in await metric_samples(client, url):
                if sample.name == "prefillshare_router_requests_total":
                    found[sample.labels["outcome"]] += int(sample.value)
        return found

    async def look(self) -> list[Footprint]:
        """At the routers, once their idle connections are closed."""
        await asyncio.sleep(CLOSES_IDLE_AFTER_S)
        return [Footprint.of(pid) for router in self._routers if (pid := router.pid) is not None]

    def compare(self) -> None:
        """What the routers hold of the machine, with what they held before."""
        for before, after in zip(self.result.before, self.result.after, strict=True):
            if after.mib > before.mib + GROWTH_MIB or after.files > before.files + GROWTH_FILES:
                self.result.tally.leaked.append(f"a router grew from {before} to {after}")


async def _hear_stream(response: aiohttp.ClientResponse, heard: Heard, events: int | None) -> None:
    """To its end, to an error event, or until so many `events` came."""
    ids: list[int] = []
    text: list[str] = []
    count = 0
    async for line in response.content:
        if line.startswith(b"data: [DONE]"):
            heard.is_whole = True
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            heard.error = event["error"].get("message")
            heard.is_whole = False
            return
        if "output_ids" in event:
            ids = event["output_ids"]
        for choice in event.get("choices", ()):
            ids += choice.get("token_ids") or ()
            text.append(choice.get("delta", {}).get("content") or "")
        heard.said = ids or "".join(text)
        count += 1
        if count == events:
            heard.is_left = True
            return


def _hear_whole(answer: bytes, heard: Heard) -> None:
    try:
        body = json.loads(answer)
    except ValueError:
        heard.said = answer[:200].decode("utf-8", "replace")
        return
    if heard.status == 200:
        heard.is_whole = True
        choice = next(iter(body.get("choices", ())), {})
        heard.said = body.get("output_ids") or choice.get("token_ids") or choice.get("response_token_ids")
    else:
        error = body.get("error") if isinstance(body, dict) else None
        heard.error = error.get("message") if isinstance(error, dict) else body.get("message")


def _draw_link_fault(number: int, draw: random.Random) -> LinkFault:
    way = draw.choice((Way.REQUEST, Way.ANSWER, Way.ANSWER))
    return LinkFault(
        number,
        role=draw.choice((Role.PREFILL, Role.DECODE)),
        breaks=draw.choice((*[Breaks.RESET] * 3, *[Breaks.CLOSE] * 2, *[Breaks.STALL] * 2, Breaks.DEAD)),
        way=way,
        after_bytes=draw.randint(0, 1200),
        stall_s=draw.uniform(0.5, 3.0),
        is_lasting=draw.random() < 0.5,
    )


class _Workers(Deployment):
    """Without a router: those of a storm stand behind links."""

    def _plan(self) -> tuple[list[WorkerPlan], WorkerPlan | None]:
        plans, _ = super()._plan()
        return plans, None


def topology_of(base: Path, coder: Path, adapters: Mapping[str, Path]) -> Topology:
    args = {**WORKER_ARGS, "max-total-tokens": POOL_TOKENS, "chunked-prefill-size": 256}
    return Topology(
        base=WorkerSettings(str(base), workers=2, args=args),
        decode=(DecodeModule("coder", WorkerSettings(str(coder), workers=2, args=args)),),
        adapters=tuple(AdapterModule(name, str(folder)) for name, folder in adapters.items()),
    )


@asynccontextmanager
async def linked_routers(
    deployment: Deployment, links: Links, log_dir: Path
) -> AsyncIterator[tuple[list[SupervisedProcess], list[str]]]:
    """The router and the hasty one, with a link to every worker; yields them and their URLs when both are ready."""
    ports = PortBlocks()
    async with AsyncExitStack() as stack:
        stack.callback(ports.release)
        linked: list[WorkerPlan] = []
        for worker in deployment.workers:
            assert worker.plan.role is not None
            url = urlsplit(await stack.enter_async_context(links.to(worker.url, worker.plan.role)))
            assert url.hostname is not None and url.port is not None
            linked.append(dataclasses.replace(worker.plan, host=url.hostname, port=url.port))
        routers: list[SupervisedProcess] = []
        urls: list[str] = []
        for name, args in (("router", ROUTER_ARGS), ("hasty", HASTY_ARGS)):
            port = ports.take()
            command = [*router_command(RouterSettings(), linked, port=port, commands=Commands()), *args]
            log = stack.enter_context((log_dir / f"{name}.log").open("w", buffering=1))
            router = SupervisedProcess(
                name,
                command,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                on_line=lambda line, log=log: print(line, file=log),  # type: ignore[misc]
                on_exit=lambda _status: None,
                grace=GRACE,
            )
            stack.push_async_callback(asyncio.to_thread, _end, router)
            routers.append(router)
            urls.append(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 60.0
        for router, url in zip(routers, urls, strict=True):
            while not await asyncio.to_thread(answers, f"{url}/health"):
                assert time.monotonic() < deadline, router.tail(20)
                await asyncio.sleep(0.2)
        yield routers, urls


def _end(router: SupervisedProcess) -> None:
    router.stop()
    router.wait(GRACE.total_s + 10.0)


def run(
    requests: int,
    share: float,
    folder: Path,
    *,
    seed: int,
    log_dir: Path,
    on_progress: Callable[[int], None] = lambda _count: None,
) -> Result:
    """Make the models and the sessions, start everything, let it rage, and see what is left."""
    base = make_base(folder / "base", seed=41, max_position_embeddings=CONTEXT)
    coder = make_decode_module(folder / "coder", base, seed=5)
    adapters = {name: make_adapter(folder / name, base, seed=2 + i) for i, name in enumerate(("planner", "reviewer"))}
    oracles = {"coder": Oracle(base, coder)}
    oracles |= {name: Oracle(base, base, adapter=adapter) for name, adapter in adapters.items()}
    sessions = make_sessions(oracles, SESSIONS, NEW_TOKENS, seed=seed)
    log_dir.mkdir(parents=True, exist_ok=True)
    options = DeploymentOptions(ready_timeout_s=240.0, grace=GRACE, log_dir=log_dir, preloader=shared_preloader())
    with _Workers(topology_of(base, coder, adapters), options=options) as deployment:
        return uvloop.run(_run(deployment, sessions, requests, share, seed, log_dir, on_progress))


async def _run(
    deployment: Deployment,
    sessions: Sequence[Session],
    requests: int,
    share: float,
    seed: int,
    log_dir: Path,
    on_progress: Callable[[int], None],
) -> Result:
    links = Links()
    async with linked_routers(deployment, links, log_dir) as (routers, urls):
        storm = Storm(deployment, routers, urls, sessions, seed=seed)
        result = storm.result
        await storm.rehearse()
        result.before = await storm.look()
        workers_before = processes(deployment)
        began = time.monotonic()
        await storm.rage(requests, share, on_progress)
        result.seconds = time.monotonic() - began
        await storm.settle()
        result.after = await storm.look()
        storm.compare()
        if processes(deployment) != workers_before:
            result.tally.wrong.append("a worker is not the process that it was")
        result.links = links.happened
        return result


@click.command(help=__doc__)
@click.option("--requests", default=10_000, show_default=True)
@click.option("--fault-share", "share", default=0.05, show_default=True, help="Of the requests that meet a fault.")
@click.option("--seed", default=1, show_default=True)
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(requests: int, share: float, seed: int, out: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # Transformers' own bars
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("storm", total=requests)
        result = run(
            requests,
            share,
            Path(folder),
            seed=seed,
            log_dir=out / "soak" / "storm",
            on_progress=lambda done: progress.update(task, completed=done),
        )
    summary = {"command": " ".join(["python", *sys.argv]), "seed": seed, **result.to_json()}
    target = out / "soak" / "storm.json"
    target.write_text(json.dumps(summary, indent=2) + "\n")
    click.echo(result.line())
    tally = result.tally
    for what, found in (("WRONG", tally.wrong), ("LEAKED", tally.leaked), ("HUNG", tally.hung)):
        for line in found[:10]:
            click.echo(f"  {what}: {line}")
    click.echo(f"written to {target}")
    sys.exit(0 if tally.is_clean else 1)


if __name__ == "__main__":
    main()
