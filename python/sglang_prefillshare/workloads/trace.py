"""A trace: sessions to replay, one JSON object a line. docs/benchmark.md describes the format.

    {"session": "a", "arrival_s": 0.0, "prompt_tokens": 800, "shared_prefix_tokens": 700,
     "turns": [[{"agent": "planner", "answer_tokens": 46, "observation_tokens": 190}, ...], ...]}

`input_ids` in place of `prompt_tokens`, and `observation_ids` in place of `observation_tokens`, give the tokens
themselves; lengths are filled with seeded ones. A line that does not fit is refused with file and line.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads.session import Session, Step, Words


class _Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    agent: str
    answer_tokens: int
    observation_tokens: int | None = None
    observation_ids: tuple[int, ...] | None = None


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    turns: tuple[tuple[_Step, ...], ...]
    session: str | None = None
    arrival_s: float | None = None
    prompt_tokens: int | None = None
    input_ids: tuple[int, ...] | None = None
    shared_prefix_tokens: int = 0


def load_trace(
    path: Path | str, *, agents: Collection[str], words: Words, length_scale: float = 1.0, limit: int | None = None
) -> list[Session]:
    """The sessions of a trace, in its order. `length_scale` stretches lengths, not ids that are given.

    The shared prefixes of two lines are the same tokens as far as both go. Raises `ConfigError` naming file and line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the trace {path}: {reason}.") from error
    decoder = msgspec.json.Decoder(_Line)
    sessions: list[Session] = []
    names: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if limit is not None and len(sessions) >= limit:
            break
        try:
            session = _session(decoder.decode(line), number, agents, words, length_scale)
        except (msgspec.DecodeError, ConfigError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
        if session.name in names:
            raise ConfigError(
                f"{path}:{number}: session {session.name!r} is there twice, first in line "
                f"{names[session.name]}. Name each session once, or leave the names out."
            )
        names[session.name] = number
        sessions.append(session)
    if not sessions:
        raise ConfigError(f"the trace {path} has no sessions, wanted one JSON object a line.")
    timed = sum(session.arrival_s is not None for session in sessions)
    if timed not in (0, len(sessions)):
        raise ConfigError(f"the trace {path} has arrival_s on {timed} of {len(sessions)} lines, wanted all or none.")
    return sessions


def _session(line: _Line, number: int, agents: Collection[str], words: Words, scale: float) -> Session:
    name = line.session or f"line-{number}"

    def scaled(tokens: int) -> int:
        return max(1, round(tokens * scale)) if tokens else 0

    shared_tokens = _at_least("shared_prefix_tokens", line.shared_prefix_tokens, 0)
    if line.input_ids is not None:
        if line.prompt_tokens is not None:
            raise ConfigError("prompt_tokens and input_ids are both given. Keep one.")
        prompt = line.input_ids
    elif line.prompt_tokens is not None:
        shared_tokens = scaled(shared_tokens)
        prompt_tokens = scaled(_at_least("prompt_tokens", line.prompt_tokens, 2))
        shared = words.draw("trace/shared", min(shared_tokens, prompt_tokens))
        prompt = shared + words.draw(f"{name}/own", prompt_tokens - len(shared))
    else:
        raise ConfigError("prompt_tokens is missing. Give it, or input_ids.")
    _check(len(prompt) >= 2, f"the prompt has {len(prompt)} tokens, wanted 2 or more.")
    _check(all(token >= 0 for token in prompt), "input_ids holds a negative number, wanted token ids.")
    _check(
        shared_tokens <= len(prompt),
        f"shared_prefix_tokens is {shared_tokens}, wanted at most the prompt's {len(prompt)}.",
    )
    _check(line.arrival_s is None or line.arrival_s >= 0, f"arrival_s is {line.arrival_s}, wanted 0 or more.")
    _check(bool(line.turns) and all(line.turns), "turns is empty or has an empty turn, wanted a call in each.")
    turns = []
    for turn, steps in enumerate(line.turns):
        made = []
        for place, step in enumerate(steps):
            where = f"turns[{turn}][{place}]"
            if step.agent not in agents:
                raise ConfigError(f"{where}.agent is {step.agent!r}, wanted one of {', '.join(agents)}.")
            _at_least(f"{where}.answer_tokens", step.answer_tokens, 1)
            made.append(
                Step(
                    step.agent,
                    scaled(step.answer_tokens),
                    _observation(step, where, f"{name}/{turn}/{place}", words, scale),
                )
            )
        turns.append(tuple(made))
    return Session(name, prompt, shared_tokens, tuple(turns), line.arrival_s)


def _observation(step: _Step, where: str, name: str, words: Words, scale: float) -> tuple[int, ...]:
    if step.observation_ids is not None:
        if step.observation_tokens is not None:
            raise ConfigError(f"{where}: observation_tokens and observation_ids are both given. Keep one.")
        _check(all(token >= 0 for token in step.observation_ids), f"{where}.observation_ids holds a negative number.")
        return step.observation_ids
    tokens = _at_least(f"{where}.observation_tokens", step.observation_tokens or 0, 0)
    return words.draw(name, max(1, round(tokens * scale)) if tokens else 0)


def _at_least(name: str, value: int, least: int) -> int:
    _check(value >= least, f"{name} is {value}, wanted {least} or more.")
    return value


def _check(is_right: bool, message: str) -> None:
    if not is_right:
        raise ConfigError(message)
