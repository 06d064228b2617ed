"""Does an answer, as a chat template rendered it, hold all that its record says?

A template may leave out what it has no words for: tool calls, content beside tool calls, reasoning. The answer would
then be learned without them, the shortest as the end-of-turn mark alone. Texts must stand in the rendering, whatever
the template does to white space. Tool calls are written in many ways, and so are not looked for: each name and argument
is changed in turn, and a rendering that stays the same does not hold it. Renders nothing itself: `data.py` does.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

CONTENT: Final = "content"
REASONING: Final = "reasoning"
TOOL_CALLS: Final = "tool calls"

# Every name that data sets have for it; SGLang gives templates content, reasoning_content and tool_calls alone.
_TEXTS: Final = {
    "reasoning_content": REASONING,
    "reasoning": REASONING,
    "thinking": REASONING,
    "refusal": CONTENT,
    "content": CONTENT,
}
_OLD_CALL: Final = "function_call"
_MARK: Final = 918273640000

Path = tuple[str | int, ...]
Rerender = Callable[[list[dict[str, Any]]], str | None]


@dataclass(frozen=True, slots=True)
class Lost:
    """What a rendered answer lacks: content, reasoning or tool calls, and where in its message that stands."""

    kind: str
    place: str


def first_lost(
    said: Mapping[str, Any], calls: Sequence[dict[str, Any]], *, prompt: str, rendered: str, rerender: Rerender
) -> Lost | None:
    """The first thing that the message `said` and that `rendered`, what is learned of it, does not hold.

    `calls` are its tool calls as the template gets them. `rerender` renders the answer with other ones, up to the same
    end, or says `None` where the template refuses them. A text may begin in `prompt`, which opens the reasoning of
    some templates.
    """
    for key, kind in _TEXTS.items():
        value = said.get(key)
        if value and not (isinstance(value, str) and _holds(prompt, rendered, value)):
            return Lost(kind, key)
    if said.get(_OLD_CALL):
        return Lost(TOOL_CALLS, _OLD_CALL)
    path = _unread(calls, rendered, rerender)
    return None if path is None else Lost(TOOL_CALLS, _place(("tool_calls", *path)))


def until_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to and with the first of `stops`: serving never generates what stands behind it."""
    found = min(((text.find(stop), len(stop)) for stop in stops if stop in text), default=(0, len(text)))
    return text[: sum(found)]


def _holds(prompt: str, rendered: str, text: str) -> bool:
    answer = _squeezed(rendered)
    spellings = [_squeezed(spelling) for spelling in (text, _as_json(text), _as_json(text, ensure_ascii=True))]
    if any(spelling in answer for spelling in spellings):
        return True
    before = _squeezed(prompt)
    at = (before + answer).rfind(spellings[0])
    return at >= 0 and at + len(spellings[0]) > len(before)


def _squeezed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _as_json(text: str, *, ensure_ascii: bool = False) -> str:
    return json.dumps(text.strip(), ensure_ascii=ensure_ascii)[1:-1]


def _unread(calls: Sequence[dict[str, Any]], rendered: str, rerender: Rerender) -> Path | None:
    """The first name or argument of `calls` that a template does not look at.

    One rendering with a mark for each finds most of them. What it does not show (a switch has no mark, and a template
    may want a known name) is changed alone.
    """
    leaves = {path: value for path, value in _leaves(list(calls)) if path[1] == "function" and value is not None}
    marks = {path: mark for number, (path, value) in enumerate(leaves.items()) if (mark := _mark(value, number))}
    shown = (rerender(_changed(calls, marks)) or "") if marks else ""
    for path, value in leaves.items():
        if path in marks and str(marks[path]) in shown:
            continue
        if rerender(_changed(calls, {path: _other(value)})) == rendered:
            return path
    return None


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value without parts in `value`, depth first; the arguments of a call without any are none."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _leaves(item, (*path, key))
    if not items and path[2:] != ("arguments",):
        yield path, value


def _mark(value: Any, number: int) -> Any:
    """A value of the same type that stands nowhere else, and that is written alike everywhere; `None` for no such."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return f"mark{_MARK + number}" if isinstance(value, str) else type(value)(_MARK + number)


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {"mark": True}
    return ["mark"] if isinstance(value, list) else _mark(value, 0)


def _changed(value: Any, changes: Mapping[Path, Any], path: Path = ()) -> Any:
    if path in changes:
        return changes[path]
    if isinstance(value, dict):
        return {key: _changed(item, changes, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_changed(item, changes, (*path, index)) for index, item in enumerate(value)]
    return value


def _place(path: Path) -> str:
    """`tool_calls[1].function.name`"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
