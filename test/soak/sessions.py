"""Sessions that grow, and what each of their turns must be answered: computed with plain Transformers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from test.support.models import make_tokenizer, sample_prompt
from test.support.oracle import Oracle

TURNS: Final = 4
CLEAR_GAP: Final = 3e-3
"""As `clear_prompt` has it: a nearer tie may fall either way."""
_WORDS: Final = (
    *(
        "planner",
        "splits",
        "the",
        "question",
        "into",
        "steps",
        "coder",
        "writes",
        "function",
        "for",
        "each",
        "reviewer",
    ),
    *("reads", "answer", "base", "model", "shared", "prompt", "once", "every", "decode", "module", "starts", "from"),
    *("same", "keys", "values", "takes", "last", "token", "which", "numbers", "are", "prime", "explain", "why"),
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question: a prompt of token ids (asked at `/generate` and `/v1/completions`), or `messages` of a chat, whose
    ids are then `prompt`; and the answer's ids."""

    module: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    messages: tuple[Mapping[str, str], ...] = ()


Session = tuple[Turn, ...]


def make_sessions(oracles: Mapping[str, Oracle], count: int, new_tokens: int, *, seed: int) -> list[Session]:
    """`count` sessions of `TURNS` turns, each turn by a module that is drawn; every third session is a chat.

    A turn's prompt goes on from the one before, and its answer, by 8 to 60 tokens (chats: some words). Half of the
    sessions begin with one of three prefixes, and one in ten is long.
    """
    draw = random.Random(seed)
    prefixes = [sample_prompt(96, seed=_seed(draw)) for _ in range(3)]
    asks = _Asks(oracles, new_tokens, draw)
    return [asks.chat() if number % 3 == 2 else asks.of_ids(prefixes) for number in range(count)]


class _Asks:
    """Draws turns, and has them answered; one whose answer has a near tie is drawn again."""

    def __init__(self, oracles: Mapping[str, Oracle], new_tokens: int, draw: random.Random) -> None:
        self._oracles = oracles
        self._new_tokens = new_tokens
        self._draw = draw
        self._tokenizer = make_tokenizer()

    def of_ids(self, prefixes: Sequence[list[int]]) -> Session:
        draw = self._draw
        said = list(draw.choice(prefixes)) if draw.random() < 0.5 else []
        first = (300, 500) if draw.random() < 0.1 else (2, 80)
        turns: list[Turn] = []
        while len(turns) < TURNS:
            more = sample_prompt(draw.randint(*((8, 60) if turns else first)), seed=_seed(draw))
            turn = self._answered([*said, *more])
            if turn is not None:
                turns.append(turn)
                said = [*turn.prompt, *turn.answer]
        return tuple(turns)

    def chat(self) -> Session:
        draw = self._draw
        said: list[Mapping[str, str]] = [{"role": "system", "content": "Answer in one short sentence."}]
        turns: list[Turn] = []
        while len(turns) < TURNS:
            words = " ".join(draw.choice(_WORDS) for _ in range(draw.randint(3, 12)))
            messages = [*said, {"role": "user", "content": words}]
            turn = self._answered(_chat_ids(self._tokenizer, messages), messages)
            if turn is not None:
                turns.append(turn)
                answer = str(self._tokenizer.decode(turn.answer)).replace("\ufffd", "?")
                said = [*messages, {"role": "assistant", "content": answer}]
        return tuple(turns)

    def _answered(self, prompt: Sequence[int], messages: Sequence[Mapping[str, str]] = ()) -> Turn | None:
        """None where the answer has a near tie."""
        module = self._draw.choice(sorted(self._oracles))
        found = self._oracles[module].generate(prompt, self._new_tokens)
        if found.smallest_gap < CLEAR_GAP:
            return None
        return Turn(module, tuple(prompt), tuple(found.token_ids), tuple(messages))


def _chat_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]]) -> list[int]:
    text: Any = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _seed(draw: random.Random) -> int:
    return draw.getrandbits(24)
