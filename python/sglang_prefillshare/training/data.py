"""Records into token ids: prompts exactly as serving will send them, responses as the module shall write them.

A record is one of

    {"prompt": "text", "completion": "text"}
    {"prompt": [messages], "completion": [messages], "tools": […]}
    {"messages": [messages], "tools": […]}

The first is tokenised like a prompt of /v1/completions, the others like one of /v1/chat/completions. In a conversation
every assistant turn (of `completion`, of `messages`) becomes an example of its own, whose prompt holds the earlier
answers: serving prefills those with the base, and so does training.

Prompt and response are tokenised apart. Tokenised together, a token could span the boundary, and the prompt would be
another one than serving sends. Owns reading, rendering and checks; whether a rendered answer is whole, `answer.py`
says, and padding is `loss.py`'s.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.training.answer import CONTENT, REASONING, TOOL_CALLS, first_lost, until_stop
from sglang_prefillshare.training.recipe import Columns, Data, RandomShare, Source

if TYPE_CHECKING:
    from sglang_prefillshare.training.loss import Example, TokenIds

EMPTY_RESPONSE: Final = "an empty response"
EMPTY_PROMPT: Final = "an empty prompt"
SHORT_PROMPT: Final = "a prompt of one token, which leaves the base none to prefill"
LONG_PROMPT: Final = "a prompt that leaves no room for a response within max_length"
LONG_EXAMPLE: Final = "more tokens than max_length, prompt and response together"
NO_TURN: Final = "no assistant turn to learn"
LOST: Final = {kind: f"{kind} that the rendered answer lacks" for kind in (TOOL_CALLS, CONTENT, REASONING)}
ELSEWHERE: Final = {kind: f"{kind} elsewhere than behind the generation prompt" for kind in LOST}

_IF_LOST: Final = (
    "What the chat template leaves out, no module learns to say: give a template that renders it (chat_template), or "
    "remove the field from the record. SGLang gives templates reasoning as reasoning_content alone. "
)
_BATCH: Final = 1000
_TOOL_KEYS: Final = ("description", "name", "parameters")
_OPTIONAL_TOOL_KEYS: Final = ("strict", "defer_loading")
_MESSAGE_KEYS: Final = ("role", "content", "tool_call_id", "name", "phase", "reasoning_content", "tool_calls", "tools")


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt and the response to learn, as text. `has_special`: the prompt brings its own special tokens, as a
    rendered conversation does."""

    where: str
    prompt: str
    response: str
    has_special: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """One prompt and its response, as token ids."""

    prompt: TokenIds
    response: TokenIds


@dataclass(frozen=True, slots=True)
class Dropped:
    """What could not be learned from: how often for each reason, and where it was first seen."""

    counts: Mapping[str, int]
    first: Mapping[str, str]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def describe(self) -> str:
        return "; ".join(f"{count} with {reason} (first {self.first[reason]})" for reason, count in self.counts.items())


@dataclass(frozen=True, slots=True)
class Prepared:
    """The examples of one split, what was dropped, and a digest of all their token ids."""

    examples: Sequence[Tokens]
    dropped: Dropped
    digest: str

    @property
    def prompt_tokens(self) -> int:
        return sum(len(example.prompt) for example in self.examples)

    @property
    def response_tokens(self) -> int:
        return sum(len(example.response) for example in self.examples)


def prepare(sources: Sequence[Source], data: Data, tokenizer: Any, *, stop_ids: Iterable[int] = ()) -> Prepared:
    """Read, render and tokenise `sources`.

    `stop_ids` are the tokens at which serving stops, besides the tokenizer's EOS: a rendered answer ends at the first
    of them. Raises `ConfigError` for a record of another form, and, unless the recipe allows dropping, for records that
    cannot be learned from: with how many there are of each kind, and where the first is.
    """
    if data.append_eos and tokenizer.eos_token_id is None:
        raise ConfigError(
            "the base's tokenizer has no EOS token to end responses with. "
            "Set data.append_eos: false, and end the responses in the data with the token that serving stops at."
        )
    stops = {*stop_ids} | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}

    def drop(reason: str, where: str) -> None:
        counts[reason] += 1
        first.setdefault(reason, where)

    ends = stop_texts(tokenizer, stops)
    examples: list[Tokens] = []
    digest = xxhash.xxh3_128()
    for turns in _batched(_turns(sources, data, tokenizer, ends, drop), _BATCH):
        for turn, tokens in zip(turns, tokenise(turns, tokenizer, stops, append_eos=data.append_eos), strict=True):
            reason = _unusable(tokens, data.max_length)
            if reason is not None:
                drop(reason, turn.where)
                continue
            examples.append(tokens)
            for part in (tokens.prompt, tokens.response):
                digest.update(np.int64(len(part)).tobytes() + part.tobytes())
    dropped = Dropped(dict(counts), first)
    names = ", ".join(source.path for source in sources)
    if dropped.total and not data.drop_invalid:
        is_lost = not counts.keys().isdisjoint([*LOST.values(), *ELSEWHERE.values()])
        raise ConfigError(
            f"{names}: {dropped.total} of {dropped.total + len(examples)} examples cannot be learned from: "
            f"{dropped.describe()}. {_IF_LOST if is_lost else ''}Mend the data or raise data.max_length "
            f"({data.max_length}), or drop them with data.drop_invalid: true."
        )
    if not examples:
        found = f", all {dropped.total} dropped: {dropped.describe()}" if dropped.total else ""
        raise ConfigError(f"{names} holds no example to learn from{found}. Give data with prompts and responses.")
    return Prepared(examples, dropped, digest.hexdigest())


