"""BFCL's questions with one turn: prompts, one canonical answer to each, and the benchmark's own score.

    for question in load_questions("live_simple"):
        question.functions, question.ground_truth      # as the benchmark has them
        messages(question, "compact")                  # for a chat template
        canonical_answer(question)                     # "[name(argument=value)]", which scores right
        score(question, "[name(argument=1)]")          # Verdict(is_right, error, why)

Questions come from the installed package `bfcl-eval`; only `score` and the style "full" import code of it. Answers are
in the benchmark's prompting form, text that its AST decoder reads. A module that is trained on splits other than
`simple_python` and `multiple` can be measured on these two: `prefillshare eval tasks`.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.evaluation.bfcl_package import (
    MODEL_NAME,
    PACKAGE,
    bfcl_package,
    can_parse,
    data_folder,
)
from sglang_prefillshare.evaluation.verdict import Verdict

Style: TypeAlias = Literal["full", "compact"]

STYLES: Final[tuple[Style, ...]] = ("full", "compact")
SPLITS: Final = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple", "live_parallel",
    "live_parallel_multiple", "simple_java", "simple_javascript",
)  # fmt: skip
"""The splits with one turn and acceptable answers. The first two are those of the paper's Table 1."""

_FILE: Final = "BFCL_v4_{split}.json"
_INSTRUCTION: Final = (
    "Answer with function calls only, as [name(argument=value, ...)] with Python values. "
    "Leave out optional arguments (?) that the question does not ask for."
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `messages` are the benchmark's own, without any function in them.

    `ground_truth` has a call for each that is wanted, as {name: {argument: [acceptable values]}}; "" among the values
    says that the argument may be left out.
    """

    id: str
    split: str
    messages: Sequence[Mapping[str, Any]]
    functions: Sequence[Mapping[str, Any]]
    ground_truth: Sequence[Mapping[str, Mapping[str, Sequence[Any]]]]

    @property
    def language(self) -> str:
        """`python`, `java` or `javascript`."""
        return {"simple_java": "java", "simple_javascript": "javascript"}.get(self.split, "python")


def load_questions(split: str, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a split, in the benchmark's order.

    Raises `ConfigError` for a split without acceptable answers, and where the package is not installed.
    """
    if split not in SPLITS:
        close = difflib.get_close_matches(split, SPLITS, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(SPLITS)}."
        raise ConfigError(f"there is no BFCL split {split!r} that can be scored. {hint}")
    folder = data_folder()
    truths = {entry["id"]: entry["ground_truth"] for entry in _read(folder / "possible_answer", split)}
    questions = [
        Question(entry["id"], split, entry["question"][0], entry["function"], truths[entry["id"]])
        for entry in _read(folder, split)
    ]
    return questions[:limit]


def messages(question: Question, style: Style = "full") -> list[dict[str, Any]]:
    """The conversation that asks `question`: a system message with the functions, then the benchmark's messages.

    `full` is the benchmark's default prompt, made by the package's own code. `compact` is ours, for small models with
    little context: a line of instruction, then a line for each function and for each of its arguments.
    """
    asked = copy.deepcopy([dict(message) for message in question.messages])
    functions = copy.deepcopy([dict(function) for function in question.functions])
    if style == "full":
        package = bfcl_package()
        return package.with_prompt(asked, package.with_hint(functions, question.split), question.id)
    if style != "compact":
        raise ConfigError(f"style is {style!r}, wanted {' or '.join(STYLES)}.")
    system = "\n".join([_INSTRUCTION, *(describe_function(function) for function in functions)])
    if asked and asked[0]["role"] == "system":
        asked[0]["content"] = f"{system}\n\n{asked[0]['content']}"
        return asked
    return [{"role": "system", "content": system}, *asked]


def describe_function(function: Mapping[str, Any]) -> str:
    """A function as text: `name(argument: type, other?: type) what it does`, then a line for each argument."""
    parameters = function["parameters"]
    properties: Mapping[str, Any] = parameters.get("properties", {})
    required = parameters.get("required", ())
    signature = ", ".join(
        f"{name}{'' if name in required else '?'}: {_type(schema)}" for name, schema in properties.items()
    )
    lines = [f"{function['name']}({signature}) {_one_line(function.get('description', ''))}".rstrip()]
    for name, schema in properties.items():
        told = _one_line(schema.get("description", ""))
        if schema.get("enum"):
            told += f" One of {json.dumps(schema['enum'], ensure_ascii=False)}."
        if told.strip():
            lines.append(f"- {name}: {told.strip()}")
    return "\n".join(lines)


def canonical_answer(question: Question) -> str:
    """One answer that scores right: the first acceptable value of every argument that may not be left out.

    What may be left out is, in the values of dictionaries too. It scores wrong for four live questions, whose ground
    truth does not fit their own functions, and where Java wants its own way to write a list, a map or a long number:
    ask `score`. Raises `ConfigError` where the ground truth calls a function that the question does not offer.
    """
    documented = {function["name"]: function for function in question.functions}
    calls = []
    for call in question.ground_truth:
        for name, arguments in call.items():
            if name not in documented:
                raise ConfigError(f"{question.id}: the ground truth calls {name}, which the question does not offer.")
            parameters = documented[name]["parameters"]
            required = parameters.get("required", ())
            given = [
                f"{argument}={_literal(_chosen(values), parameters['properties'].get(argument, {}), question.language)}"
                for argument, values in arguments.items()
                if "" not in values or argument in required
            ]
            calls.append(f"{name}({', '.join(given)})")
    return f"[{', '.join(calls)}]"


def score(question: Question, answer: str) -> Verdict:
    """Decode and check an answer as the benchmark does.

    Where the benchmark would stop on an answer that its checker cannot read, the answer is wrong. Arithmetic in an
    argument is computed from numbers and text; the benchmark evaluates, that is runs, whatever stands there.
    """
    if not can_parse(question.language):
        raise ConfigError(
            f"answers in {question.language} need tree-sitter to be scored. "
            f"Install it: pip install tree_sitter==0.21.3 tree-sitter-{question.language}"
        )
    package = bfcl_package()
    try:
        calls = package.decode(answer, package.return_formats(question.language))
    except Exception as error:  # a model may write anything, and decoding it may raise anything
        return Verdict(False, "ast_decoder:decoder_failed", _one_line(f"{type(error).__name__}: {error}")[:300])
    if not package.is_calls(calls):
        return Verdict(False, "ast_decoder:decoder_wrong_output_format", _one_line(repr(calls))[:300])
    try:
        found = package.check(
            copy.deepcopy(list(question.functions)),
            calls,
            copy.deepcopy(list(question.ground_truth)),
            package.languages(question.language),
            question.split,
            MODEL_NAME,
        )
    except Exception as error:  # the checker indexes into what was decoded
        return Verdict(False, "ast_checker:raised", _one_line(f"{type(error).__name__}: {error}")[:300])
    if found["valid"]:
        return Verdict(True)
    return Verdict(False, str(found["error_type"]), _one_line(" ".join(map(str, found["error"])))[:300])


def _read(folder: Any, split: str) -> list[dict[str, Any]]:
    path = folder / _FILE.format(split=split)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}. Install {PACKAGE} again.") from error
    return [json.loads(line) for line in lines if line.strip()]


def _type(schema: Mapping[str, Any]) -> str:
    """A type in a word or two: `array of float`, `dict {from: string}`."""
    name = str(schema.get("type", "any"))
    items, properties = schema.get("items"), schema.get("properties")
    if isinstance(items, Mapping):
        return f"{name} of {_type(items)}"
    if isinstance(properties, Mapping) and properties:
        inner = ", ".join(f"{key}: {_type(value)}" for key, value in properties.items())
        return f"{name} {{{inner}}}"
    return name


def _chosen(values: Sequence[Any]) -> Any:
    """The first acceptable value with something in it, "" only where there is no other."""
    return _plain(next((value for value in values if value != ""), ""))


def _plain(value: Any) -> Any:
    """A value without alternatives: those of a dictionary are lists of acceptable ones, however deep it stands."""
    if isinstance(value, dict):
        return {
            key: _chosen(inner) if isinstance(inner, list) else inner
            for key, inner in value.items()
            if not (isinstance(inner, list) and "" in inner)
        }
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _literal(value: Any, schema: Mapping[str, Any], language: str) -> str:
    """A value as the language writes it. The ground truth has Java's and JavaScript's as text, often as source."""
    if language == "python":
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if schema.get("type") == "String" else value
    return json.dumps(value, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())
