"""Small requests about lists, each with its plan, its Python expression and wrong versions of that. Pure, seeded.

    "What is the sum of the squares of the even numbers in xs?"
    xs | keep even | square | sum
    sum(x * x for x in xs if x % 2 == 0)

A request is a combination of what to keep, what to make of each item and what to make of all of them. One combination
in five is held out: training never asks it, every test question does. The demo's modules are trained on these.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from string import ascii_lowercase
from typing import Final, Literal

import xxhash

Split = Literal["train", "test"]

_HELD_OUT: Final = 5
"""One combination in so many is for tests only."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of a request: how it may be worded, its step in the plan, its code; `{k}` stands for a constant.

    A wording of a filter or a map has `{}` for the items; a wording of a reducer for the whole phrase.
    """

    step: str
    code: str
    wordings: tuple[str, ...]
    constants: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Domain:
    """A list, what its items are called in code and in words, and the pieces that fit it."""

    name: str
    item: str
    noun: str
    keeps: tuple[Piece, ...]
    maps: tuple[Piece, ...]
    reducers: tuple[Piece, ...]


_NUMBERS: Final = tuple(str(number) for number in range(2, 13))
_LETTERS: Final = tuple("abcdefghlmnoprst")
_SIZES: Final = tuple(str(number) for number in range(2, 9))

_NO_KEEP: Final = Piece("", "", ("{}",))
_NO_MAP: Final = Piece("", "", ("the {}", "all {}"))
_LIST: Final = Piece("list", "[{}]", ("List {}.", "Give me {}.", "Return {} as a list."))
_SET: Final = Piece("distinct", "set({})", ("Give me {} without repeats.", "Return the distinct values among {}."))
_SORTED: Final = Piece("sort", "sorted({})", ("Sort {}.", "Give me {} in order.", "Return {}, smallest first."))
_COUNT: Final = Piece("count", "len([{}])", ("Count {}.", "How many are {}?", "Find the number of {}."))

DOMAINS: Final = (
    Domain(
        "xs",
        "x",
        "numbers",
        keeps=(
            _NO_KEEP,
            Piece("keep even", "x % 2 == 0", ("even {}", "{} that are even", "{} divisible by two")),
            Piece("keep odd", "x % 2 == 1", ("odd {}", "{} that are odd", "{} not divisible by two")),
            Piece("keep positive", "x > 0", ("positive {}", "{} above zero")),
            Piece("keep negative", "x < 0", ("negative {}", "{} below zero")),
            Piece("keep above {k}", "x > {k}", ("{} above {k}", "{} greater than {k}", "{} over {k}"), _NUMBERS),
            Piece("keep below {k}", "x < {k}", ("{} below {k}", "{} less than {k}", "{} under {k}"), _NUMBERS),
            Piece("keep multiples of {k}", "x % {k} == 0", ("{} divisible by {k}", "multiples of {k}"), _NUMBERS[1:]),
        ),
        maps=(
            _NO_MAP,
            Piece("square", "x * x", ("the squares of the {}", "the {}, each squared")),
            Piece("cube", "x ** 3", ("the cubes of the {}", "the {}, each cubed")),
            Piece("double", "2 * x", ("the doubles of the {}", "twice the {}")),
            Piece("negate", "-x", ("the {}, each negated", "the {} with the opposite sign")),
            Piece("add {k}", "x + {k}", ("the {}, each plus {k}", "the {} increased by {k}"), _NUMBERS),
            Piece("remainder by {k}", "x % {k}", ("the remainders of the {} modulo {k}",), _NUMBERS[1:]),
        ),
        reducers=(
            _LIST,
            _SET,
            _SORTED,
            _COUNT,
            Piece("sum", "sum({})", ("Sum {}.", "What is the sum of {}?", "Add up {}.")),
            Piece("largest", "max({})", ("Find the largest of {}.", "What is the maximum of {}?")),
            Piece("smallest", "min({})", ("Find the smallest of {}.", "What is the minimum of {}?")),
        ),
    ),
    Domain(
        "ws",
        "w",
        "words",
        keeps=(
            _NO_KEEP,
            Piece("keep longer than {k}", "len(w) > {k}", ("{} longer than {k} letters",), _SIZES),
            Piece("keep shorter than {k}", "len(w) < {k}", ("{} shorter than {k} letters",), _SIZES),
            Piece('keep starting with "{k}"', 'w[0] == "{k}"', ('{} that start with "{k}"',), _LETTERS),
            Piece('keep ending with "{k}"', 'w[-1] == "{k}"', ('{} that end with "{k}"',), _LETTERS),
            Piece(
                'keep containing "{k}"', '"{k}" in w', ('{} with the letter "{k}"', '{} that contain "{k}"'), _LETTERS
            ),
            Piece("keep capitals", "w.isupper()", ("{} in capitals", "{} that are all capitals")),
        ),
        maps=(
            _NO_MAP,
            Piece("capitals", "w.upper()", ("the {} in upper case", "the {}, each in capitals")),
            Piece("reverse", "w[::-1]", ("the {} spelled backwards", "the {}, each reversed")),
            Piece("length", "len(w)", ("the lengths of the {}", "how long the {} are")),
            Piece("first letter", "w[0]", ("the first letters of the {}", "the initials of the {}")),
            Piece("last letter", "w[-1]", ("the last letters of the {}", "the final letters of the {}")),
        ),
        reducers=(
            _LIST,
            _SET,
            _SORTED,
            _COUNT,
            Piece("join", '" ".join({})', ("Join {} with spaces.", "Put {} into one line.")),
        ),
    ),
)


_COMPARISON: Final = """
def value(source, xs, ws):
    try:
        return eval(source, {{"xs": list(xs), "ws": list(ws)}})
    except Exception as error:
        return type(error)

