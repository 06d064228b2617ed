"""Can one client's request end a worker, hold up others, or spoil an answer of theirs?

Thousands of requests, well formed but for a few fields, of every endpoint and with headers that are anything, to the
router and to the workers themselves, and some to the router's other paths and to its administration without the key for
it, while another client asks the same question again and again. Afterwards every worker has the process it began with,
all KV and all requests are gone from the pools, and the other client got the same right answer every time. An answer of
500 counts as wrong too: whatever it was, it passed all doors. So does one from behind a closed door. Exit status 1 if
anything was wrong, lost or hung.

    python test/soak/fuzz_requests.py --requests 10000
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from yarl import URL

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sglang_prefillshare.config import RouterSettings  # noqa: E402
from sglang_prefillshare.deployment import Deployment  # noqa: E402
from sglang_prefillshare.request_fields import GENERATE, MESSAGES, OPENAI, RESPONSES, SAMPLING_PARAMS  # noqa: E402
from test.support.models import make_base, make_decode_module, sample_prompt  # noqa: E402
from test.support.servers import deploy, greedy, post, processes, session, topology, until_idle  # noqa: E402

AT_ONCE = 8
HANG_S = 60.0
CONTEXT = 512
NO_KV_MOVES = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
"""SGLang's own health checks say this: a worker answers alone. Whoever reaches a worker can say it too."""

