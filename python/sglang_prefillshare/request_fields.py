"""The fields of a request that index, count or weigh something: one table of names, limits and errors.

A number that no array has a place for, sent by one client, can end a worker that serves all of them: SGLang checks some
of these fields, and others reach an embedding, a penalty's tensor or a message between processes as they are. So each
one is looked at before any work begins, with the same table at both doors: the router's, as far as the workers'
descriptions tell, and the worker's own, where requests come that passed no router.

Names are those of SGLang 0.5.23's `/generate` (with `sampling_params`) and of its OpenAI endpoints. Fields that are not
here have no such power, or SGLang's parser checks them. None means "not given" everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sglang_prefillshare.errors import PrefillShareError

MAX_DEPTH: Final = 128
"""Arrays and objects inside one another. JSON schemas of tools need some thirty; a parser's recursion ends at 1,000."""

MAX_STOPS: Final = 32
MAX_STOP_CHARS: Final = 1024
MAX_REGEX_CHARS: Final = 256
MAX_REGEX_WAYS: Final = 4096
MAX_GRAMMAR_CHARS: Final = 262_144
MAX_LISTED_IDS: Final = 1024
"""Ids in `stop_token_ids`, `logit_bias` and `token_ids_logprob`: each costs every step of the batch that it is in."""

MAX_OWN_STOPS: Final = 64
"""Ends of a turn that a model may have of its own, at most."""
MAX_TOP_LOGPROBS: Final = 1024
MAX_BATCH: Final = 1024
"""Prompts of one request, each times its samples. Each is a request of its own to two workers, and can be two bytes of
a body."""
MAX_SAMPLES: Final = 128
"""`n` of a request, as OpenAI has it."""

_INT32: Final = 2**31 - 1
_INT64: Final = 2**63 - 1


class FieldError(PrefillShareError, ValueError):
    """A field's value that no worker may see: names the field, what was found and what is wanted."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the workers that a request is for can index and hold; None where nobody has said.

    `context_length` is in tokens. A text of over `max_prompt_bytes` bytes of UTF-8 has more tokens than that.
    `max_samples` bounds `n`.
    """

    vocab_size: int | None = None
    context_length: int | None = None
    max_prompt_bytes: int | None = None
    max_samples: int = MAX_SAMPLES


NO_LIMITS: Final = Limits()
Check = Callable[[str, Any, Limits], None]


def _fail(name: str, value: Any, wanted: str) -> FieldError:
    found = repr(value)
    return FieldError(f"{name} is {found if len(found) <= 80 else found[:77] + '...'}, wanted {wanted}.")


def integer(low: int, high: int) -> Check:
    """A whole number of [low, high]; 3.0 is none, since a worker would pass it on as it is."""

    def check(name: str, value: Any, limits: Limits) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _fail(name, value, f"a whole number from {low} to {high}")

    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A finite number of [low, high], or of (low, high] with `above`."""

    def check(name: str, value: Any, limits: Limits) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (above and value == low):  # NaN is in no range
            raise _fail(
                name, value, f"a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"
            )

    return check


def flag(name: str, value: Any, limits: Limits) -> None:
    if not isinstance(value, bool):
        raise _fail(name, value, "true or false")


def token_count(name: str, value: Any, limits: Limits) -> None:
    """New tokens: 0 or more; how many fit is the worker's to say, which knows the prompt's length."""
    integer(0, _INT32)(name, value, limits)


def samples(name: str, value: Any, limits: Limits) -> None:
    integer(1, limits.max_samples)(name, value, limits)


def top_logprobs(name: str, value: Any, limits: Limits) -> None:
    integer(0, min(MAX_TOP_LOGPROBS, limits.vocab_size or MAX_TOP_LOGPROBS))(name, value, limits)


def token_ids(name: str, value: Any, limits: Limits) -> None:
    """Ids of the vocabulary, all of them; for 100,000 ids some milliseconds."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _fail(name, value, "a list of token ids")
    if not value:
        return
    if set(map(type, value)) != {int}:
        place = next(i for i, item in enumerate(value) if type(item) is not int)
        raise _fail(f"{name}[{place}]", value[place], "a token id")
    low, high = min(value), max(value)
    last = _INT32 if limits.vocab_size is None else limits.vocab_size - 1
    if low < 0 or high > last:
        wrong = low if low < 0 else high
        raise _fail(f"{name}[{value.index(wrong)}]", wrong, f"a token id from 0 to {last}")


def prompt_ids(name: str, value: Any, limits: Limits) -> None:
    if isinstance(value, Sequence) and limits.context_length is not None and len(value) > limits.context_length:
        raise FieldError(
            f"{name} has {len(value)} tokens, longer than the model's context length of {limits.context_length} tokens."
        )
    token_ids(name, value, limits)