for xs, ws in {lists!r}:
    found, wanted = value({answer!r}, xs, ws), value({code!r}, xs, ws)
    assert type(found) is type(wanted) and found == wanted
"""


def _number_lists() -> list[list[int]]:
    """Every number alone, for what is kept of it, and many together, for what is made of all."""
    generator = random.Random("numbers")
    alone = [[number] for number in range(-30, 31)]
    return [[], *alone, *([generator.randint(-30, 30) for _ in range(12)] for _ in range(20))]


def _word_lists() -> list[list[str]]:
    """Words that start with a letter, end with it and contain it; of all lengths, some of them in capitals."""
    generator = random.Random("words")
    lists = [[], generator.sample(ascii_lowercase, k=26)]
    for letter in ascii_lowercase:
        words = []
        for size in range(1, 19):
            rest = "".join(generator.choices(ascii_lowercase, k=size - 1))
            place = (0, size - 1, size // 2)[size % 3]
            word = rest[:place] + letter + rest[place:]
            words.append(word.upper() if generator.random() < 0.2 else word)
        generator.shuffle(words)
        lists += [words, words[:1], words[1:4]]
    return lists


_LISTS: Final = [*zip_longest(_number_lists(), _word_lists(), fillvalue=[])]


@dataclass(frozen=True, slots=True)
class Request:
    """One request, and the one plan and the one expression that answer it."""

    domain: Domain
    keep: Piece
    map: Piece
    reducer: Piece
    text: str

    @property
    def plan(self) -> str:
        steps = (self.domain.name, self.keep.step, self.map.step, self.reducer.step)
        return " | ".join(step for step in steps if step)

    @property
    def code(self) -> str:
        name, item = self.domain.name, self.domain.item
        if not self.keep.code and not self.map.code and self.reducer.code != "[{}]":
            whole = name
            return f"len({name})" if self.reducer.step == "count" else self.reducer.code.format(whole)
        condition = f" if {self.keep.code}" if self.keep.code else ""
        return self.reducer.code.format(f"{self.map.code or item} for {item} in {name}{condition}")


def draw_request(generator: random.Random, split: Split) -> Request:
    """A random request whose combination belongs to `split`."""
    while True:
        domain = generator.choice(DOMAINS)
        keep, mapped = (_choose(pieces, generator) for pieces in (domain.keeps, domain.maps))
        reducer = generator.choice(domain.reducers)
        # Counting does not care what becomes of the items, and a list of everything as it is asks for nothing.
        if (reducer.step == "count" and mapped.step) or (not (keep.step or mapped.step) and reducer.step == "list"):
            continue
        if reducer.step == "join" and mapped.step == "length":
            continue  # numbers cannot be joined
        if (_is_held_out(domain.name, keep.step, mapped.step, reducer.step)) is (split == "test"):
            keep, mapped = (_with_constant(piece, generator) for piece in (keep, mapped))
            kept = generator.choice(keep.wordings).replace("{}", domain.noun)
            phrase = f"{generator.choice(mapped.wordings).replace('{}', kept)} in {domain.name}"
            text = generator.choice(reducer.wordings).replace("{}", phrase)
            return Request(domain, keep, mapped, reducer, text[0].upper() + text[1:])


def wrong_code(request: Request, generator: random.Random) -> str:
    """The expression of a request that differs from this one in a single piece: the mistake of a careless coder."""
    domain = request.domain
    while True:
        place = generator.choice(("keep", "map", "reducer"))
        pieces: Sequence[Piece] = {"keep": domain.keeps, "map": domain.maps, "reducer": domain.reducers}[place]
        other = replace(request, **{place: _with_constant(generator.choice(pieces), generator)})
        if other.code != request.code:
            return other.code


def comparison(answer: str, code: str) -> str:
    """A program that ends without raising only where two expressions give equal values for every list it tries.

    `answer` may be anything at all: run it where it can do no harm.
    """
    return _COMPARISON.format(lists=_LISTS, answer=answer, code=code)


def _choose(pieces: Sequence[Piece], generator: random.Random) -> Piece:
    """The first piece, which does nothing, in three of ten cases: more often than its share, for it is hard to hear."""
    return pieces[0] if generator.random() < 0.3 else generator.choice(pieces[1:])


def _with_constant(piece: Piece, generator: random.Random) -> Piece:
    if not piece.constants:
        return piece
    constant = generator.choice(piece.constants)

    def filled(text: str) -> str:
        return text.replace("{k}", constant)

    return Piece(filled(piece.step), filled(piece.code), tuple(filled(each) for each in piece.wordings))


@cache
def _is_held_out(*steps: str) -> bool:
    return xxhash.xxh3_64_intdigest("/".join(steps).encode()) % _HELD_OUT == 0
