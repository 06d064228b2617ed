"""The benchmarks as tasks that look alike: what is asked, how, and what is right."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.evaluation import bfcl, bfcl_package, humaneval
from sglang_prefillshare.evaluation.answers import Answer, Ask
from sglang_prefillshare.evaluation.sandbox import check_sandbox
from sglang_prefillshare.evaluation.verdict import Verdict

HUMANEVAL: Final = "humaneval"
DEFAULT_TASKS: Final = ("bfcl-simple-python", "bfcl-multiple", HUMANEVAL)
"""Those of the paper's Table 1 that a package carries."""

_SPLITS: Final = {f"bfcl-{split.replace('_', '-')}": split for split in bfcl.SPLITS}
TASKS: Final = (*_SPLITS, HUMANEVAL)
MAX_NEW_TOKENS: Final = {HUMANEVAL: 512}
_CALL_TOKENS: Final = 256


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark, or the first questions of it. `judge(place, text)` is about the question asked at that place."""

    name: str
    scoring: str
    prompts: str
    asks: Sequence[Ask]
    judge: Callable[[int, str], Verdict]

    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Of every answer, in order. What got no answer is wrong, and its error is `no_answer`."""

        def judge(place: int) -> Verdict:
            answer = answers[place]
            if answer.text is None:
                return Verdict(False, "no_answer", answer.error)
            return self.judge(place, answer.text)

        # The processes of the sandbox do the work, a thread waits for each.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(judge, range(len(answers))))


def check_names(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a task that does not exist, or is named twice."""
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(TASKS)}."
            raise ConfigError(f"there is no task {name!r}. {hint}")
    if len(set(names)) != len(names):
        raise ConfigError(f"tasks is {', '.join(names)}, wanted each only once.")


def load_task(
    name: str,
    *,
    style: bfcl.Style = "full",
    form: humaneval.Form = "chat",
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> Task:
    """The first `limit` questions of a task. `style` is about BFCL's prompts, `form` about HumanEval's.

    Raises `ConfigError` where its package is missing, `SandboxError` where its answers could not be run.
    """
    check_names([name])
    tokens = max_new_tokens or MAX_NEW_TOKENS.get(name, _CALL_TOKENS)
    if name == HUMANEVAL:
        problems = humaneval.load_problems(limit)
        check_sandbox()
        asks = [
            Ask(problem.task_id, humaneval.messages(problem), tokens)
            if form == "chat"
            else Ask(problem.task_id, humaneval.text_prompt(problem), tokens, humaneval.STOPS)
            for problem in problems
        ]
        return Task(
            name, f"pass@1 with the tests of {humaneval.PACKAGE}", form, asks,
            lambda place, text: humaneval.check(problems[place], text, form),
        )  # fmt: skip
    questions = bfcl.load_questions(_SPLITS[name], limit)
    bfcl_package.bfcl_package()
    asks = [Ask(question.id, bfcl.messages(question, style), tokens) for question in questions]
    scoring = f"AST checker of {bfcl_package.PACKAGE} {bfcl_package.VERSION}"
    return Task(name, scoring, style, asks, functools.partial(_score, questions))


def _score(questions: Sequence[bfcl.Question], place: int, text: str) -> Verdict:
    return bfcl.score(questions[place], text)