def listed_ids(name: str, value: Any, limits: Limits) -> None:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > MAX_LISTED_IDS:
        raise FieldError(f"{name} has {len(value)} ids, wanted at most {MAX_LISTED_IDS}.")
    token_ids(name, value, limits)


def logit_bias(name: str, value: Any, limits: Limits) -> None:
    """{"token id": bias}: JSON has strings for keys."""
    if not isinstance(value, Mapping):
        raise _fail(name, value, "an object from token ids to numbers")
    if len(value) > MAX_LISTED_IDS:
        raise FieldError(f"{name} has {len(value)} ids, wanted at most {MAX_LISTED_IDS}.")
    last = _INT32 if limits.vocab_size is None else limits.vocab_size - 1
    for key, bias in value.items():
        token = whole_number(str(key), digits=10)
        if token is None or token > last:
            raise _fail(f"a key of {name}", key, f"a token id from 0 to {last}")
        number(-100.0, 100.0)(f"{name}[{key}]", bias, limits)


def texts(max_chars: int) -> Check:
    """A string, or up to `MAX_STOPS` of them."""

    def check(name: str, value: Any, limits: Limits) -> None:
        items = value if isinstance(value, list) else [value]
        if len(items) > MAX_STOPS:
            raise FieldError(f"{name} lists {len(items)} strings, wanted at most {MAX_STOPS}.")
        for item in items:
            if not isinstance(item, str):
                raise _fail(name, item, "a string, or a list of strings")
            if len(item) > max_chars:
                raise FieldError(f"{name} has {len(item)} characters, wanted at most {max_chars}.")

    return check


def stop_regex(name: str, value: Any, limits: Limits) -> None:
    """Patterns that are decided in few steps wherever they begin.

    SGLang matches them after every token, in the loop that serves everybody, with Python's backtracking engine.
    """
    texts(MAX_REGEX_CHARS)(name, value, limits)
    for pattern in value if isinstance(value, list) else [value]:
        try:
            ways = _ways(list(re._parser.parse(pattern)), is_whole=True)  # type: ignore[attr-defined]
        except (re.error, OverflowError, RecursionError) as error:
            raise FieldError(f"{name} {pattern!r} is no regular expression: {error}.") from error
        if ways > MAX_REGEX_WAYS:
            raise FieldError(
                f"{name} {pattern!r} can match in over {MAX_REGEX_WAYS} ways from one place; trying them after every "
                "token holds up everybody. Give repeats an upper bound ({1,64} for +), or list strings in stop."
            )


def _ways(parsed: Sequence[Any], *, is_whole: bool = False) -> int:
    """How many ways a backtracking engine may try from one place, at most; counted up to `MAX_REGEX_WAYS` + 1.

    What ends a whole pattern is never tried again: a repeat there may be open.
    """
    ways = 1
    for place, (operation, argument) in enumerate(parsed):
        match str(operation):
            case "BRANCH":
                ways *= sum(_ways(branch) for branch in argument[1])
            case "SUBPATTERN":
                ways *= _ways(argument[-1])
            case "ASSERT" | "ASSERT_NOT":
                ways *= _ways(argument[1])
            case "ATOMIC_GROUP":
                ways *= _ways(argument)
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                low, high, repeated = argument
                inner = _ways(repeated)
                if is_whole and place == len(parsed) - 1 and inner == 1:
                    high = low
                if int(high) > MAX_REGEX_WAYS or (inner > 1 and int(high) > 12):
                    return MAX_REGEX_WAYS + 1
                ways *= sum(inner**count for count in range(int(low), int(high) + 1))
            case "GROUPREF_EXISTS":
                ways *= _ways(argument[1]) + (_ways(argument[2]) if argument[2] is not None else 1)
        if ways > MAX_REGEX_WAYS:
            return MAX_REGEX_WAYS + 1
    return ways


def custom_params(name: str, value: Any, limits: Limits) -> None:
    """Plain values, and lists and objects of them: what the message between a worker's processes has room for."""
    if not isinstance(value, Mapping):
        raise _fail(name, value, "an object")
    for key, item in value.items():
        inner = item if isinstance(item, list) else list(item.values()) if isinstance(item, Mapping) else [item]
        for plain in inner:
            is_plain = (
                plain is None
                or isinstance(plain, str | float)
                or abs(plain if isinstance(plain, int) else 2**63) < 2**63
            )
            if not is_plain:
                raise _fail(f"{name}[{key!r}]", plain, "a plain value, or a list or an object of them")


