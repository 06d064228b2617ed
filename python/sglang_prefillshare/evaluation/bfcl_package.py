"""The parts of the package `bfcl-eval` that a question's prompt and score need, imported without the rest.

The package's checker imports the handlers of every model on its leaderboard, with some 30 dependencies, for a single
lookup by model name; its modules create folders beside the package; and its decoder calls `eval` on arithmetic that a
model wrote. `bfcl_package` imports its own decoder, checker and prompt with each of the three answered: one entry
stands in for the table of models, the folders go to a place that is removed, and arithmetic is computed here, from
numbers and text alone. Nothing of the package is copied or changed on disk.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import operator
import os
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sglang_prefillshare.errors import ConfigError

PACKAGE: Final = "bfcl-eval"
VERSION: Final = "2026.3.23"
MODEL_NAME: Final = "prefillshare"
"""What the package's checker is told: a model whose function names keep their dots."""

_ROOT: Final = "bfcl_eval"
_FOLDERS_VARIABLE: Final = "BFCL_PROJECT_ROOT"
_LOCK: Final = threading.Lock()
"""Importing and silencing warnings change what all threads share."""

_LARGEST: Final = 10_000
"""Digits of a number, characters of a text: more is never a right answer, and can fill the memory."""


@dataclass(frozen=True, slots=True)
class BfclPackage:
    """The package's own functions.

    `decode(text, return_format)` and `check(functions, calls, ground_truth, language, split, model_name)` raise
    whatever they raise on odd answers. `with_prompt(messages, functions, question_id)` and `with_hint(functions,
    split)` change what they are given.
    """

    decode: Callable[..., Any]
    is_calls: Callable[[Any], bool]
    check: Callable[..., dict[str, Any]]
    languages: Any
    return_formats: Any
    with_prompt: Callable[..., list[dict[str, Any]]]
    with_hint: Callable[..., list[dict[str, Any]]]


def data_folder() -> Path:
    """Where the installed package keeps its questions. Raises `ConfigError` if it is not installed."""
    spec = importlib.util.find_spec(_ROOT)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the package {PACKAGE}, which carries BFCL's questions and scoring, is not installed. "
            "Install it: pip install --no-deps -r requirements/eval.txt"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


@functools.cache
def bfcl_package() -> BfclPackage:
    """Import the package's decoder, checker and prompt. Raises `ConfigError` where that cannot work."""
    data_folder()
    if not hasattr(ast, "NameConstant"):
        raise ConfigError(
            f"{PACKAGE} {VERSION} cannot decode answers on Python {sys.version_info[0]}.{sys.version_info[1]}: it uses "
            "names that ast has lost. Use Python 3.11 to 3.13."
        )
    with _LOCK, _without_the_rest():
        try:
            enums, utils, handler_utils, checker = (
                importlib.import_module(f"{_ROOT}.{name}")
                for name in ("constants.enums", "utils", "model_handler.utils", "eval_checker.ast_eval.ast_checker")
            )
        except ImportError as error:
            raise ConfigError(
                f"cannot import the scoring of {PACKAGE}: {error}. "
                "Install what it needs: pip install --no-deps -r requirements/eval.txt"
            ) from error
    handler_utils.eval = compute  # type: ignore[attr-defined]  # what its decoder calls by this name
    package = BfclPackage(
        decode=_quietly(handler_utils.default_decode_ast_prompting),
        is_calls=utils.is_function_calling_format_output,
        check=checker.ast_checker,
        languages=enums.Language,
        return_formats=enums.ReturnFormat,
        with_prompt=handler_utils.system_prompt_pre_processing_chat_model,
        with_hint=utils._func_doc_language_specific_pre_processing,
    )
    _check_that_nothing_runs(package)
    return package


def can_parse(language: str) -> bool:
    """Whether answers in this language can be decoded: all but Python needs tree-sitter and its grammar."""
    if language == "python":
        return True
    return all(importlib.util.find_spec(name) is not None for name in ("tree_sitter", f"tree_sitter_{language}"))