ADMIN_KEY = "sesame"
"""Nobody here shows it."""

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 100, 511, 512, 513, 99_999, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1, 2**63),
    *(-(2**63) - 1, 2**64, 10**30, 0.0, 0.5, 1.0, 3.0, 3.5, -0.5, 1e-50, 1e-7, 1e38, 1e39, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    "",
    "a",
    "hello there",
    "(a+)+$",
    "x*",
    "[",
    "é" * 3,
    "\ud800",
    "\x00",
    "0",
    "2.2.2.2",
    "{",
    '{"type": "object"}',
)
plain = st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.booleans() | st.none() | st.text(max_size=12)
names = st.sampled_from(("5", "511", "512", "-1", "a", "type", "json_schema", "__req__", "thinking_budget"))
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)
likely: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(1, 600),
    "stop_token_ids": st.lists(st.integers(0, 511), max_size=4),
    "logit_bias": st.dictionaries(st.integers(0, 511).map(str), st.floats(-100, 100), max_size=3),
    "min_new_tokens": st.integers(0, 8),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 2),
    "min_p": st.floats(0, 1),
    "stop": st.sampled_from(("", "a", ["b", "cd"], [])),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "sampling_seed": st.integers(-(2**63), 2**63 - 1),
    "max_tokens": st.integers(1, 20),
    "max_new_tokens": st.integers(0, 600),
    "ignore_eos": st.booleans(),
    "token_ids_logprob": st.lists(st.integers(0, 511), max_size=4),
    "return_sampling_mask": st.booleans(),
    "return_text_in_logprobs": st.booleans(),
    "return_flat_raw_output_top_logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "priority": st.integers(-5, 5),
    "n": st.integers(1, 3),
    "stop_sequences": st.sampled_from((["a"], ["b", "cd"], [])),
    "instructions": st.just("Be brief."),
    "system": st.sampled_from(("Be brief.", [{"type": "text", "text": "Be brief."}])),
    "thinking": st.sampled_from(({"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024})),
    "previous_response_id": st.just("resp_none"),
    "rid": st.sampled_from(("a", "a_0", "", ["a", "b"])),
    "response_format": st.sampled_from(({"type": "json_object"}, {"type": "structural_tag", "structures": []})),
    "custom_params": st.dictionaries(names, plain, max_size=2),
    "tools": st.just([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]),
    "tool_choice": st.sampled_from(("auto", "required", "none")),
    "return_token_ids": st.booleans(),
    "return_entropy": st.booleans(),
    "stream_interval": st.integers(1, 5),
    "watermark": st.just({"enabled": True, "key": "k"}),
    "regex": st.sampled_from(("[a-z]{3}", "(a|b)*", "\\d+", "(?:", "a{1,9999}", "")),
    "ebnf": st.sampled_from(('root ::= "a" | "b"', "root ::=", "root ::= root", "")),
    "json_schema": st.sampled_from(('{"type": "object"}', '{"$ref": "#"}', '{"enum": []}', "{}", '{"type": 5}')),
    "stop_regex": st.sampled_from(("x*", "a{1,3}b", "\\w+$", "(?=a)")),
    "stream": st.booleans(),
    "logprobs": st.integers(0, 5) | st.booleans(),
    "top_logprobs_num": st.integers(0, 600),
    "return_logprob": st.booleans(),
}
ids = st.lists(st.integers(0, 511) | st.sampled_from(NUMBERS), min_size=0, max_size=6)


def fields_of(table_names: Iterable[str]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of the fields that workers read values of, as they like them, and seldom one of any with any value."""
    named = sorted(table_names)
    liked = [name for name in named if name in likely]
    good = st.lists(st.sampled_from(liked), max_size=3, unique=True) if liked else st.just([])
    fitting = good.flatmap(lambda chosen: st.fixed_dictionaries({name: likely[name] for name in chosen}))
    wild = st.dictionaries(st.sampled_from(named), values, max_size=1)
    return st.builds(lambda few, one: {**few, **one}, fitting, st.one_of(st.just({}), wild))


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as it is sent: to a generation endpoint with a `body`, elsewhere with `raw` bytes or none."""

    path: str
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    raw: bytes | None = None
    is_closed: bool = False
    """Nothing but a refusal may come from there."""


_HEADER_NAMES = (
    *("x-smg-routing-key", "x-request-id", "x-smg-target-worker", "x-request-timeout-ms", "x-data-parallel-rank"),
    *("x-prefill-share-rid", "x-prefill-share-adapter", "x-prefill-share-cached-tokens", "x-override-rid"),
    *(
        "x-override-bootstrap-room",
        "x-override-priority",
        "authorization",
        "x-api-key",
        "anthropic-version",
        "traceparent",
    ),
    *("tracestate", "accept", "accept-encoding", "connection", "cookie", "content-encoding", "expect", "te", "origin"),
    *("range", "if-none-match", "x-forwarded-for", "x-sglext-return-input-ids", "x-sglext-ids-framed", "x-unheard-of"),
)
_HEADER_VALUES = (
    *(
        "",
        "0",
        "1",
        "-1",
        "NaN",
        "99999999999999999999",
        "a",
        "a_0",
        "session 1",
        "é" * 3,
        "\u2603",
        "x" * 4000,
        "{}",
        "null",
    ),
    *("[1]", "Bearer", "Bearer a", "Basic YTpi", "bearer " + "k" * 64, "identity", "gzip", "close", "x-request-id, te"),
    *(
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-00-00-00",
        "../../etc/passwd",
        "100-wait",
        "\t",
        '"',
    ),
)
headers = st.one_of(
    st.just({}),
    st.dictionaries(st.sampled_from(_HEADER_NAMES), st.sampled_from(_HEADER_VALUES), max_size=3),
)


def sent() -> st.SearchStrategy[tuple[str, Sent]]:
    """A door, and what is sent there: four in five to a generation endpoint, of those three in five to the router."""
    doors = st.sampled_from(["router", "router", "router", "coder", "base"])
    asked = st.builds(
        lambda door, request, more, prefix: (
            door,
            Sent((prefix if door == "router" else "") + request[0], request[1], more),
        ),
        doors,
        requests(),
        headers,
        st.sampled_from(("", "", "", "/m/coder", "/m/nobody")),
    )
    return weighted((4, asked), (1, others().map(lambda one: ("router", one))))


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """One of these, as often as they weigh; `one_of` takes one that is named several times for one."""
    indices = [index for index, (weight, _) in enumerate(choices) for _ in range(weight)]
    return st.sampled_from(indices).flatmap(lambda index: choices[index][1])


def others() -> st.SearchStrategy[Sent]:
    """The router's other paths, and its administration by those who may not."""
    raws = st.one_of(
        values.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=40),
        st.just(b"[" * 20_000),
        st.just(b"x" * 100_000),
        st.just(b'{"url": "http://127.0.0.1:9", "is_draining": true}'),
        st.just(b'{"name": "planner", "path": "/etc"}'),
    )
    shown = st.sampled_from(
        ({}, {"authorization": "Bearer "}, {"authorization": "Bearer wrong"}, {"x-api-key": ADMIN_KEY})
    )
    closed = st.builds(
        lambda where, raw, key: Sent(where[1], headers=key, method=where[0], raw=raw, is_closed=True),
        st.sampled_from(
            (
                *(
                    ("POST", "/admin/workers"),
                    ("DELETE", "/admin/workers?url=http://127.0.0.1:9"),
                    ("POST", "/modules"),
                ),
                *(("POST", "/admin/workers/drain"), ("DELETE", "/modules/coder"), ("DELETE", "/modules/%00")),
            )
        ),
        raws,
        shown,
    )
    names = st.sampled_from(("coder", "nobody", "", "a/b", "%00", "%ff", "..%2f..", "é", "x" * 3000, "resp_none"))
    numbers = st.sampled_from(("", "0", "3", "-1", "1.5", "nan", "²", "9" * 30, "9" * 5000))
    paths = st.one_of(
        st.sampled_from(
            (
                *(
                    "/v1/models",
                    "/health",
                    "/livez",
                    "/readyz",
                    "/workers",
                    "/calls",
                    "/metrics",
                    "/ui",
                    "/ui/",
                    "/ui/state",
                ),
                *("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/", "//", "/v1", "/generate"),
                *("/v1/messages/count_tokens", "/v1/responses", "/abort_request", "/prefill_share", "/flush_cache"),
            )
        ),
        names.map(lambda name: f"/v1/models/{name}"),
        names.map(lambda name: f"/v1/responses/{name}"),
        names.map(lambda name: f"/m/{name}/health"),
        names.map(lambda name: f"/ui/{name}"),
        st.builds(lambda limit, rid: f"/calls?limit={limit}&rid={rid}", numbers, names),
        numbers.map(lambda limit: f"/calls?limit={limit}"),
    )
    methods = st.sampled_from(("GET", "GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
    open_to_all = st.builds(
        lambda path, method, raw, more: Sent(path, headers=more, method=method, raw=raw), paths, methods, raws, headers
    )
    counted = requests().map(lambda one: Sent("/v1/messages/count_tokens", one[1]))
    return weighted((2, closed), (4, open_to_all), (1, counted))


def requests() -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """Endpoint and body, over every field that SGLang's endpoints have."""
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest, ResponsesRequest
    from sglang.srt.managers.io_struct import GenerateReqInput

    own = {"model", "prompt", "messages", "input_ids", "text", "sampling_params", "max_tokens"}
    of_generate = {f.name for f in dataclasses.fields(GenerateReqInput)} | GENERATE.keys()
    sampling = fields_of(list(SAMPLING_PARAMS.keys() | {"unheard_of"})).map(lambda p: {"max_new_tokens": 4, **p})
    right_ids = st.lists(st.integers(0, 511), min_size=1, max_size=40)
    prompts = ids | st.lists(ids, max_size=3)
    generate = st.builds(
        lambda prompt, params, more: ("/generate", {**prompt, "sampling_params": params, **more}),
        st.one_of(
            st.just({"input_ids": [70, 71, 72]}),
            right_ids.map(lambda p: {"input_ids": p}),
            st.text(min_size=1, max_size=20).map(lambda t: {"text": t}),
            st.one_of(prompts.map(lambda p: {"input_ids": p}), values.map(lambda t: {"text": t})),
        ),
        st.one_of(sampling, sampling, sampling, sampling, st.lists(sampling, max_size=3) | values),
        fields_of(list(of_generate - own)),
    )
    chat = st.builds(
        lambda messages, more: ("/v1/chat/completions", {"messages": messages, "max_tokens": 4, **more}),
        st.one_of(*[st.just([{"role": "user", "content": "hello"}])] * 4, values),
        fields_of(list((ChatCompletionRequest.model_fields.keys() | OPENAI.keys()) - (own - {"input_ids"}))),
    )
    completion = st.builds(
        lambda prompt, more: ("/v1/completions", {"prompt": prompt, "max_tokens": 4, **more}),
        st.one_of(st.just("hello there"), st.just(["a b", "c d"]), right_ids, prompts | values),
        fields_of(list((CompletionRequest.model_fields.keys() | OPENAI.keys()) - own)),
    )
    said = st.sampled_from(("hello", [{"type": "text", "text": "hello"}], [{"type": "image"}], [], None))
    turns = st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant", "system", "tool")), "content": said}),
        max_size=3,
    )
    messages = st.builds(
        lambda messages, more: ("/v1/messages", {"messages": messages, "max_tokens": 4, **more}),
        st.one_of(st.just([{"role": "user", "content": "hello"}]), turns, values),
        fields_of((AnthropicMessagesRequest.model_fields.keys() | MESSAGES.keys()) - own),
    )
    responses = st.builds(
        lambda said, more: ("/v1/responses", {"input": said, "max_output_tokens": 4, **more}),
        st.one_of(st.just("hello there"), turns, values),
        fields_of((ResponsesRequest.model_fields.keys() | RESPONSES.keys()) - own - {"input"}),
    )
    return st.one_of(generate, chat, completion, messages, responses)


@dataclass
class Found:
    """What happened. `wrong` lists what must not, with the request that did it."""

    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    neighbour_answers: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.wrong

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": self.sent,
            "statuses": dict(sorted(self.statuses.items())),
            "right answers of the other client": self.neighbour_answers,
            "wrong": self.wrong,
        }


def run(
    count: int, folder: Path, *, log_dir: Path | None = None, seed_number: int = 1, limit_s: float = 3600.0
) -> Found:
    """Deploy tiny models and send `count` requests, or as many as `limit_s` allows."""
    base = make_base(folder / "base", max_position_embeddings=CONTEXT)
    modules = {"coder": make_decode_module(folder / "coder", base, seed=1)}
    described = dataclasses.replace(
        topology(base, modules), router=RouterSettings(args={"admin-api-key": ADMIN_KEY, "request-timeout": 50})
    )
    with deploy(described, log_dir) as deployment:
        return fuzz(deployment, count, seed_number=seed_number, limit_s=limit_s)


def fuzz(deployment: Deployment, count: int, *, seed_number: int = 1, limit_s: float = 3600.0) -> Found:
    found = Found()
    before = processes(deployment)
    deadline = time.monotonic() + limit_s
    loop = asyncio.new_event_loop()

    @seed(seed_number)
    @settings(
        max_examples=-(-count // AT_ONCE),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(sent(), min_size=AT_ONCE, max_size=AT_ONCE))
    def send_all(batch: list[tuple[str, Sent]]) -> None:
        nonlocal deadline
        if found.sent >= count or time.monotonic() > deadline or len(found.wrong) > 20:
            return
        loop.run_until_complete(_send_batch(deployment, batch, found))
        if processes(deployment) != before:
            tails = {worker.name: worker.tail(40) for worker in deployment.workers}
            found.wrong.append(f"a worker is not the process that it was, after {batch}; they said {tails}")
            deadline = 0.0

    try:
        with _neighbour(deployment, found):
            send_all()
        loop.run_until_complete(_settle(deployment, found))
    finally:
        loop.close()
    return found


async def _send_batch(deployment: Deployment, batch: list[tuple[str, Sent]], found: Found) -> None:
    async with session() as client:
        await asyncio.gather(*(_send(client, deployment, door, request, found) for door, request in batch))


async def _send(client: aiohttp.ClientSession, deployment: Deployment, door: str, request: Sent, found: Found) -> None:
    raw, headers = request.raw, dict(request.headers)
    base_url = deployment.router_url if door == "router" else deployment.worker(door).url
    if request.body is not None:
        named = {"model": "coder", **request.body} if door == "router" else {**request.body, **NO_KV_MOVES}
        raw = json.dumps(named).encode()
        headers["content-type"] = "application/json"
    if request.method in ("GET", "HEAD", "OPTIONS"):
        raw = None
    head = f"{door} {request.method} {request.path[:200]} {request.headers!r:.500}"
    told = f"{head} {(raw or b'')[:2000].decode(errors='replace')}"
    found.sent += 1
    try:
        async with (
            asyncio.timeout(HANG_S),
            client.request(
                request.method, URL(base_url + request.path, encoded=True), data=raw, headers=headers
            ) as response,
        ):
            answer = await response.read()
    except TimeoutError:
        found.wrong.append(f"no answer within {HANG_S:g} s, at {time.strftime('%H:%M:%S')}: {told}")
        return
    except aiohttp.ClientError as error:
        found.wrong.append(f"{error!r}: {told}")
        return
    found.statuses[f"{door} {response.status}"] += 1
    if response.status >= 500 or (b"site-packages" in answer and door == "router"):
        found.wrong.append(f"{response.status} {answer[:300]!r}: {told}")
    if request.is_closed and response.status not in (401, 403, 404, 405):
        found.wrong.append(f"{response.status} from behind a closed door, {answer[:300]!r}: {told}")


@contextmanager
def _neighbour(deployment: Deployment, found: Found) -> Iterator[None]:
    """Another client, with one question of its own: what it was told before is what it must be told throughout."""
    body = greedy(sample_prompt(40, seed=11), 12, model="coder")
    stop = threading.Event()

    async def ask() -> None:
        async with session() as client:
            first: list[int] | None = None
            while not stop.is_set():
                answer = await post(client, f"{deployment.router_url}/generate", body)
                if answer.status != 200 or (first is not None and answer.token_ids != first):
                    found.wrong.append(f"the other client got {answer.status} {str(answer.body)[:300]}")
                    return
                if first is None:
                    first = answer.token_ids
                    ready.set()
                found.neighbour_answers += 1
                await asyncio.sleep(0.05)

    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(ask()))
    thread.start()
    ready.wait(60.0)
    try:
        yield
    finally:
        stop.set()
        thread.join(120.0)
        if thread.is_alive():
            found.wrong.append("the other client waits for its answer")


async def _settle(deployment: Deployment, found: Found) -> None:
    async with session() as client:
        try:
            await until_idle(client, deployment.workers, timeout_s=90.0)
        except (AssertionError, aiohttp.ClientError) as error:
            found.wrong.append(f"not given back: {error}")


@click.command(help=__doc__)
@click.option("--requests", "count", default=10_000, show_default=True)
@click.option("--seed", "seed_number", default=1, show_default=True)
@click.option("--limit-s", default=3600.0, show_default=True, help="Stop sending after so many seconds.")
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(count: int, seed_number: int, limit_s: float, out: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # Transformers' own bars
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run(count, Path(folder), log_dir=out / "soak" / "fuzz", seed_number=seed_number, limit_s=limit_s)
    summary = {**found.to_json(), "seed": seed_number, "seconds": round(time.monotonic() - started, 1)}
    target = out / "soak" / "fuzz.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    click.echo(json.dumps(summary, indent=2))
    sys.exit(0 if found.is_clean else 1)


if __name__ == "__main__":
    main()