def grammar(name: str, value: Any, limits: Limits) -> None:
    if not isinstance(value, str):
        raise _fail(name, value, "a string")
    if len(value) > MAX_GRAMMAR_CHARS:
        raise FieldError(f"{name} has {len(value)} characters, wanted at most {MAX_GRAMMAR_CHARS}.")
    if nesting_of(value) > MAX_DEPTH:
        raise FieldError(
            f"{name} has brackets inside one another {nesting_of(value)} deep, wanted at most {MAX_DEPTH}."
        )


def not_for_clients(name: str, value: Any, limits: Limits) -> None:
    raise FieldError(f"{name} is set: workers use it between themselves. Leave it out.")


def no_beam_search(name: str, value: Any, limits: Limits) -> None:
    if value:
        raise FieldError(
            f"{name} is {value!r}: beam search is not supported with PrefillShare: use temperature and top_p."
        )


def watermark(name: str, value: Any, limits: Limits) -> None:
    if not isinstance(value, Mapping):
        raise _fail(name, value, "an object")


def whole_number(text: str, *, digits: int = 9) -> int | None:
    """The number that `text` is; None where it is anything but decimal digits, or more than so many: Python refuses to
    read some thousands."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def response_format(name: str, value: Any, limits: Limits) -> None:
    """The schemas of an OpenAI request: a grammar is made of them, as of `json_schema`."""
    if not isinstance(value, Mapping):
        raise _fail(name, value, "an object")
    grammar(name, json.dumps(value), limits)


def only_zero(name: str, value: Any, limits: Limits) -> None:
    """A rank of data parallelism, which workers with a role have not."""
    integer(0, 0)(name, value, limits)


SAMPLING: Final[Mapping[str, Check]] = {
    "temperature": number(0.0, 1e6),
    "top_p": number(0.0, 1.0, above=True),
    "min_p": number(0.0, 1.0),
    "top_k": integer(-1, _INT32),
    "frequency_penalty": number(-2.0, 2.0),
    "presence_penalty": number(-2.0, 2.0),
    "repetition_penalty": number(0.01, 2.0),  # logits are divided by it: what rounds to 0 makes them NaN
    "logit_bias": logit_bias,
    "stop": texts(MAX_STOP_CHARS),
    "stop_token_ids": listed_ids,
    "stop_regex": stop_regex,
    "regex": grammar,
    "ebnf": grammar,
    "json_schema": grammar,
    "ignore_eos": flag,
    "skip_special_tokens": flag,
    "no_stop_trim": flag,
    "custom_params": custom_params,
}
"""In `sampling_params`, and at the top of OpenAI requests."""

SAMPLING_PARAMS: Final[Mapping[str, Check]] = {
    **SAMPLING,
    "max_new_tokens": token_count,
    "min_new_tokens": token_count,
    "sampling_seed": integer(-_INT64 - 1, _INT64),
    "n": samples,
    "beam_width": no_beam_search,
    "use_beam_search": no_beam_search,
    "watermark": watermark,
    "structural_tag": grammar,
    "spaces_between_special_tokens": flag,
    "stream_interval": integer(1, _INT32),
    "stop_strs": not_for_clients,
    "stop_regex_strs": not_for_clients,
    "stop_str_max_len": not_for_clients,
    "stop_regex_max_len": not_for_clients,
    "is_normalized": not_for_clients,
    "ebnf_full_assistant": flag,  # SGLang sets it itself, for tool calls
}
"""Only in `/generate`'s `sampling_params`; what is not for clients is what SGLang works out from the others."""

EVERYWHERE: Final[Mapping[str, Check]] = {
    "priority": integer(-_INT32, _INT32),
    "routed_experts_start_len": integer(0, 0),
    "bootstrap_port": integer(0, 65535),
    "bootstrap_room": integer(0, _INT64),
    "data_parallel_rank": only_zero,
    "routed_dp_rank": only_zero,
    "disagg_prefill_dp_rank": only_zero,
    "max_thinking_tokens": token_count,
    "received_time": number(0.0, 1e12),  # SGLang's OpenAI endpoints set it
    **dict.fromkeys(
        (
            *("decode_tp_size", "bootstrap_pair_key", "http_worker_ipc", "lora_id", "num_items_assigned"),
            *("encoder_urls", "token_indices_to_pool", "multi_item_delimiter_indices"),
        ),
        not_for_clients,
    ),
}

GENERATE: Final[Mapping[str, Check]] = {
    **EVERYWHERE,
    "logprob_start_len": integer(-1, _INT32),
    "top_logprobs_num": top_logprobs,
    "token_ids_logprob": listed_ids,
    "return_logprob": flag,
    "return_sampling_mask": flag,
}
"""At the top of `/generate`, for one prompt."""

OPENAI: Final[Mapping[str, Check]] = {
    **EVERYWHERE,
    **SAMPLING,
    "max_tokens": token_count,
    "max_completion_tokens": token_count,
    "min_tokens": token_count,
    "seed": integer(-_INT64 - 1, _INT64),
    "top_logprobs": top_logprobs,
    "response_format": response_format,
    "n": samples,
}