def compute(expression: str) -> Any:
    """The value of arithmetic on numbers and text. Raises `ValueError` for all else, which would have to be run."""
    return _compute(ast.parse(expression, mode="eval").body)


_OPERATORS: Final[dict[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _compute(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _compute(operand)
            return -value if isinstance(sign, ast.USub) else +value
        case ast.List(elts=items):
            return [_compute(item) for item in items]
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            return _apply(type(sign), _compute(left), _compute(right))
    raise ValueError(f"{ast.unparse(node)[:80]} would have to be run; only arithmetic on numbers and text is computed")


def _apply(sign: type[ast.operator], left: Any, right: Any) -> Any:
    are_numbers = all(isinstance(value, (int, float)) for value in (left, right))
    if not are_numbers and sign not in (ast.Add, ast.Mult):
        raise ValueError("text and lists can only be joined and repeated")
    size = 0.0  # of the result, in digits or items, from above
    if sign is ast.Pow:
        size = abs(right) * len(str(left))
    elif sign is ast.Mult and not are_numbers:
        count, items = (left, right) if isinstance(left, (int, float)) else (right, left)
        size = count * len(items) if isinstance(count, (int, float)) else 0.0
    if size > _LARGEST:
        raise ValueError(f"the value would have more than {_LARGEST} digits or items")
    value = _OPERATORS[sign](left, right)
    if isinstance(value, int) and value.bit_length() > 4 * _LARGEST:
        raise ValueError(f"the value has more than {_LARGEST} digits")
    return value


def _quietly(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Python warns of odd escapes and comparisons in what a model wrote: nobody can act on that."""

    def decode_quietly(text: str, return_format: Any) -> Any:
        with _LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return decode(text, return_format)

    return decode_quietly


def _check_that_nothing_runs(package: BfclPackage) -> None:
    """The decoder must compute with `compute`, and with nothing else: verified, not believed."""
    python = package.return_formats.PYTHON
    if package.decode("[f(x=2 * 3 + 1)]", python) != [{"f": {"x": 7}}]:
        raise ConfigError(f"{PACKAGE} does not decode arithmetic as version {VERSION} does. Install that version.")
    try:
        package.decode("[f(x=len('a') + 1)]", python)
    except ValueError:
        return
    raise ConfigError(f"{PACKAGE} would run what a model wrote while decoding it. Install version {VERSION}.")


@contextmanager
def _without_the_rest() -> Iterator[None]:
    """Stand-ins for the modules that scoring does not need, while the ones that it needs are imported."""
    models = types.ModuleType(f"{_ROOT}.constants.model_config")
    models.__dict__["MODEL_CONFIG_MAPPING"] = {MODEL_NAME: types.SimpleNamespace(underscore_to_dot=False)}
    stand_ins = [models]
    for language, short in (("java", "java"), ("javascript", "js")):
        if not can_parse(language):
            parser = types.ModuleType(f"{_ROOT}.model_handler.parser.{short}_parser")
            parser.__dict__[f"parse_{language}_function_call"] = functools.partial(_refuse_to_parse, language)
            stand_ins.append(parser)
    absent = [module for module in stand_ins if module.__name__ not in sys.modules]
    before = os.environ.get(_FOLDERS_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="prefillshare-bfcl-") as folder:
        os.environ[_FOLDERS_VARIABLE] = folder
        sys.modules.update({module.__name__: module for module in absent})
        try:
            yield
        finally:
            for module in absent:
                del sys.modules[module.__name__]
            if before is None:
                del os.environ[_FOLDERS_VARIABLE]
            else:
                os.environ[_FOLDERS_VARIABLE] = before


def _refuse_to_parse(language: str, source: str) -> Any:
    raise ConfigError(
        f"answers in {language} need tree-sitter to be scored. "
        f"Install it: pip install tree_sitter==0.21.3 tree-sitter-{language}"
    )
