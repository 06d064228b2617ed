"""One client request: what it asks, the bytes of its prompt, and the bodies of its two legs. Pure functions."""

from __future__ import annotations

import random
import re
import secrets
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final
from urllib.parse import quote

from sglang_prefillshare.errors import PrefillShareError
from sglang_prefillshare.protocol import ADAPTER_HEADER, MODULE_HEADER, RID_HEADER
from sglang_prefillshare.request_fields import (
    GENERATE,
    MAX_DEPTH,
    MESSAGES,
    NO_LIMITS,
    OPENAI,
    RESPONSES,
    RESPONSES_HEADROOM,
    FieldError,
    Limits,
    check_batch,
    check_depth,
    check_fields,
    check_order,
    check_sampling_params,
    check_stops,
    check_text,
    check_text_bytes,
    prompt_ids,
    top_logprobs,
)
from sglang_prefillshare.routing import _json
from sglang_prefillshare.routing.prefix_index import BYTES_PER_TOKEN, chain_hashes

REQUEST_ID_HEADER: Final = "x-request-id"
SESSION_HEADER: Final = "x-smg-routing-key"
"""From a client: its session. SGLang's gateway and benchmark use the same header. On a prefill leg the same
header carries the decode module's name instead (`protocol.MODULE_HEADER`)."""

MAX_ROOM: Final = 2**63 - 1


