"""What workers and router tell each other: the worker description, header names, and the boundary rule.

Plain values only. `host/` serves them from inside SGLang; `routing/` reads them over HTTP.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from sglang_prefillshare.errors import WorkerError

BOUNDARY_RULE: Final = "base:x1..x(n-1);decode:xn.."
"""Contract 1, in one string: the base computes KV for x1..x(n-1), the decode module takes over at xn.
Written into every manifest, so that a module trained on another split is refused."""

WORKER_INFO_PATH: Final = "/prefill_share"
"""GET on any SGLang worker that runs with a role: its `WorkerInfo` as JSON."""

TREE_PATH: Final = "/prefill_share/tree"
"""GET on the same, `?limit=` a number of nodes: its radix tree in numbers (`tree.py`), and no token of any prompt."""

MODULE_HEADER: Final = "x-smg-routing-key"
"""On a prefill leg: the decode module that the prompt is prefilled for. SGLang carries this header into the
scheduler as `routing_key`; its `/generate` endpoint reads the body field `routing_key` instead."""

RID_HEADER: Final = "x-prefill-share-rid"
"""On a leg whose API has no field for it (Anthropic's): what the leg is called on its worker."""

ADAPTER_HEADER: Final = "x-prefill-share-adapter"
"""On a decode leg whose API names none (OpenAI's responses): the module, where the worker has several."""

PROMPT_TOKENS_HEADER: Final = "x-prefill-share-prompt-tokens"
CACHED_TOKENS_HEADER: Final = "x-prefill-share-cached-tokens"
CROSS_MODEL_HEADER: Final = "x-prefill-share-cross-model-cached-tokens"
"""On a prefill leg's answer: tokens that the base had to hold (n-1), those found in its radix tree, and of those
the ones whose KV was first computed for another decode module. Of a batch the sums over its prompts; each counts once,
however many answers to it there are (`n`)."""

BLOCKS_HEADER: Final = "x-prefill-share-last-blocks"
"""On the same, of a worker that publishes what its tree holds (`EventStream`): for each prompt, in order and separated
by commas, how many tokens the base had to hold and the hash of the last complete block of them, `TOKENS:HASH`, without
a HASH where there is none. A block's hash depends on all tokens before it, so that it names the whole prompt. The
worker's events call the block the same."""
MAX_BLOCKS_TOLD: Final = 64
"""Of more prompts in one request the header says nothing: a header's length is bounded."""


class Role(StrEnum):
    """Which half of the split a worker runs, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How full a worker is, as its scheduler said last; all in tokens of KV or in requests, each 0 or more.

    `used_tokens` are those that requests hold, so that pool less used is room: what is free and what the cache can give
    up (`evictable_tokens`). `leased_tokens`, which are among the used, are tied up in handoffs. A request that decodes
    takes `reserved_tokens` of room beyond what it holds: SGLang lets no other one have them.
    """

    pool_tokens: int
    used_tokens: int
    evictable_tokens: int = 0
    leased_tokens: int = 0
    running_requests: int = 0
    waiting_requests: int = 0
    reserved_tokens: int = 0

    @classmethod
    def from_json(cls, data: Any, *, source: str) -> Room:
        """Raises `WorkerError`, naming `source`, for what is no room."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(data, dict) or not {"pool_tokens", "used_tokens"} <= data.keys():
            raise WorkerError(f"{source} says that its room is {data!r}, wanted an object with {', '.join(names)}.")
        values = {name: data[name] for name in names if name in data}
        for name, value in values.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
                raise WorkerError(f"{source} says that its {name} is {value!r}, wanted a whole number from 0 on.")
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventStream:
    """Where a worker publishes which blocks its radix tree takes and gives up: SGLang's KV events, in dynamo format.

    Both ports are the worker's host's: ZMQ's PUB, and a ROUTER that repeats what was missed. A block has as many tokens
    as a page of the worker.
    """

    port: int
    replay_port: int
    topic: str = ""

    @classmethod
    def from_json(cls, data: Any, *, source: str) -> EventStream:
        """Raises `WorkerError`, naming `source`, for what is none."""
        wanted = "wanted an object with port, replay_port (1 to 65535) and topic"
        if not isinstance(data, dict) or not {"port", "replay_port"} <= data.keys():
            raise WorkerError(f"{source} says that its event stream is {data!r}, {wanted}.")
        ports, topic = (data["port"], data["replay_port"]), data.get("topic", "")
        if not all(type(port) is int and 0 < port < 65536 for port in ports) or not isinstance(topic, str):
            raise WorkerError(f"{source} says that its event stream is {data!r}, {wanted}.")
        return cls(port=ports[0], replay_port=ports[1], topic=topic)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What one worker says of itself at `WORKER_INFO_PATH`.

    `model` is the served model name, `base_fingerprint` the content identity of the base whose KV it writes
    (prefill) or reads (decode). `bootstrap_port` is `None` on a decode worker. `max_total_tokens` is the capacity
    of the worker's KV pool in tokens. `trained` is False for a decode module without a manifest.
    """

    role: Role
    model: str
    base_fingerprint: str
    boundary: str
    trained: bool
    transfer_backend: str
    page_size: int
    kv_dtype: str
    max_total_tokens: int
    max_running_requests: int
    context_length: int
    bootstrap_port: int | None
    version: str
    vocab_size: int | None = None
    """Token ids are below it."""
    max_prompt_bytes: int | None = None
    """A text of more bytes of UTF-8 has more tokens than `context_length`; None where the tokenizer sets no bound."""
    handoff_failure: str | None = None
    """Why it can hand no KV over, as it found out when it started; it answers 503 then."""
    pool_space: str | None = None
    """With the `prefillshare` backend: workers of one space (host and namespaces) can map each other's memory."""
    gpu: str | None = None
    """With the same, the UUID of the GPU that the KV pool is on; None on a CPU."""
    gpus_in_reach: dict[str, bool] | None = None
    """Of each GPU that this worker sees, by UUID, whether its own can read from it."""

    modules: list[str] | None = None
    """The decode modules that it serves as adapters, by name; None where it serves `model`."""
    events: EventStream | None = None
    """Where it publishes what its tree holds; None where it does not, or not in a way that a router can use."""
    room: Room | None = field(default=None, compare=False)
    """How full it is now; None where it does not say. The one thing here that changes while a worker stays the same, so
    that two descriptions which differ in it alone are equal."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any, *, source: str) -> WorkerInfo:
        """Parse what a worker answered; `source` names it in the `WorkerError` raised when it does not fit."""
        if not isinstance(data, dict):
            raise WorkerError(f"{source} answered {type(data).__name__} at {WORKER_INFO_PATH}, wanted a JSON object.")
        fields = dataclasses.fields(cls)
        missing = {field.name for field in fields if field.default is dataclasses.MISSING} - data.keys()
        if missing:
            raise WorkerError(
                f"{source} describes itself without {', '.join(sorted(missing))}. "
                "Run the same sglang-prefillshare version on workers and router."
            )
        values = {field.name: data[field.name] for field in fields if field.name in data}
        try:
            values["role"] = Role(values["role"])
        except ValueError:
            raise WorkerError(f"{source} has role {values['role']!r}, wanted prefill, decode or unified.") from None
        if values.get("room") is not None:
            values["room"] = Room.from_json(values["room"], source=source)
        if values.get("events") is not None:
            values["events"] = EventStream.from_json(values["events"], source=source)
        modules = values.get("modules")
        if not isinstance(modules, list | None) or not all(isinstance(name, str) for name in modules or ()):
            raise WorkerError(f"{source} has the modules {modules!r}, wanted a list of names, or null.")
        if not isinstance(values["model"], str):
            raise WorkerError(f"{source} has the model {values['model']!r}, wanted a name.")
        if type(values["page_size"]) is not int or values["page_size"] < 1:
            raise WorkerError(f"{source} has pages of {values['page_size']!r} tokens, wanted one or more.")
        return cls(**values)
