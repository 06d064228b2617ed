"""A Dockerfile as stages of steps. Reads the instructions that ours use and refuses any other."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = frozenset({"ARG", "CMD", "COPY", "ENV", "HEALTHCHECK", "RUN", "USER", "WORKDIR"})
_OPTION = re.compile(r"--([a-z-]+)=(\S+)\s+")


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction after FROM: its options (`--from=build`) and what follows them, continued lines joined."""

    instruction: str
    value: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The value split as a shell does; of the JSON form, what the list holds."""
        found = self.value.removeprefix("CMD ") if self.instruction == "HEALTHCHECK" else self.value
        return list(json.loads(found)) if found.startswith("[") else shlex.split(found)

    def __str__(self) -> str:
        options = "".join(f"--{name}={value} " for name, value in self.options.items())
        return f"{self.instruction} {options}{self.value}"


@dataclass(frozen=True, slots=True)
class Stage:
    """What FROM begins: the image or earlier stage that it builds on, its own name if it has one, its steps."""

    base: str
    name: str | None
    steps: tuple[Step, ...]

    def last(self, instruction: str) -> Step:
        """The step of this instruction that counts where one replaces the one before it."""
        return next(step for step in reversed(self.steps) if step.instruction == instruction)


def read_dockerfile(path: Path) -> tuple[Stage, ...]:
    """The stages of a Dockerfile, in order. Raises `ValueError` for what we do not know how to run."""
    stages: list[tuple[str, str | None, list[Step]]] = []
    for line in _logical_lines(path.read_text()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, *named = rest.split()
            stages.append((base, named[1] if named else None, []))
        elif instruction not in KNOWN or not stages:
            raise ValueError(f"{path.name} has {line!r}, wanted FROM first and then one of {sorted(KNOWN)}")
        else:
            stages[-1][2].append(_step(instruction, rest.strip()))
    return tuple(Stage(base, name, tuple(steps)) for base, name, steps in stages)


def _step(instruction: str, rest: str) -> Step:
    options = {}
    while match := _OPTION.match(rest):
        options[match[1]] = match[2]
        rest = rest[match.end() :]
    return Step(instruction, rest, options)


def _logical_lines(text: str) -> list[str]:
    lines, open_line = [], ""
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        open_line += line.strip()
        if open_line.endswith("\\"):
            open_line = open_line[:-1].rstrip() + " "
        else:
            lines.append(open_line)
            open_line = ""
    if open_line:
        raise ValueError(f"the last line continues into nothing: {open_line!r}")
    return lines