class Endpoint(StrEnum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    GENERATE = "/generate"
    MESSAGES = "/v1/messages"
    RESPONSES = "/v1/responses"


class RequestError(PrefillShareError):
    """A request that the router itself refuses; `status` is the HTTP answer."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Continued:
    """A response that a request goes on from: what was said so far, and the (prefill, decode) workers that have it."""

    items: Sequence[Any]
    module: str
    session_key: str
    workers: tuple[str, str]


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """A parsed and checked request.

    `batch_size` is `None` for a single prompt, so that a batch of one stays a batch; each prompt gets `samples`
    answers. `rids` name the prompts in the answer (one for each), `public_rid` the whole of it. `prompts` are canonical
    bytes in which a longer context extends a shorter one. `raw` is what the client sent, `body` its parsed form;
    neither is changed, except that what a response goes on from is put in its place.
    """

    endpoint: Endpoint
    module: str
    raw: bytes
    body: Mapping[str, Any]
    is_stream: bool
    batch_size: int | None
    prompts: tuple[bytes, ...]
    public_rid: str
    rids: tuple[str, ...]
    session_key: str | None
    is_model_overridden: bool
    samples: int = 1
    continued: Continued | None = None

    @property
    def answer_rids(self) -> tuple[str, ...]:
        """As `rids`, for each answer: those of one prompt follow one another, as in SGLang's own."""
        return tuple(rid for rid in self.rids for _ in range(self.samples))

    @property
    def prompt_tokens(self) -> int:
        """Estimated, for weighing load; the prefill worker reports the true number."""
        return sum(max(1, len(prompt) // BYTES_PER_TOKEN) for prompt in self.prompts)

    @property
    def output_limits(self) -> list[int | None]:
        """How many tokens each answer may have, in the order of the prompts; None where the context's end limits it."""
        params = self.body.get("sampling_params")
        count = len(self.prompts)
        if self.endpoint is Endpoint.GENERATE:
            each = params if isinstance(params, list) else [params] * count
            limits = [_first_number(item or {}, "max_new_tokens", default=_GENERATE_OUTPUT_TOKENS) for item in each]
            return [limit for limit in limits for _ in range(self.samples)]
        default = _COMPLETIONS_OUTPUT_TOKENS if self.endpoint is Endpoint.COMPLETIONS else None
        names = (
            ("max_output_tokens",) if self.endpoint is Endpoint.RESPONSES else ("max_completion_tokens", "max_tokens")
        )
        return [_first_number(self.body, *names, default=default)] * (count * self.samples)

    @property
    def priority(self) -> int | None:
        """The largest of its prompts'; None where it names none."""
        value = self.body.get("priority")
        return max((one for one in (value if isinstance(value, list) else [value]) if one is not None), default=None)

    def chains(self, *, block_bytes: int) -> list[list[int]]:
        return [chain_hashes(prompt, block_bytes=block_bytes) for prompt in self.prompts]


_GENERATE_OUTPUT_TOKENS: Final = 128
_COMPLETIONS_OUTPUT_TOKENS: Final = 16
"""SGLang's own defaults."""


def _first_number(fields: Mapping[str, Any], *names: str, default: int | None) -> int | None:
    return next((fields[name] for name in names if fields.get(name) is not None), default)


@dataclass(frozen=True, slots=True)
class Pairing:
    """What makes two legs one request: the prefill worker's bootstrap address, a room and a rid for each answer."""

    bootstrap_host: str
    bootstrap_port: int
    rooms: tuple[int, ...]
    rids: tuple[str, ...]

    def fields(self, request: ClientRequest) -> dict[str, Any]:
        """As the request's endpoint has them. Where it has none for a rid, `headers` has it."""
        if request.batch_size is not None or request.samples > 1:
            count = len(self.rooms)
            return {
                "bootstrap_host": [self.bootstrap_host] * count,
                "bootstrap_port": [self.bootstrap_port] * count,
                "bootstrap_room": list(self.rooms),
                "rid": list(self.rids),
            }
        fields: dict[str, Any] = {
            "bootstrap_host": self.bootstrap_host,
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": self.rooms[0],
        }
        match request.endpoint:
            case Endpoint.MESSAGES:
                pass
            case Endpoint.RESPONSES:
                fields["request_id"] = self.rids[0]
            case _:
                fields["rid"] = self.rids[0]
        return fields

    def headers(self, endpoint: Endpoint) -> list[tuple[str, str]]:
        return [(RID_HEADER, self.rids[0])] if endpoint is Endpoint.MESSAGES else []


def draw_rids(endpoint: Endpoint, count: int) -> tuple[str, ...]:
    """What legs are called on the workers: SGLang aborts every id that begins like the one it is told, and refuses one
    that is in flight. So no client chooses them, none can be guessed, and none begins another."""
    kind = "resp_" if endpoint is Endpoint.RESPONSES else ""
    return tuple(kind + secrets.token_hex(16) for _ in range(count))


def draw_rooms(count: int) -> tuple[int, ...]:
    """Fresh rooms, 63-bit and at least 1: some transfer backends take 0 for "no room"."""
    return tuple(random.randint(1, MAX_ROOM) for _ in range(count))


def parse_request(
    endpoint: Endpoint,
    raw: bytes,
    *,
    headers: Mapping[str, str],
    modules: Collection[str],
    path_module: str | None = None,
    limits_of: Callable[[str], Limits] = lambda _module: NO_LIMITS,
    continued_of: Callable[[str], Continued | None] | None = None,
) -> ClientRequest:
    """Check what the client sent; raises `RequestError` saying what to send instead.

    `limits_of` says what the workers of a module can index and hold, `continued_of` what a response's id stands for
    (None where responses are not kept).
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(415, f"The request body is encoded as {encoding}. Send it without Content-Encoding.")
    try:
        body = _json.loads(raw)
        check_depth(raw, body)
    except RecursionError as error:
        raise RequestError(400, f"The request has arrays or objects over {MAX_DEPTH} deep.") from error
    except FieldError as error:
        raise RequestError(400, str(error)) from error
    except ValueError as error:
        raise RequestError(400, f"The request body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise RequestError(400, f"The request body is a JSON {_json_kind(body)}, wanted an object.")

    continued = None
    if endpoint is Endpoint.RESPONSES:
        continued = _continued(body, continued_of)
        if continued is not None:
            body = _with_history(body, continued)
            raw = _json.dumps(body)
    module = choose_module(endpoint, body, modules=modules, path_module=path_module)
    is_stream = body.get("stream")
    if is_stream is not None and not isinstance(is_stream, bool):
        raise RequestError(400, f"stream is {is_stream!r}, wanted true or false.")
    _refuse_unsupported(endpoint, body)
    limits = limits_of(module)
    try:
        prompts, batch_size = canonical_prompts(endpoint, body, limits)
        _check_fields(endpoint, body, batch_size, limits)
        samples = _samples(endpoint, body)
        check_batch("the request", len(prompts), samples)
    except FieldError as error:
        raise RequestError(400, str(error)) from error
    public_rid, rids = _choose_rids(endpoint, body, headers, batch_size)
    session_key = _session_key(endpoint, body, headers)
    if session_key is None and continued is not None:
        session_key = continued.session_key
    return ClientRequest(
        endpoint=endpoint,
        module=module,
        raw=raw,
        body=body,
        is_stream=bool(is_stream),
        batch_size=batch_size,
        prompts=prompts,
        public_rid=public_rid,
        rids=rids,
        session_key=session_key,
        is_model_overridden=path_module is not None and body.get("model") not in (None, module),
        samples=samples,
        continued=continued,
    )


def _continued(body: Mapping[str, Any], continued_of: Callable[[str], Continued | None] | None) -> Continued | None:
    """What `previous_response_id` stands for: workers keep no responses, so the router does."""
    previous = body.get("previous_response_id")
    if previous is None:
        return None
    if continued_of is None:
        raise RequestError(
            400, "previous_response_id is set, and this router keeps no responses. Send the whole input instead."
        )
    found = continued_of(previous) if isinstance(previous, str) else None
    if found is None:
        raise RequestError(
            404,
            f"The response {str(previous)[:80]!r} is not known here (any more). Send the whole input instead of "
            "previous_response_id.",
            kind="previous_response_not_found",
        )
    return found


def _with_history(body: Mapping[str, Any], continued: Continued) -> dict[str, Any]:
    said = body.get("input")
    new = input_items(said) if isinstance(said, str | list) else [said]
    merged = {**body, "input": [*continued.items, *new]}
    del merged["previous_response_id"]
    merged.setdefault("model", continued.module)
    return merged


def input_items(said: str | list[Any]) -> list[Any]:
    """The input of a response as a list: a string is a user's message."""
    return [{"role": "user", "content": said}] if isinstance(said, str) else said


def choose_module(
    endpoint: Endpoint, body: Mapping[str, Any], *, modules: Collection[str], path_module: str | None
) -> str:
    """The decode module: from /m/<model>/, else `model`, else (`/generate` alone) `lora_path`, else the only one.

    `lora_path` stands in because sglang.benchmark.serving has no other way to name a model on `/generate`.
    """
    known = ", ".join(modules)
    if path_module is not None:
        named: Any = path_module
    else:
        named = body.get("model")
        if named is None and endpoint is Endpoint.GENERATE and body.get("lora_path") in modules:
            named = body["lora_path"]
    if named is None:
        if len(modules) == 1:
            return next(iter(modules))
        raise RequestError(400, f'The request names no model. Set "model" to one of the decode modules: {known}.')
    if not isinstance(named, str):
        raise RequestError(400, f"model is a JSON {_json_kind(named)}, wanted one of the decode modules: {known}.")
    if named not in modules:
        raise RequestError(
            404,
            f"The model {named!r} is not served here. The decode modules are: {known}.",
            kind="model_not_found",
        )
    return named


# ---------------------------------------------------------------------------------------------------- prompts


def canonical_prompts(
    endpoint: Endpoint, body: Mapping[str, Any], limits: Limits = NO_LIMITS
) -> tuple[tuple[bytes, ...], int | None]:
    """Each prompt's bytes and the batch size (`None` for a single prompt). Raises `FieldError` for what cannot be one.

    Appending text, tokens or messages appends bytes. Token ids and text of the same prompt do not resemble each
    other: the router has no tokenizer.
    """
    match endpoint:
        case Endpoint.CHAT:
            if body.get("input_ids") is not None:
                return (_ids_bytes(body["input_ids"], "input_ids", limits),), None
            return (_conversation_bytes(body, "messages", limits),), None
        case Endpoint.MESSAGES:
            return (_conversation_bytes(body, "messages", limits, head="system"),), None
        case Endpoint.RESPONSES:
            said = body.get("input")
            whole = {**body, "input": input_items(said)} if isinstance(said, str) and said else body
            return (_conversation_bytes(whole, "input", limits, head="instructions"),), None
        case Endpoint.COMPLETIONS:
            if body.get("prompt") is None:
                raise RequestError(400, "The request has no prompt. Send a string, token ids, or a list of either.")
            return _text_or_ids(body["prompt"], "prompt", limits)
        case Endpoint.GENERATE:
            if body.get("input_embeds") is not None:
                raise RequestError(400, "input_embeds cannot be prefilled by the base: send text or input_ids.")
            text, ids = body.get("text"), body.get("input_ids")
            if text is None and ids is None:
                raise RequestError(400, "The request has no prompt. Send text or input_ids.")
            if text is not None and ids is not None:
                raise RequestError(400, "The request has both text and input_ids. Send one of them.")
            if text is not None and not isinstance(text, str | list):
                raise RequestError(400, f"text is a JSON {_json_kind(text)}, wanted a string or a list of strings.")
            name = "text" if text is not None else "input_ids"
            return _text_or_ids(body[name], name, limits)


def _text_or_ids(prompt: Any, name: str, limits: Limits) -> tuple[tuple[bytes, ...], int | None]:
    if isinstance(prompt, str) and name != "input_ids":
        return (_text_bytes(prompt, name, limits),), None
    if not isinstance(prompt, list):
        raise RequestError(400, f"{name} is a JSON {_json_kind(prompt)}, wanted text, token ids, or a list of either.")
    if not prompt:
        raise RequestError(400, f"{name} is empty.")
    first = prompt[0]
    if isinstance(first, str | list):
        check_batch(name, len(prompt))
    if isinstance(first, int) and name != "text":
        return (_ids_bytes(prompt, name, limits),), None
    if isinstance(first, str) and name != "input_ids":
        return tuple(_text_bytes(item, f"{name}[{i}]", limits) for i, item in enumerate(prompt)), len(prompt)
    if isinstance(first, list) and name != "text":
        return tuple(_ids_bytes(item, f"{name}[{i}]", limits) for i, item in enumerate(prompt)), len(prompt)
    raise RequestError(400, f"{name}[0] is a JSON {_json_kind(first)}, which is no prompt.")


def _text_bytes(text: Any, name: str, limits: Limits) -> bytes:
    if not isinstance(text, str):
        raise RequestError(400, f"{name} is a JSON {_json_kind(text)}, wanted a string like its neighbours.")
    if not text:
        raise RequestError(400, f"{name} is empty.")
    check_text(name, text, limits)
    return text.encode("utf-8", "surrogatepass")


def _ids_bytes(ids: Any, name: str, limits: Limits) -> bytes:
    if not isinstance(ids, list):
        raise RequestError(400, f"{name} is a JSON {_json_kind(ids)}, wanted a list of token ids.")
    if not ids:
        raise RequestError(400, f"{name} is empty.")
    prompt_ids(name, ids, limits)
    return array("I", ids).tobytes()


def _conversation_bytes(body: Mapping[str, Any], name: str, limits: Limits, *, head: str | None = None) -> bytes:
    """The bytes of a list of messages (`name`), behind the tools and what is told apart from them (`head`)."""
    messages = body.get(name)
    if messages is None:
        raise RequestError(400, f"The request has no {name}.")
    if not isinstance(messages, list):
        raise RequestError(400, f"{name} is a JSON {_json_kind(messages)}, wanted a list.")
    if not messages:
        raise RequestError(400, f"{name} is empty.")
    pieces: list[bytes] = []
    text_bytes = 0
    if body.get("tools"):
        # Templates write the tools ahead of the conversation.
        pieces.append(_json.dumps(_without_marks(body["tools"])) + b"\x1e")
    said_apart = body.get(head) if head is not None else None
    if said_apart:
        text_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in _texts(said_apart))
        pieces.append(_json.dumps(_without_marks(said_apart)) + b"\x1e")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RequestError(400, f"{name}[{i}] is a JSON {_json_kind(message)}, wanted an object.")
        # Clients send answers back with fields such as "refusal": null; a template does not see the difference.
        present = {key: message[key] for key in sorted(message) if message[key] is not None}
        content = present.get("content")
        text_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in _texts(content))
        if isinstance(content, str) and isinstance(present.get("role"), str) and len(present) == 2:
            piece = f"{present['role']}\x1f{content}\x1e".encode("utf-8", "surrogatepass")
        else:
            if isinstance(content, list):
                present["content"] = _without_marks(content)
            piece = _json.dumps(present) + b"\x1e"
        pieces.append(piece)
    check_text_bytes(f"the content of {name}", text_bytes, limits)
    return b"".join(pieces)


def _without_marks(parts: Any) -> Any:
    """Parts of a message without Anthropic's `cache_control`, which wanders from message to message."""
    if not isinstance(parts, list):
        return parts
    return [
        {key: part[key] for key in part if key != "cache_control"}
        if isinstance(part, dict) and "cache_control" in part
        else part
        for part in parts
    ]


def _texts(content: Any) -> Iterator[str]:
    """The text of a message, whole or in parts."""
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            yield text


# ----------------------------------------------------------------------------------------------------- checks


def _check_fields(endpoint: Endpoint, body: Mapping[str, Any], batch_size: int | None, limits: Limits) -> None:
    """Hold every number against the table, in a batch for each prompt."""
    if endpoint is Endpoint.MESSAGES or endpoint is Endpoint.RESPONSES:
        check_fields(MESSAGES if endpoint is Endpoint.MESSAGES else RESPONSES, body, limits)
        return
    if endpoint is not Endpoint.GENERATE:
        check_fields(OPENAI, body, limits)
        check_order(body, "min_tokens", "max_tokens")
        check_order(body, "min_tokens", "max_completion_tokens")
        check_stops(body, "min_tokens", limits)
        if endpoint is Endpoint.COMPLETIONS and body.get("logprobs") is not None:
            top_logprobs("logprobs", body["logprobs"], limits)
        return
    params = body.get("sampling_params")
    if isinstance(params, list) and len(params) != batch_size:
        wanted = "one object" if batch_size is None else f"one object, or {batch_size} of them"
        raise FieldError(f"sampling_params lists {len(params)} objects, wanted {wanted}.")
    for item in params if isinstance(params, list) else [params]:
        check_sampling_params(item, limits)
    check_fields(GENERATE, {name: body[name] for name in body if not _is_batched(name, body[name], batch_size)}, limits)
    for name in GENERATE.keys() & body.keys():
        if _is_batched(name, body[name], batch_size):
            if len(body[name]) != batch_size:
                raise FieldError(f"{name} lists {len(body[name])} values, wanted one, or {batch_size} of them.")
            for place, value in enumerate(body[name]):
                check_fields(GENERATE, {name: value}, limits, inside=f"[{place}] of ")


def _is_batched(name: str, value: Any, batch_size: int | None) -> bool:
    """Whether a field has a value for each prompt of a batch; of ids a list is one prompt's, a list of lists all's."""
    if batch_size is None or not isinstance(value, list):
        return False
    return name != "token_ids_logprob" or any(isinstance(item, list) for item in value)


def _refuse_unsupported(endpoint: Endpoint, body: Mapping[str, Any]) -> None:
    if endpoint is Endpoint.RESPONSES and body.get("background"):
        raise RequestError(
            400, "background is true: an answer lives as long as the connection that it was asked on. Leave it out."
        )
    if endpoint is Endpoint.GENERATE and _any_true(body.get("return_logprob")):
        start = body.get("logprob_start_len")
        starts = start if isinstance(start, list) else [start]
        if any(value not in (None, -1) for value in starts):
            raise RequestError(
                400,
                f"logprob_start_len is {start!r}: log-probabilities of the prompt would be the base's, not the decode "
                "module's. Leave it out (or -1) for those of the answer. (`select()` of SGLang's frontend needs them.)",
            )
    if endpoint is Endpoint.COMPLETIONS and body.get("echo") and body.get("logprobs") is not None:
        raise RequestError(
            400,
            "echo with logprobs asks for log-probabilities of the prompt, which would be the base's, not the decode "
            "module's. Send one of them.",
        )


def _samples(endpoint: Endpoint, body: Mapping[str, Any]) -> int:
    """`n`, checked by now; of a batch the same for each prompt, as SGLang has it."""
    if endpoint is Endpoint.MESSAGES or endpoint is Endpoint.RESPONSES:
        return 1
    if endpoint is not Endpoint.GENERATE:
        return body.get("n") or 1
    params = body.get("sampling_params")
    items = params if isinstance(params, list) else [params]
    counts = {(item.get("n") or 1) if isinstance(item, dict) else 1 for item in items}
    if len(counts) > 1:
        raise FieldError(f"sampling_params.n is {min(counts)} here and {max(counts)} there. Give all prompts the same.")
    return next(iter(counts), 1)


def _any_true(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value)


def _choose_rids(
    endpoint: Endpoint, body: Mapping[str, Any], headers: Mapping[str, str], batch_size: int | None
) -> tuple[str, tuple[str, ...]]:
    """The name the client knows the request by, and one for each prompt in the answer; the legs' are `draw_rids`.

    A body's rid is taken as it is. One derived from X-Request-Id gets a random tail, since clients reuse that header
    across a session's calls. Responses have ids of their own form; messages have SGLang's.
    """
    if endpoint is Endpoint.RESPONSES:
        fresh = f"resp_{secrets.token_hex(16)}"
        return headers.get(REQUEST_ID_HEADER) or fresh, (fresh,)
    rid = body.get("rid") if endpoint is not Endpoint.MESSAGES else None
    if rid is None:
        request_id = headers.get(REQUEST_ID_HEADER)
        fresh = secrets.token_hex(16)
        public = request_id if request_id else fresh
        stem = f"{request_id[:128]}-{fresh[:12]}" if request_id else fresh
    elif isinstance(rid, str) and rid:
        public = stem = rid
    elif isinstance(rid, list) and rid and all(isinstance(item, str) and item for item in rid):
        if batch_size is None or len(rid) != batch_size or len(set(rid)) != batch_size:
            wanted = "a string" if batch_size is None else f"{batch_size} different ones"
            raise RequestError(400, f"rid lists {len(rid)} request ids, wanted {wanted}.")
        return rid[0], tuple(rid)
    else:
        raise RequestError(400, f"rid is {rid!r}, wanted a non-empty string, or for a batch a list of such strings.")
    if batch_size is None:
        return public, (stem,)
    return public, tuple(f"{stem}_{i}" for i in range(batch_size))


def _session_key(endpoint: Endpoint, body: Mapping[str, Any], headers: Mapping[str, str]) -> str | None:
    """X-SMG-Routing-Key, else `user`, of Anthropic's clients `metadata.user_id`: the paper's user id (B.1)."""
    key = headers.get(SESSION_HEADER)
    if key:
        return key
    user = body.get("user")
    metadata = body.get("metadata")
    if endpoint is Endpoint.MESSAGES and isinstance(metadata, dict):
        user = metadata.get("user_id")
    return user if isinstance(user, str) and user else None


def _json_kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


# ------------------------------------------------------------------------------------------------------- legs


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_SAMPLING_ONLY: Final = _words(
    # what the answer should be like
    "temperature top_p top_k min_p min_tokens max_tokens max_completion_tokens presence_penalty frequency_penalty "
    "repetition_penalty seed n best_of logit_bias stop stop_token_ids stop_regex no_stop_trim ignore_eos "
    "response_format json_schema regex ebnf custom_logit_processor custom_params watermark sampling_params "
    "require_reasoning max_thinking_tokens",
    # what the answer should carry
    "stream stream_options echo logprobs top_logprobs return_logprob logprob_start_len top_logprobs_num "
    "token_ids_logprob return_text_in_logprobs return_flat_raw_top_logprobs return_flat_raw_output_top_logprobs "
    "return_flat_raw_top_logprobs_b64 return_sampling_mask sampling_logprobs_mode return_hidden_states "
    "return_routed_experts routed_experts_start_len return_indexer_topk return_entropy return_bytes "
    "return_cached_tokens_details return_spec_tokens_details return_token_ids return_prompt_token_ids "
    "return_meta_info return_input_ids_in_sglext return_output_ids_in_sglext",
    # of messages and responses
    "stop_sequences max_output_tokens max_tool_calls include store metadata service_tier",
    # which weights answer
    "lora_path lora_id",
)
"""Fields of SGLang 0.5.23's requests that do not shape the prompt's tokens. Everything
else goes to the base as it is: messages, tools, tool_choice, chat_template_kwargs, reasoning_effort, cache_salt
and whatever a later version adds, since two legs that tokenize differently are refused (contract 8)."""

_GREEDY_SINGLE: Final = {"max_new_tokens": 1, "temperature": 0.0}


def prefill_leg_body(request: ClientRequest, *, base_model: str, pairing: Pairing) -> bytes:
    """The base's copy: the same prompt, no sampling, not streamed, accounted to the decode module.

    SGLang's prefill worker caps every request at one token; naming that here keeps a long `max_tokens` from
    being checked against the base's context length.
    """
    body = {key: value for key, value in request.body.items() if key not in _SAMPLING_ONLY}
    body["stream"] = False
    several = {"n": request.samples} if request.samples > 1 else {}
    if request.endpoint is Endpoint.GENERATE:
        body.pop("model", None)
        body["sampling_params"] = {**_GREEDY_SINGLE, **several}
        body["routing_key"] = request.module
    else:
        body["model"] = base_model
        if request.endpoint is Endpoint.RESPONSES:
            body["max_output_tokens"] = 1 + RESPONSES_HEADROOM
        else:
            body["max_tokens"] = 1
        body["temperature"] = 0.0
        body |= several
    if request.endpoint is Endpoint.MESSAGES and isinstance(body.get("output_config"), dict):
        body["output_config"] = {key: value for key, value in body["output_config"].items() if key != "format"}
    body.update(pairing.fields(request))
    return _json.dumps(body)


def decode_leg_body(request: ClientRequest, *, pairing: Pairing, is_adapter: bool = False) -> bytes:
    """The decode module's copy: what the client sent, and the pairing.

    The client's bytes are kept and extended where nothing has to be replaced. A `lora_path` that only repeats the
    module's name is removed: SGLang's benchmark sends the model's name in both fields. A module that is one of a
    worker's adapters is named by it, at `/generate`; OpenAI's endpoints name it by `model`.
    """
    added = pairing.fields(request)
    if request.endpoint in (Endpoint.MESSAGES, Endpoint.RESPONSES) and request.body.get("model") is None:
        added["model"] = request.module  # SGLang demands it there
    if is_adapter and (request.endpoint is Endpoint.GENERATE or "lora_path" in request.body):
        added["lora_path"] = request.module
    replaces_lora = request.body.get("lora_path") == request.module
    if request.is_model_overridden or replaces_lora or not added.keys().isdisjoint(request.body):
        body = {**request.body, **added}
        if replaces_lora and "lora_path" not in added:
            del body["lora_path"]
        if request.is_model_overridden:
            body["model"] = request.module
        return _json.dumps(body)
    return request.raw[: request.raw.rindex(b"}")] + b"," + _json.dumps(added)[1:]


HOP_BY_HOP: Final = _words(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade"
)
_NOT_FORWARDED: Final = HOP_BY_HOP | _words("host content-length content-type content-encoding expect accept-encoding")
_CONNECTION_TOKENS: Final = re.compile(r"[^,\s]+")


def header_safe(value: str) -> str:
    """`value` as a header may carry it: a client's rid may hold line breaks, or letters beyond ASCII."""
    return value if value.isascii() and value.isprintable() else quote(value, errors="replace")


_OF_WORKERS: Final = ("x-prefill-share-", "x-override-")
"""How headers begin that say on a worker what a leg is: no client's to set. (The second are SGLang's.)"""
API_KEY_HEADER: Final = "x-api-key"
_CREDENTIALS: Final = frozenset({"authorization", API_KEY_HEADER})


def forwarded_headers(
    headers: Sequence[tuple[str, str]], *, request_id: str, credentials: Sequence[tuple[str, str]] | None = None
) -> list[tuple[str, str]]:
    """The client's end-to-end headers (Authorization, X-Request-Id, tracing, ...) for both legs.

    `credentials` take the place of the client's own, where those are the router's business and no worker's.
    """
    dropped = set(_NOT_FORWARDED)
    if credentials is not None:
        dropped |= _CREDENTIALS
    for name, value in headers:
        if name == "connection":
            dropped.update(_CONNECTION_TOKENS.findall(value.lower()))
    kept = [(name, value) for name, value in headers if name not in dropped and not name.startswith(_OF_WORKERS)]
    if not any(name == REQUEST_ID_HEADER for name, _ in kept):
        kept.append((REQUEST_ID_HEADER, request_id))
    kept.append(("content-type", "application/json"))
    if credentials is None:
        by_name = dict(kept)
        key = by_name.get(API_KEY_HEADER)
        # Anthropic's clients send their key so, and SGLang's workers know the other way alone.
        credentials = [("authorization", f"Bearer {key}")] if key and "authorization" not in by_name else []
    return [*kept, *credentials]


def decode_leg_headers(
    forwarded: Sequence[tuple[str, str]], *, request: ClientRequest, pairing: Pairing, is_adapter: bool
) -> list[tuple[str, str]]:
    """`forwarded`, with what the body of this API has no place for."""
    headers = [*forwarded, *pairing.headers(request.endpoint)]
    if is_adapter and request.endpoint is Endpoint.RESPONSES:
        headers.append((ADAPTER_HEADER, request.module))
    return headers


def prefill_leg_headers(
    forwarded: Sequence[tuple[str, str]], *, request: ClientRequest, pairing: Pairing
) -> list[tuple[str, str]]:
    """`forwarded`, with the client's session key replaced by the module that the prompt is prefilled for."""
    kept = [(name, value) for name, value in forwarded if name not in (SESSION_HEADER, MODULE_HEADER)]
    return [*kept, (MODULE_HEADER, request.module), *pairing.headers(request.endpoint)]