# Choosing each example's share


def base_token_count(prompt_tokens: int, share: float) -> int:
    """c, the tokens of a prompt whose KV the base computes: `share` of the n-1 that serving gives it."""
    return math.floor(share * (prompt_tokens - 1))


def draw_share(share: float | RandomShare, *, seed: int, epoch: int, index: int) -> float:
    """The share of example `index` in `epoch`. Depends on nothing else, so that neither the order of examples nor the
    number of processes nor a resumed run changes it."""
    if not isinstance(share, RandomShare):
        return share
    generator = random.Random(f"{seed}/{epoch}/{index}")
    return generator.random() if generator.random() < share.random else 1.0


class ExampleSet:
    """Examples by index, as a DataLoader wants them, each with the share drawn for the current epoch."""

    def __init__(self, examples: Sequence[Tokens], *, share: float | RandomShare, seed: int) -> None:
        self.epoch = 0
        self._examples = examples
        self._share = share
        self._seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        from sglang_prefillshare.training.loss import Example

        tokens = self._examples[index]
        share = draw_share(self._share, seed=self._seed, epoch=self.epoch, index=index)
        return Example(tokens.prompt, tokens.response, base_token_count(len(tokens.prompt), share))


# Reading


def read_records(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every record of `source`, with where it stands. Raises `ConfigError` naming file and line."""
    path = Path(source.path)
    if path.is_file():
        yield from _read_json(path) if path.suffix == ".json" else _read_jsonl(path)
        return
    for index, record in enumerate(_load_dataset(source)):
        yield f"{source.path}[{index}]", record


def _read_jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _record(_parse_json(line, where), where)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}. Give a JSONL file in UTF-8.") from error


def _read_json(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        records = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}. Give a JSON file in UTF-8.") from error
    if not isinstance(records, list):
        raise ConfigError(f"{path} is {type(records).__name__}, wanted a list of records (or JSONL, one a line).")
    for index, record in enumerate(records):
        yield f"{path}[{index}]", _record(record, f"{path}[{index}]")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}.") from error


def _record(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a record is {type(value).__name__}, wanted an object with prompt and completion.")
    return value


def _load_dataset(source: Source) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source.path} is no file here, and the package datasets, which would load it by name, is not installed. "
            "Install it (pip install datasets), or give a JSONL file."
        ) from error
    try:
        if (Path(source.path) / "state.json").is_file() or (Path(source.path) / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(source.path)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[source.split]
        else:
            loaded = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # datasets raises whatever its readers and the network raise
        raise ConfigError(
            f"cannot load dataset {source.path!r} (name {source.name!r}, split {source.split!r}): "
            f"{type(error).__name__}: {error}. Check the three, or give a JSONL file."
        ) from error
    records: Iterable[Mapping[str, Any]] = loaded
    return records


# Rendering


def stop_texts(tokenizer: Any, stops: Iterable[int]) -> list[str]:
    """What the tokens of `stops` look like in a rendered text. One that is no token of its own there has no text."""
    added = tokenizer.added_tokens_decoder
    return [str(added[stop]) for stop in stops if stop in added]


def _turns(
    sources: Sequence[Source], data: Data, tokenizer: Any, ends: Sequence[str], drop: Callable[[str, str], None]
) -> Iterator[Turn]:
    for source in sources:
        for where, record in read_records(source):
            yield from render_turns(record, where, data, tokenizer, ends, drop)


def render_turns(
    record: Mapping[str, Any],
    where: str,
    data: Data,
    tokenizer: Any,
    ends: Sequence[str],
    drop: Callable[[str, str], None],
) -> Iterator[Turn]:
    """The turns of one record; `drop` is told the reason and the place of each that cannot be learned from.

    `ends` are the texts at which serving stops: what a template writes behind one is not learned.
    """
    columns = data.columns
    said: list[Mapping[str, Any]]
    if record.get(columns.messages) is not None:
        said = record[columns.messages]
        messages = _messages(said, where, columns.messages)
        first = 0
    else:
        prompt, completion = _prompt_and_completion(record, where, columns)
        if isinstance(prompt, str) and isinstance(completion, str):
            if not prompt:
                drop(EMPTY_PROMPT, where)
            elif not completion.strip():
                drop(EMPTY_RESPONSE, where)
            else:
                yield Turn(where, prompt, completion, has_special=False)
            return
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        asked = _messages(prompt, where, columns.prompt)
        messages = asked + _messages(completion, where, columns.completion)
        said = [*prompt, *completion]
        first = len(asked)
    tools = _tools(record.get(columns.tools), where, columns.tools)
    learned = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    if not learned:
        drop(NO_TURN, where)
    for index in learned:
        at = where if len(learned) == 1 else f"{where}, message {index + 1}"
        message = messages[index]
        if index == 0:
            drop(EMPTY_PROMPT, at)
        elif not message["content"].strip() and not message.get("tool_calls"):
            drop(EMPTY_RESPONSE, at)
        else:
            rendering = _Rendering(tokenizer, tools, data.chat_template_kwargs, at)
            turn = _chat_turn(messages[:index], message, said[index], rendering, ends, drop)
            if turn is not None:
                yield turn


@dataclass(frozen=True, slots=True)
class _Rendering:
    """A chat template with all that one record gives it beside its messages."""

    tokenizer: Any
    tools: list[dict[str, Any]] | None
    template_kwargs: Mapping[str, Any]
    where: str

    def __call__(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """Raises `ConfigError` where the template raises anything."""
        try:
            try:
                return self._render(messages, self.tools, add_generation_prompt)
            except Exception:
                if not self.tools:
                    raise
                # As SGLang: some templates want the functions without OpenAI's wrapper.
                flat = [tool.get("function", tool) for tool in self.tools]
                return self._render(messages, flat, add_generation_prompt)
        except Exception as error:  # a template may raise anything
            raise ConfigError(
                f"{self.where}: the chat template cannot render this conversation: {type(error).__name__}: {error}. "
                "Mend the record, or give another template with chat_template."
            ) from error

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.template_kwargs,
        )
        return text


def _chat_turn(
    history: list[dict[str, Any]],
    answer: dict[str, Any],
    said: Mapping[str, Any],
    render: _Rendering,
    ends: Sequence[str],
    drop: Callable[[str, str], None],
) -> Turn | None:
    """The prompt as serving renders it, and what the template would have put behind it for this answer; `None` for a
    response that lacks something of the message `said`."""
    prompt = render(history, add_generation_prompt=True)

    def behind_prompt(answer: dict[str, Any]) -> str | None:
        whole = render([*history, answer], add_generation_prompt=False)
        return whole[len(prompt) :] if whole.startswith(prompt) else None

    def learned(calls: list[dict[str, Any]]) -> str | None:
        try:
            text = behind_prompt({**answer, "tool_calls": calls})
        except ConfigError:
            return None
        return until_stop(answer["content"] if text is None else text, ends)

    rendered = behind_prompt(answer)
    # Where the template writes a past answer in another way than a coming one (it drops its reasoning, say), the plain
    # content is all that is known of the coming one.
    response = answer["content"] if rendered is None else rendered
    calls = answer.get("tool_calls", [])
    lost = first_lost(said, calls, prompt=prompt, rendered=until_stop(response, ends), rerender=learned)
    if lost is not None:
        reasons = ELSEWHERE if rendered is None else LOST
        drop(reasons[lost.kind], f"{render.where}, {lost.place}")
        return None
    return Turn(render.where, prompt, response, has_special=True)


def _prompt_and_completion(record: Mapping[str, Any], where: str, columns: Columns) -> tuple[Any, Any]:
    values = []
    for name in (columns.prompt, columns.completion):
        value = record.get(name)
        if not isinstance(value, (str, list)):
            found = f"{name} is {type(value).__name__}" if name in record else f"keys {', '.join(record)}, not {name}"
            raise ConfigError(
                f"{where}: {found}; wanted {columns.prompt} and {columns.completion} as text or messages, or "
                f"{columns.messages}. Name other columns with data.columns."
            )
        values.append(value)
    if isinstance(values[0], str) and isinstance(values[1], list):
        raise ConfigError(
            f"{where}: {columns.prompt} is text and {columns.completion} is messages. Give both in the same form."
        )
    return values[0], values[1]


def _messages(value: Any, where: str, name: str) -> list[dict[str, Any]]:
    """Messages as SGLang passes them to a template: known keys only, nothing absent, content a text."""
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {name} is {type(value).__name__}, wanted a list of messages.")
    return [_message(message, f"{where}: {name}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ConfigError(f"{where} is {value!r:.80}, wanted an object with role and content.")
    content = value.get("content")
    if content is not None and not isinstance(content, str):
        raise ConfigError(f"{where}: content is {type(content).__name__}, wanted text. Join the texts of its parts.")
    role = value["role"] if value["role"] == "user" else value["role"].lower()
    keys = ("role", "content") if role == "user" else _MESSAGE_KEYS
    given = {**value, "role": role, "content": content or ""}
    message = {key: given[key] for key in keys if given.get(key) is not None}
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call, role, where) for call in message["tool_calls"]]
    return message


def _tool_call(call: Any, role: str, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConfigError(f"{where}: a tool call is {call!r:.80}, wanted an object with function: {{name, arguments}}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and role == "assistant":
        arguments = _parse_json(arguments, f"{where}: arguments of {function['name']}")
    if arguments is not None and not isinstance(arguments, dict) and role == "assistant":
        raise ConfigError(f"{where}: arguments of {function['name']} are {arguments!r:.80}, wanted an object.")
    return {
        "id": call.get("id"),
        "index": call.get("index"),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _tools(value: Any, where: str, name: str) -> list[dict[str, Any]] | None:
    """Tools as SGLang passes them to a template. A table keeps them best as JSON text, which is parsed here."""
    if isinstance(value, str):
        value = _parse_json(value, f"{where}: {name}") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {name} is {type(value).__name__}, wanted a list of tools, or that as JSON text.")
    tools = []
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConfigError(f"{where}: {name}[{index}] is {tool!r:.80}, wanted a function with a name.")
        defer_loading = tool.get("defer_loading")
        if defer_loading is not None and function.get("defer_loading") is None and "function" in tool:
            function = {**function, "defer_loading": defer_loading}
        # The order the record has, what every function has, and no other null.
        fields = {key: value for key, value in function.items() if key in _TOOL_KEYS or key in _OPTIONAL_TOOL_KEYS}
        fields = {key: value for key, value in fields.items() if value is not None or key in _TOOL_KEYS}
        fields |= {key: None for key in _TOOL_KEYS if key not in fields}
        wrapper = {
            "type": "function",
            "function": fields,
            "defer_loading": defer_loading if "function" in tool else None,
        }
        tools.append(wrapper)
    return tools


# Tokenising


def tokenise(turns: Sequence[Turn], tokenizer: Any, stops: set[int], *, append_eos: bool) -> list[Tokens]:
    """Prompt and response apart. A rendered answer ends at the first of `stops`, any at EOS with `append_eos`."""
    prompts = _encode_prompts(turns, tokenizer)
    responses = _encode(tokenizer, [turn.response for turn in turns], add_special_tokens=False)
    tokens = []
    for turn, prompt, response in zip(turns, prompts, responses, strict=True):
        ids = _ended(response, stops if turn.has_special else set())
        if append_eos and ids and ids[-1] not in stops:
            ids = [*ids, tokenizer.eos_token_id]
        tokens.append(Tokens(np.asarray(prompt, dtype=np.int32), np.asarray(ids, dtype=np.int32)))
    return tokens


def _encode_prompts(turns: Sequence[Turn], tokenizer: Any) -> list[list[int]]:
    """Plain prompts get the tokenizer's special tokens (BOS, mostly), rendered conversations bring theirs."""
    encoded: dict[bool, Iterator[list[int]]] = {
        has_special: iter(
            _encode(
                tokenizer,
                [turn.prompt for turn in turns if turn.has_special is has_special],
                add_special_tokens=not has_special,
            )
        )
        for has_special in (False, True)
    }
    return [next(encoded[turn.has_special]) for turn in turns]


def _encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    return ids


def _ended(ids: list[int], stops: set[int]) -> list[int]:
    """`ids` up to and with the first stop token: what a template writes behind it, serving never generates."""
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1]
    return ids


def _unusable(tokens: Tokens, max_length: int) -> str | None:
    if len(tokens.response) == 0:
        return EMPTY_RESPONSE
    if len(tokens.prompt) < 2:
        return EMPTY_PROMPT if len(tokens.prompt) == 0 else SHORT_PROMPT
    if len(tokens.prompt) >= max_length:
        return LONG_PROMPT
    if len(tokens.prompt) + len(tokens.response) > max_length:
        return LONG_EXAMPLE
    return None


def _batched(items: Iterable[Turn], size: int) -> Iterator[list[Turn]]:
    batch: list[Turn] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