MESSAGES: Final[Mapping[str, Check]] = {
    **EVERYWHERE,
    **{name: SAMPLING[name] for name in ("temperature", "top_p", "top_k")},
    "max_tokens": token_count,
    "stop_sequences": texts(MAX_STOP_CHARS),
    "output_config": response_format,
}
"""At the top of Anthropic's `/v1/messages`."""

RESPONSES_HEADROOM: Final = 2
"""What SGLang takes off `max_output_tokens`."""

RESPONSES: Final[Mapping[str, Check]] = {
    **EVERYWHERE,
    **{
        name: SAMPLING[name]
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"),
            *("repetition_penalty", "stop"),
        )
    },
    "max_output_tokens": integer(1 + RESPONSES_HEADROOM, _INT32),
    "top_logprobs": top_logprobs,
    "text": response_format,
}
"""At the top of OpenAI's `/v1/responses`."""


def check_fields(fields: Mapping[str, Check], values: Mapping[str, Any], limits: Limits, *, inside: str = "") -> None:
    """Hold what is given against the table; raises `FieldError` for the first that does not fit."""
    for name in values.keys() & fields.keys():
        value = values[name]
        if value is not None:
            fields[name](f"{inside}{name}", value, limits)


def check_sampling_params(params: Any, limits: Limits) -> None:
    """`/generate`'s `sampling_params` of one prompt."""
    if params is None:
        return
    if not isinstance(params, Mapping):
        raise _fail("sampling_params", params, "an object")
    unknown = params.keys() - SAMPLING_PARAMS.keys()
    if unknown:
        raise _fail("a name in sampling_params", min(unknown), "one of SGLang's sampling parameters")
    check_fields(SAMPLING_PARAMS, params, limits, inside="sampling_params.")
    check_order(params, "min_new_tokens", "max_new_tokens", inside="sampling_params.")
    check_stops(params, "min_new_tokens", limits, inside="sampling_params.")


def check_order(values: Mapping[str, Any], low: str, high: str, *, inside: str = "") -> None:
    """Both whole numbers by now, or absent."""
    if values.get(low) and values.get(high) is not None and values[low] > values[high]:
        raise FieldError(f"{inside}{low} is {values[low]}, over {inside}{high}, which is {values[high]}.")


def check_stops(values: Mapping[str, Any], minimum: str, limits: Limits, *, inside: str = "") -> None:
    """Until `minimum` tokens are there, stop tokens are forbidden: some token must be left."""
    stops = set(values.get("stop_token_ids") or ())
    if values.get(minimum) and limits.vocab_size is not None and len(stops) + MAX_OWN_STOPS > limits.vocab_size:
        raise FieldError(
            f"{inside}stop_token_ids lists {len(stops)} of {limits.vocab_size} tokens, and {minimum} forbids them all "
            "for a while: nothing is left to sample. Leave one of the two out."
        )


def check_batch(name: str, size: int, samples: int = 1) -> None:
    if size > MAX_BATCH:
        raise FieldError(f"{name} has {size} prompts, wanted at most {MAX_BATCH}. Send several requests.")
    if size * samples > MAX_BATCH:
        raise FieldError(
            f"{name} has {size} prompts and n is {samples}: {size * samples} answers, wanted at most {MAX_BATCH}. "
            "Send several requests."
        )


def check_text(name: str, text: str, limits: Limits) -> None:
    """Refuse what cannot fit before anybody tokenizes it: no token is longer than the tokenizer's longest."""
    bound = limits.max_prompt_bytes
    if bound is None or len(text) * 4 <= bound:
        return
    check_text_bytes(name, len(text.encode("utf-8", "surrogatepass")), limits)


def check_text_bytes(name: str, size: int, limits: Limits) -> None:
    bound = limits.max_prompt_bytes
    if bound is not None and size > bound:
        raise FieldError(
            f"{name} has {size} bytes, longer than the model's context length of {limits.context_length} tokens: they "
            f"hold {bound} bytes at most."
        )


def check_depth(raw: bytes, body: Any) -> None:
    """Raise `FieldError` where arrays and objects lie inside one another more than `MAX_DEPTH` deep."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            deeper += [child for child in children if isinstance(child, list | dict)]
        if not deeper:
            return
        level = deeper
    raise FieldError(f"The request has arrays or objects inside one another over {MAX_DEPTH} deep.")


def nesting_of(text: str) -> int:
    """How deep brackets lie inside one another in a text, strings and escapes not considered: at least what is true."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\](){}]", text):
        depth = depth + 1 if bracket in "[({" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest
