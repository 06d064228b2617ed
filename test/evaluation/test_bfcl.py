"""`evaluation/bfcl.py`: prompts, canonical answers and the package's own scoring."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.evaluation import bfcl, bfcl_package
from sglang_prefillshare.evaluation.bfcl import Question, canonical_answer, load_questions, messages, score

pytest.importorskip("bfcl_eval", reason="waits for the packages of requirements/eval.txt: run `make setup`")

COUNTS = {
    "simple_python": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200, "live_simple": 258,
    "live_multiple": 1053, "live_parallel": 16, "live_parallel_multiple": 24, "simple_java": 100,
    "simple_javascript": 50,
}  # fmt: skip
FAULTY = {"live_simple_106-63-0", "live_simple_112-68-0", "live_multiple_862-181-3", "live_multiple_964-207-0"}
"""Questions whose ground truth does not fit their own functions."""


def question(id: str = "simple_python_0") -> Question:
    return next(each for each in load_questions(id.rpartition("_")[0]) if each.id == id)


@pytest.mark.parametrize("split", COUNTS)
def test_every_split_is_read_with_its_ground_truth(split: str) -> None:
    questions = load_questions(split)
    assert len(questions) == COUNTS[split] and set(COUNTS) == set(bfcl.SPLITS)
    assert len({each.id for each in questions}) == len(questions)
    assert all(each.functions and each.ground_truth and each.messages for each in questions)
    assert load_questions(split, 3) == questions[:3]


@pytest.mark.parametrize("split", [split for split in COUNTS if split not in ("simple_java", "simple_javascript")])
def test_every_canonical_answer_scores_right(split: str) -> None:
    wrong = {each.id: score(each, canonical_answer(each)) for each in load_questions(split)}
    assert {id for id, verdict in wrong.items() if not verdict.is_right} <= FAULTY, wrong


def with_other_name(call: ast.Call) -> None:
    call.func = ast.Name(id="another_function")


def with_other_value(call: ast.Call) -> None:
    call.keywords[0].value = ast.Constant(value="no such value")


def with_unknown_argument(call: ast.Call) -> None:
    call.keywords.append(ast.keyword(arg="no_such_argument", value=ast.Constant(value=1)))


def without_first_argument(call: ast.Call) -> None:
    del call.keywords[0]


@pytest.mark.parametrize("damage", [with_other_name, with_other_value, with_unknown_argument, without_first_argument])
@pytest.mark.parametrize("split", ["simple_python", "multiple"])
def test_damaged_answers_score_wrong(split: str, damage: Callable[[ast.Call], None]) -> None:
    for each in load_questions(split):
        tree = ast.parse(canonical_answer(each), mode="eval")
        assert isinstance(tree.body, ast.List) and isinstance(tree.body.elts[0], ast.Call)
        if tree.body.elts[0].keywords:
            damage(tree.body.elts[0])
            verdict = score(each, ast.unparse(tree))
            assert not verdict.is_right and verdict.error and verdict.why, (each.id, ast.unparse(tree))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("The area is 25 square units.", "ast_decoder:decoder_failed"),
        ("", "simple_function_checker:wrong_count"),
        ("[calculate_triangle_area(base=10, height=5), calculate_triangle_area(base=10, height=5)]",
         "simple_function_checker:wrong_count"),
        ("[calculate_triangle_area(base=10)]", "simple_function_checker:missing_required"),
        ("[calculate_triangle_area(base='10', height=5)]", "type_error:simple"),
        ("[1, 2]", "ast_decoder:decoder_failed"),
        (f"[calculate_triangle_area(base=10, height={'(' * 300}5{')' * 300})]", "ast_decoder:decoder_failed"),
    ],
)  # fmt: skip
def test_errors_have_the_packages_names(answer: str, error: str) -> None:
    verdict = score(question(), answer)
    assert not verdict.is_right and verdict.error == error


@pytest.mark.parametrize(
    "answer",
    [
        "[calculate_triangle_area(base=10, height=5)]",
        "calculate_triangle_area(height=5, base=10)",
        "```\n[calculate_triangle_area(base=10, height=5, unit='units')]\n```",
        "[calculate_triangle_area(base=2 * 5, height=10 // 2)]",
    ],
)
def test_the_packages_leniency_is_kept(answer: str) -> None:
    assert score(question(), answer).is_right


def test_nothing_that_a_model_wrote_runs_while_it_is_scored(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for value in (
        f"open({str(mark)!r}, 'w').write('x') + 5",
        f"'' + __import__('os').popen('touch {mark}').read()",
        f"(lambda: open({str(mark)!r}, 'w'))() * 5",
        f"[open({str(mark)!r}, 'w')] * 5",
    ):
        assert score(question(), f"[calculate_triangle_area(base=10, height={value})]").error is not None
    assert not mark.exists()
    started = time.monotonic()
    for value in ("9 ** 9 ** 9 ** 9", "'x' * 10 ** 12", "[0] * 10 ** 12", "'%1000000000d' % 5", "2 ** -1 ** 0.5"):
        assert not score(question(), f"[calculate_triangle_area(base=10, height={value})]").is_right
    assert time.monotonic() - started < 2


def test_arithmetic_is_computed_as_python_does() -> None:
    for expression in ("2 * 3 + 1", "-7 // 2", "7 % 4 / 2", "2 ** 10", "'a' + 'b'", "[0] * 3", "3 * 'ab'", "10 ** -2"):
        assert bfcl_package.compute(expression) == eval(expression)
    for expression in ("x + 1", "f(1) + 1", "1 << 2", "'a' - 'b'", "[].append + 1", "2 ** 1000000"):
        with pytest.raises((ValueError, TypeError)):
            bfcl_package.compute(expression)


def test_the_full_prompt_is_the_benchmarks_own() -> None:
    from bfcl_eval.constants.default_prompts import PROMPT_STYLE_TEMPLATES

    asked = question("multiple_0")
    system, user = messages(asked, "full")
    assert system["role"] == "system" and user == dict(asked.messages[0])
    assert PROMPT_STYLE_TEMPLATES["classic"]["task"] in system["content"]
    documented = json.loads(system["content"][system["content"].index("[\n    {") :])
    assert [function["name"] for function in documented] == [function["name"] for function in asked.functions]
    assert documented[0]["description"].endswith("Note that the provided function is in Python 3 syntax.")
    assert messages(asked, "full") == [system, user], "a prompt must not change the question"


def test_the_compact_prompt_names_all_that_an_answer_needs() -> None:
    asked = question()
    system, user = messages(asked, "compact")
    assert system["content"].splitlines()[1:] == [
        "calculate_triangle_area(base: integer, height: integer, unit?: string) "
        "Calculate the area of a triangle given its base and height.",
        "- base: The base of the triangle.",
        "- height: The height of the triangle.",
        "- unit: The unit of measure (defaults to 'units' if not specified)",
    ]
    assert "[name(argument=value, ...)]" in system["content"] and user == dict(asked.messages[0])
    for each in load_questions("live_multiple", 100):
        text = messages(each, "compact")[0]["content"]
        for function in each.functions:
            assert function["name"] in text
            assert all(name in text for name in function["parameters"]["properties"])
    lengths: dict[bfcl.Style, list[int]] = {
        style: [len(json.dumps(messages(each, style))) for each in load_questions("simple_python")]
        for style in bfcl.STYLES
    }
    assert statistics.median(lengths["compact"]) < 0.4 * statistics.median(lengths["full"])


@pytest.mark.parametrize("style", bfcl.STYLES)
def test_a_system_message_of_the_question_is_kept(style: bfcl.Style) -> None:
    asked = replace(question(), messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "?"}])
    system, user = messages(asked, style)
    assert system["content"].endswith("\n\nBe kind.") and user["content"] == "?"


def test_types_are_told_in_a_few_words() -> None:
    schema: dict[str, Any] = {
        "name": "f",
        "description": "Does\n  it.",
        "parameters": {
            "properties": {
                "a": {"type": "array", "items": {"type": "array", "items": {"type": "float"}}},
                "b": {"type": "dict", "properties": {"x": {"type": "integer"}}, "description": "Where."},
                "c": {"type": "string", "enum": ["on", "off"]},
            },
            "required": ["a"],
        },
    }
    assert bfcl.describe_function(schema) == (
        "f(a: array of array of float, b?: dict {x: integer}, c?: string) Does it.\n"
        '- b: Where.\n- c: One of ["on", "off"].'
    )


def test_unknown_splits_and_styles_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no BFCL split 'simple_pyton' .* Did you mean simple_python\?"):
        load_questions("simple_pyton")
    with pytest.raises(ConfigError, match="Known are simple_python, multiple"):
        load_questions("irrelevance")
    with pytest.raises(ConfigError, match="style is 'tiny', wanted full or compact"):
        messages(question(), "tiny")  # type: ignore[arg-type]


def test_languages_without_a_parser_are_refused() -> None:
    if bfcl_package.can_parse("java"):
        pytest.skip("tree-sitter is installed here")
    with pytest.raises(ConfigError, match=r"need tree-sitter to be scored. Install it: pip install tree_sitter"):
        score(question("simple_java_0"), "[f(x=1)]")


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bfcl-eval.* is not installed. Install it: pip install --no-deps -r req"):
        load_questions("simple_python")


def test_importing_is_light_and_leaves_nothing_behind() -> None:
    """In a process of its own: no framework, no client of a model provider, no folder, no stand-in, no variable."""
    program = """
import os, sys
from sglang_prefillshare.evaluation import bfcl
questions = bfcl.load_questions("multiple", 2)
bfcl.messages(questions[0], "compact"), bfcl.canonical_answer(questions[0])
assert not any(name.startswith("bfcl_eval") for name in sys.modules)
assert bfcl.score(questions[0], bfcl.canonical_answer(questions[0])).is_right
bfcl.messages(questions[0], "full")
assert "bfcl_eval.constants.model_config" not in sys.modules and "BFCL_PROJECT_ROOT" not in os.environ
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "openai", "httpx", "numpy", "anthropic"} & set(done.stdout.split())
    beside = bfcl_package.data_folder().parents[1]
    assert not [name for name in ("result", "score", ".file_locks") if (beside / name).exists()]
