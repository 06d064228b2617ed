"""What the small base of Figure 2 learns from, and the two tasks that its decode modules learn. Pure Python, seeded.

One token is one character. The base learns a mix of three skills; both tasks ask about a list in a form that the mix
never has, `#[a4,k7,c2,z9]k`. Owns text and token ids only: models and training are `figure2.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, digits
from typing import Final

CHARACTERS: Final = "".join(chr(code) for code in range(32, 127)) + "\n"
"""The vocabulary; a character's place is its token id."""

ROW_TOKENS: Final = 48
"""Length of a pretraining row."""

UNPREDICTABLE: Final = 0.1
"""Weight of the symbols in a pretraining row that nothing before them determines; all others weigh 1."""

SKILLS: Final = {"recall": 0.3, "repetition": 0.6, "succession": 0.1}
"""The pretraining mix, as shares of its rows."""

CODES: Final = ("ev", "ur", "to", "ib", "ax", "om", "if", "yd", "an", "os")
"""The two letters that stand for each digit in task `code`."""

_IDS: Final = {character: index for index, character in enumerate(CHARACTERS)}
_SEPARATORS: Final = " ,;:|/\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One pretraining row: `ROW_TOKENS` characters, and how much each weighs as a target."""

    skill: str
    text: str
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.text) == len(self.weights) == ROW_TOKENS


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt of a task and the one right answer."""

    prompt: str
    answer: str


def encode(text: str) -> list[int]:
    return [_IDS[character] for character in text]


def decode(token_ids: Sequence[int]) -> str:
    return "".join(CHARACTERS[token] for token in token_ids)


# The base's mix


def pretraining_row(generator: random.Random) -> Row:
    """One row of the mix; the next call gives another."""
    (skill,) = generator.choices(list(SKILLS), list(SKILLS.values()))
    return {"recall": _recall, "repetition": _repetition, "succession": _succession}[skill](generator)


def _recall(generator: random.Random) -> Row:
    """Pairs of key and value, then keys again, each to be followed by its value: `a4;k7;c2;k7;a4;c2…`

    Half of the rows have nothing between the pairs: twice the keys to look up in one row.
    """
    pairs = _pairs(generator, generator.randint(2, 5))
    separator = generator.choice(_SEPARATORS) if generator.random() < 0.5 else ""
    text, weights = "", list[float]()
    for place in range(ROW_TOKENS):
        key, value = pairs[place] if place < len(pairs) else generator.choice(pairs)
        text += key + value + separator
        weights += [UNPREDICTABLE, 1.0 if place >= len(pairs) else UNPREDICTABLE] + [UNPREDICTABLE] * len(separator)
    return Row("recall", text[:ROW_TOKENS], tuple(weights[:ROW_TOKENS]))


def _repetition(generator: random.Random) -> Row:
    """A random string of different characters, over and over. Its second beginning cannot be known yet.

    From this the base learns to look for what followed the last time, and recall comes soon after. Short periods would
    delay both by hundreds of steps: they can be copied by distance, without looking at the characters. Half of the rows
    draw from all characters, so that none that a task has is new to the base.
    """
    period = generator.randint(8, 20)
    alphabet = CHARACTERS if generator.random() < 0.5 else ascii_lowercase + digits
    text = "".join(generator.sample(alphabet, period)) * ROW_TOKENS
    return Row("repetition", text[:ROW_TOKENS], (UNPREDICTABLE,) * (period + 1) + (1.0,) * (ROW_TOKENS - period - 1))


def _succession(generator: random.Random) -> Row:
    """Digits that count up, 0 after 9."""
    start = generator.randrange(10)
    text = "".join(digits[(start + place) % 10] for place in range(ROW_TOKENS))
    return Row("succession", text, (UNPREDICTABLE,) + (1.0,) * (ROW_TOKENS - 1))


# The tasks


def code_sample(generator: random.Random) -> Sample:
    """Look up a key, write its value as two letters and the key as a capital: `#[a4,k7,c2,z9]k` -> `ydK`.

    The answer can be worked out from what the base knows of the list; only how to write it is new.
    """
    pairs = _pairs(generator, generator.randint(3, 5))
    key, value = generator.choice(pairs)
    return Sample(_question(pairs, key), CODES[int(value)] + key.upper())


def next_key_sample(generator: random.Random) -> Sample:
    """Name the key that follows in a list of 6 to 8 pairs, as a capital: `#[a4,k7,c2,z9,…]k` -> `C`. The last key is
    never asked.

    Each key would have to carry the key before it, which the base never had a reason to compute: the module cannot make
    up for that where the base prefills the list. (With four pairs it sometimes can, by their distance from the end.) A
    guess among the other keys is right in 17 % of the cases, among those behind the asked one in 41 %.
    """
    pairs = _pairs(generator, generator.randint(6, 8))
    place = generator.randrange(len(pairs) - 1)
    return Sample(_question(pairs, pairs[place][0]), pairs[place + 1][0].upper())


TASKS: Final[dict[str, Callable[[random.Random], Sample]]] = {"code": code_sample, "next_key": next_key_sample}
"""`code` is the figure's task, `next_key` the one on which cache-conditioning falls short."""


def _pairs(generator: random.Random, count: int) -> list[tuple[str, str]]:
    """Different keys; values may repeat."""
    return list(zip(generator.sample(ascii_lowercase, count), generator.choices(digits, k=count), strict=True))


def _question(pairs: Sequence[tuple[str, str]], key: str) -> str:
    return f"#[{','.join(name + value for name, value in pairs)}]{key}"
