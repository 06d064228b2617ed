"""Answers of a decode module at any share of base KV, offline and in batches (paper §3.2, Figure 2).

The base computes KV of the first `base_token_count(n, share)` tokens of a prompt, the module takes every token from
there on: the split that training draws and, at a share of 1, the one that serving uses. Owns task files, greedy
generation, log-likelihoods and what counts as right. Loading models is `modules.py`'s, reporting `sharing_curve.py`'s.

A task file has one of two kinds of record:

    {"prompt": "text" or [messages], "answer": "text"}                          right if generated greedily
    {"prompt": "text" or [messages], "choices": ["text", …], "answer": index}   right if likelier than the others

`answer` may also be one of the choices as text; `tools` go with messages, `id` is ignored. Text becomes tokens exactly
as in training: see `data.py`.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

import numpy as np
import torch
from transformers import DynamicCache

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.training.data import base_token_count, read_records, render_turns, stop_texts, tokenise
from sglang_prefillshare.training.loss import (
    Batch,
    Example,
    TokenIds,
    base_prefill,
    collate,
    response_logits,
    token_losses,
)
from sglang_prefillshare.training.recipe import Columns, Data, Source

if TYPE_CHECKING:
    from sglang_prefillshare.training.data import Turn
    from sglang_prefillshare.training.trainer import BaseSource

Scoring: TypeAlias = Literal["exact_match", "log_likelihood"]

_KEYS: Final = ("prompt", "answer", "choices", "tools", "id")
_LABEL: Final = np.zeros(1, dtype=np.int32)  # a response that nobody reads: `collate` then feeds the prompt alone


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with the one answer to generate, or with choices of which `answers[right]` must be the likeliest."""

    where: str
    prompt: TokenIds
    answers: tuple[TokenIds, ...]
    right: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest answer."""
        return len(self.prompt) + max(len(answer) for answer in self.answers)


@dataclass(frozen=True, slots=True)
class TaskSet:
    """The questions of one task file; all are scored in one way. An answer ends at any of `stop_ids`."""

    questions: Sequence[Question]
    scoring: Scoring
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A decode module with its base. Both are left in evaluation mode; neither is changed.

    `base` gives the model that computes the base's KV (`trainer.frozen_copy`, or `trainer.without_adapter` for an
    adapter). `pad_id` is any token: padded positions are masked.
    """

    module: Any
    base: BaseSource
    batch_size: int = 16
    pad_id: int = 0

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        share: float,
        max_new_tokens: int | Sequence[int],
        stop_ids: Collection[int] = (),
        on_progress: Callable[[int], object] = lambda done: None,
    ) -> list[list[int]]:
        """Greedy answers y1.. to every prompt, in the order given. A stop token ends an answer and is part of it.

        `max_new_tokens` is one limit for all, or one for each. `on_progress` is told how many more are done.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        answers: list[list[int]] = [[] for _ in prompts]
        for chosen in self._batches([len(prompt) for prompt in prompts]):
            batch = self._collate([_example(prompts[index], _LABEL, share) for index in chosen])
            found = self._generate_batch(batch, [limits[index] for index in chosen], stop_ids)
            for index, answer in zip(chosen, found, strict=True):
                answers[index] = answer
            on_progress(len(chosen))
        return answers

    def log_likelihoods(
        self,
        pairs: Sequence[tuple[TokenIds, TokenIds]],
        *,
        share: float,
        on_progress: Callable[[int], object] = lambda done: None,
    ) -> list[float]:
        """log P(response | prompt), summed over the response's tokens, for every (prompt, response)."""
        scores = [0.0] * len(pairs)
        for chosen in self._batches([len(prompt) + len(response) for prompt, response in pairs]):
            batch = self._collate([_example(*pairs[index], share) for index in chosen])
            self.module.eval()
            with torch.no_grad():
                with self.base(self.module) as base:
                    prefix = base_prefill(base, batch)
                losses = token_losses(response_logits(self.module, batch, prefix), batch["labels"])
            for index, score in zip(chosen, (-losses.double().sum(dim=1)).tolist(), strict=True):
                scores[index] = score
            on_progress(len(chosen))
        return scores

    def answers_right(
        self, tasks: TaskSet, *, share: float, on_progress: Callable[[int], object] = lambda done: None
    ) -> list[bool]:
        """For every question, whether the module gets it right at this share. Progress counts questions."""
        if tasks.scoring == "exact_match":
            answers = self.generate(
                [question.prompt for question in tasks.questions],
                share=share,
                max_new_tokens=[len(question.answers[0]) for question in tasks.questions],
                stop_ids=tasks.stop_ids,
                on_progress=on_progress,
            )
            return [
                _is_same_answer(answer, question.answers[0].tolist(), tasks.stop_ids)
                for answer, question in zip(answers, tasks.questions, strict=True)
            ]
        pairs = [(question.prompt, answer) for question in tasks.questions for answer in question.answers]
        scores = iter(self.log_likelihoods(pairs, share=share))
        right = []
        for question in tasks.questions:
            own = list(itertools.islice(scores, len(question.answers)))
            right.append(max(range(len(own)), key=own.__getitem__) == question.right)
        on_progress(len(tasks.questions))
        return right

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices in batches of similar lengths."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]

    def _collate(self, examples: Sequence[Example]) -> Batch:
        device = next(self.module.parameters()).device
        batch: Mapping[str, Any] = collate(examples, pad_id=self.pad_id)
        return cast("Batch", {name: tensor.to(device) for name, tensor in batch.items()})

    def _generate_batch(self, batch: Batch, limits: Sequence[int], stop_ids: Collection[int]) -> list[list[int]]:
        """Greedy answers to the prompts of a batch of B rows whose own columns end with xn."""
        self.module.eval()
        cache = DynamicCache()
        with torch.no_grad(), self.base(self.module) as base:
            prefix = base_prefill(base, batch)
        if prefix is not None:
            dtype = self.module.dtype
            for index, layer in enumerate(prefix.layers):
                cache.update(layer.keys.to(dtype), layer.values.to(dtype), index)
        mask = torch.cat([batch["context_mask"], batch["own_mask"]], dim=1)  # [B, columns so far]
        fed = batch["own_ids"]  # [B, the rest of each prompt], then [B, 1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        length = mask.sum(dim=1, keepdim=True)
        answers: list[list[int]] = [[] for _ in limits]
        is_open = [limit > 0 for limit in limits]
        while any(is_open):
            with torch.no_grad():
                logits = self.module(
                    input_ids=fed,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            fed = logits.argmax(dim=-1, keepdim=True)
            for row, token in enumerate(fed[:, 0].tolist()):
                if is_open[row]:
                    answers[row].append(token)
                    is_open[row] = token not in stop_ids and len(answers[row]) < limits[row]
            mask = torch.cat([mask, torch.ones_like(length)], dim=1)
            positions, length = length, length + 1
        return answers


def read_tasks(
    path: str,
    tokenizer: Any,
    *,
    stop_ids: Collection[int] = (),
    append_eos: bool = True,
    limit: int | None = None,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TaskSet:
    """The first `limit` questions of a task file, as token ids.

    `stop_ids` are the tokens at which serving stops, besides the tokenizer's EOS. With `append_eos` an answer to
    generate must end with one of them; without, what comes behind the answer does not matter. Choices after plain
    prompts are scored without it. Raises `ConfigError`, naming file and line, for a record of another form, for a file
    without records or with both kinds, and for questions longer than `max_length`.
    """
    if not Path(path).is_file():
        raise ConfigError(f"there is no task file {path}. Give a JSONL file with prompt and answer, one a line.")
    if append_eos and tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token for answers to end with. Evaluate without it: --no-eos.")
    stops = {*stop_ids} | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
    source = Source(path=path)
    rendering = Data(
        train=(source,), columns=Columns(completion="answer"), chat_template_kwargs=dict(chat_template_kwargs or {})
    )
    ends = stop_texts(tokenizer, stops)
    turns: list[Turn] = []
    counts: list[tuple[str, int, int]] = []  # where, how many turns, which of them is right
    kinds: dict[Scoring, str] = {}
    for where, record in itertools.islice(read_records(source), limit):
        options, right = _options(record, where)
        kinds.setdefault("exact_match" if options is None else "log_likelihood", where)
        if len(kinds) == 2:
            raise ConfigError(
                f"{path} has questions with choices ({kinds['log_likelihood']}) and without "
                f"({kinds['exact_match']}). Put them into two files: each is scored in its own way."
            )
        answers = [record["answer"]] if options is None else options
        turns += [_turn(record, answer, where, rendering, tokenizer, ends) for answer in answers]
        counts.append((where, len(answers), right))
    if not counts:
        raise ConfigError(f"{path} holds no question. Give records with prompt and answer, one a line.")
    (scoring,) = kinds
    tokens = iter(tokenise(turns, tokenizer, stops, append_eos=append_eos and scoring == "exact_match"))
    questions = []
    for where, count, right in counts:
        own = list(itertools.islice(tokens, count))
        if len(own[0].prompt) == 0 or any(len(each.response) == 0 for each in own):
            raise ConfigError(f"{where}: prompt or answer has no tokens. Remove the record, or mend it.")
        questions.append(Question(where, own[0].prompt, tuple(each.response for each in own), right))
    too_long = [question for question in questions if max_length is not None and question.longest > max_length]
    if too_long:
        raise ConfigError(
            f"{path}: {len(too_long)} of {len(questions)} questions are longer than the base's {max_length} positions, "
            f"prompt and answer together (first {too_long[0].where}, {too_long[0].longest} tokens). Remove them."
        )
    return TaskSet(questions, scoring, frozenset(stops) if append_eos else frozenset())


def tokenise_prompts(
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    tokenizer: Any,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[TokenIds]:
    """Prompts, text or messages, as token ids: those of training and serving. `ConfigError` for one without any."""
    source = Source(path="prompts")
    rendering = Data(
        train=(source,), columns=Columns(completion="answer"), chat_template_kwargs=dict(chat_template_kwargs or {})
    )
    turns = [
        _turn({"prompt": prompt}, "-", f"prompt {number}", rendering, tokenizer, [])
        for number, prompt in enumerate(prompts, start=1)
    ]
    return [tokens.prompt for tokens in tokenise(turns, tokenizer, set(), append_eos=False)]


def _options(record: Mapping[str, Any], where: str) -> tuple[list[str] | None, int]:
    """The choices of a record and which is right; no choices where the answer is to be generated."""
    unknown = [key for key in record if key not in _KEYS]
    if unknown:
        close = difflib.get_close_matches(unknown[0], _KEYS, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(_KEYS)}."
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}. {hint}")
    for key in ("prompt", "answer"):
        if record.get(key) is None:
            raise ConfigError(f"{where}: {key} is missing. Give prompt and answer, and choices to choose among.")
    choices, answer = record.get("choices"), record["answer"]
    if choices is None:
        if not isinstance(answer, (str, list)):
            raise ConfigError(f"{where}: answer is {answer!r:.80}, wanted text (an index only with choices).")
        return None, 0
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) for each in choices):
        raise ConfigError(f"{where}: choices is {choices!r:.80}, wanted a list of two texts or more.")
    if isinstance(answer, str):
        if choices.count(answer) != 1:
            raise ConfigError(f"{where}: answer {answer!r:.80} is {choices.count(answer)} of the choices, wanted one.")
        return choices, choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{where}: answer is {answer!r:.80}, wanted an index from 0 to {len(choices) - 1}, or the text of a choice."
        )
    return choices, answer


def _turn(
    record: Mapping[str, Any], answer: Any, where: str, rendering: Data, tokenizer: Any, ends: Sequence[str]
) -> Turn:
    """Prompt and answer as training renders them."""

    def refuse(reason: str, at: str) -> None:
        raise ConfigError(f"{at}: {reason}. Remove the record, or mend it.")

    turns = list(render_turns({**record, "answer": answer}, where, rendering, tokenizer, ends, refuse))
    if len(turns) != 1:
        raise ConfigError(f"{where}: answer has {len(turns)} assistant messages, wanted one.")
    return turns[0]


def _example(prompt: TokenIds, response: TokenIds, share: float) -> Example:
    return Example(prompt, response, base_token_count(len(prompt), share))


def _is_same_answer(found: Sequence[int], wanted: Sequence[int], stop_ids: Collection[int]) -> bool:
    """Token for token, but any stop token ends an answer as well as another: serving returns none of them."""
    if len(found) != len(wanted) or list(found[:-1]) != list(wanted[:-1]):
        return False
    return found[-1] == wanted[-1] or (found[-1] in stop_ids and wanted[-1] in stop_ids)
