"""Answers of a decode module to prompts: offline from its weights, or from a deployment through its router.

Both are greedy and end at the same places: a stop token, a stop text, or the most tokens that a prompt may be answered
with. Owns what an answer is, and the clients. What is asked and what is right are `tasks.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sglang_prefillshare.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    from sglang_prefillshare.training.evaluate import Evaluator
    from sglang_prefillshare.training.loss import TokenIds
    from sglang_prefillshare.training.modules import Modules

Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]]"
"""Text for /v1/completions, messages for /v1/chat/completions."""

RETRIES: Final = 2
_DOOR_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt, and where its answer ends at the latest. `stops` are not part of the answer."""

    id: str
    prompt: Prompt
    max_new_tokens: int
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `text` is None where nothing did, and `error` says why. `is_cut`: it was not at its end."""

    text: str | None
    is_cut: bool = False
    error: str | None = None


def tokenise_asks(asks: Sequence[Ask], modules: Modules) -> list[TokenIds]:
    """The prompts as token ids. Raises `ConfigError` for any that has no room for an answer in the base's positions."""
    from sglang_prefillshare.training.evaluate import tokenise_prompts

    if modules.tokenizer.chat_template is None and any(not isinstance(ask.prompt, str) for ask in asks):
        raise ConfigError(
            f"the tokenizer of {modules.base} has no chat template, and the questions are conversations. "
            "Give one with --chat-template, or ask HumanEval alone with --form completion."
        )
    prompts = tokenise_prompts([ask.prompt for ask in asks], modules.tokenizer)
    limit = modules.max_positions
    too_long = [place for place, prompt in enumerate(prompts) if limit is not None and len(prompt) >= limit]
    if too_long:
        longest = max(too_long, key=lambda place: len(prompts[place]))
        raise ConfigError(
            f"{len(too_long)} of {len(asks)} prompts leave no room for an answer in the base's {limit} positions "
            f"(first {asks[too_long[0]].id}, longest {asks[longest].id} with {len(prompts[longest])} tokens). "
            "Shorten them with --style compact, or leave them out with --task or --limit."
        )
    return prompts


def answer_offline(
    asks: Sequence[Ask],
    prompts: Sequence[TokenIds],
    evaluator: Evaluator,
    modules: Modules,
    *,
    share: float,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[Answer]:
    """Answers from the weights, with `share` of each prompt's KV from the base; in the order asked."""
    tokenizer = modules.tokenizer
    stop_ids = {*modules.stop_ids} | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
    limits = [
        min(ask.max_new_tokens, modules.max_positions - len(prompt)) if modules.max_positions else ask.max_new_tokens
        for ask, prompt in zip(asks, prompts, strict=True)
    ]
    found = evaluator.generate(prompts, share=share, max_new_tokens=limits, stop_ids=stop_ids, on_progress=on_progress)
    answers = []
    for ask, tokens in zip(asks, found, strict=True):
        is_ended = bool(tokens) and tokens[-1] in stop_ids
        text = tokenizer.decode(tokens[:-1] if is_ended else tokens, skip_special_tokens=True)
        stopped = cut_at(text, ask.stops)
        answers.append(Answer(stopped, is_cut=not is_ended and stopped == text))
    return answers


def cut_at(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    ends = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(ends, default=len(text))]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A deployment's router, asked at the door: the modules that it serves, and the fingerprint of its base's KV."""

    url: str
    models: tuple[str, ...]
    runtime_fingerprint: str | None


def open_endpoint(url: str) -> Endpoint:
    """Raises `WorkerError` for a URL that does not answer as an OpenAI server, or is not ready."""
    import httpx

    url = url.rstrip("/").removesuffix("/v1")
    try:
        listed = httpx.get(f"{url}/v1/models", timeout=_DOOR_TIMEOUT_S)
        listed.raise_for_status()
        names = tuple(str(card["id"]) for card in listed.json()["data"])
        health = httpx.get(f"{url}/health", timeout=_DOOR_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise WorkerError(
            f"{url} cannot be asked: {str(error) or type(error).__name__}. "
            "Give the URL that `prefillshare up` or `prefillshare route` tells."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise WorkerError(f"{url}/v1/models does not list models. Give the URL of a router.") from error
    try:
        state = health.json()
    except ValueError:
        state = {}  # another server's: it says how it is by its status alone
    if not isinstance(state, dict):
        state = {}
    if health.is_server_error:
        missing = ", ".join(map(str, state.get("missing") or ())) or f"status {health.status_code}"
        raise WorkerError(f"{url} is not ready: {missing}. Wait until {url}/health answers 200.")
    return Endpoint(url, names, state.get("base_fingerprint"))


def answer_served(
    asks: Sequence[Ask],
    url: str,
    model: str,
    *,
    concurrency: int,
    timeout_s: float,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[Answer]:
    """Answers of `model` at a router, at most `concurrency` at a time; in the order asked.

    The client repeats a request that met a full or lost server, `RETRIES` times with growing pauses. One that then
    still fails gives an `Answer` with its error; the others go on.
    """
    import openai

    async def ask_all() -> list[Answer]:
        turn = asyncio.Semaphore(concurrency)
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=timeout_s, max_retries=RETRIES)

        async def ask_one(ask: Ask) -> Answer:
            async with turn:
                try:
                    answer = await _request(client, model, ask)
                except openai.APIStatusError as error:
                    answer = Answer(None, error=f"status {error.status_code}: {error.message}"[:500])
                except openai.OpenAIError as error:
                    answer = Answer(None, error=f"{type(error).__name__}: {error}"[:500])
            on_progress(1)
            return answer

        async with client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask_one(ask)) for ask in asks]
        return [task.result() for task in tasks]

    return asyncio.run(ask_all())


async def _request(client: Any, model: str, ask: Ask) -> Answer:
    common = {
        "model": model,
        "max_tokens": ask.max_new_tokens,
        "temperature": 0.0,
        "stop": list(ask.stops) or None,
        # SGLang takes what a request leaves open from the model's generation_config.json.
        "extra_body": {"repetition_penalty": 1.0},
    }
    if isinstance(ask.prompt, str):
        choice = (await client.completions.create(prompt=ask.prompt, **common)).choices[0]
        text = choice.text
    else:
        choice = (await client.chat.completions.create(messages=list(ask.prompt), **common)).choices[0]
        text = choice.message.content
    if choice.finish_reason not in ("stop", "length"):
        return Answer(None, error=f"the answer ended with {choice.finish_reason!r}")
    return Answer(cut_at(text or "", ask.stops), is_cut=choice.finish_reason == "length")
