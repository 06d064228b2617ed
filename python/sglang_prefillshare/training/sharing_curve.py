"""`prefillshare eval sharing-curve`: accuracy against the share of prompt KV that is the base's (paper, Figure 2).

Owns the three forms of the result: table, JSON, plot. Which modules may be measured on which base, and loading them, is
`modules.py`'s; how a question is answered is `evaluate.py`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sglang_prefillshare import __version__
from sglang_prefillshare.environment import describe_environment
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.files import write_json
from sglang_prefillshare.training.modules import DTYPES, open_modules

if TYPE_CHECKING:
    from sglang_prefillshare.training.evaluate import Evaluator, TaskSet

SHARES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Those of the paper's Figure 2."""


@dataclass(frozen=True, slots=True)
class CurveConfig:
    """What to measure. `modules` are folders or hub ids by the name that table and plot give them.

    `base` is the one that the modules name unless given. `tokenizer_path` and `chat_template` are as workers are given
    them. `dtype` is float32 on a CPU, else bfloat16, unless given.
    """

    modules: Mapping[str, str]
    tasks: str
    base: str | None = None
    shares: tuple[float, ...] = SHARES
    batch_size: int = 16
    limit: int | None = None
    append_eos: bool = True
    tokenizer_path: str | None = None
    chat_template: str | None = None
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.modules:
            raise ConfigError("no decode module is given. Name one folder or more.")
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise ConfigError(f"shares is {self.shares!r}, wanted one number or more from 0 to 1.")
        if len(set(self.shares)) != len(self.shares):
            raise ConfigError(f"shares is {self.shares!r}, wanted each only once.")
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError(f"batch_size is {self.batch_size} and limit {self.limit}, wanted 1 or more.")
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype is {self.dtype!r}, wanted float32, bfloat16 or float16.")


@dataclass(frozen=True, slots=True)
class ModuleCurve:
    """One module's answers: for each share, which questions it got right. `names_base`: a manifest names this base."""

    name: str
    kind: str
    names_base: bool
    right: Sequence[Sequence[bool]]

    @property
    def counts(self) -> list[int]:
        return [sum(answers) for answers in self.right]

    @property
    def accuracy(self) -> list[float]:
        return [sum(answers) / len(answers) for answers in self.right]


@dataclass(frozen=True, slots=True)
class SharingCurve:
    """Accuracy by share, for every module, on the same questions and the same base KV."""

    config: CurveConfig
    base: str
    base_fingerprint: str
    device: str
    dtype: str
    scoring: str
    question_count: int
    prompt_tokens: int
    modules: Sequence[ModuleCurve]
    seconds: float
    environment: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The whole result; each question's outcome is a character, 1 for right, in the order of the task file."""
        return {
            "question": "How does accuracy depend on the share of the prompt's KV that the base computed?",
            "created_by": f"sglang-prefillshare {__version__}",
            **self.environment,
            "config": asdict(self.config) | {"base": self.base, "dtype": self.dtype},
            "base_fingerprint": self.base_fingerprint,
            "scoring": self.scoring,
            "questions": self.question_count,
            "prompt_tokens": self.prompt_tokens,
            "shares": list(self.config.shares),
            "accuracy": {module.name: module.accuracy for module in self.modules},
            "modules": {
                module.name: {
                    "path": self.config.modules[module.name],
                    "kind": module.kind,
                    "names_base": module.names_base,
                    "right": module.counts,
                    "interval_95": [list(wilson_interval(n, self.question_count)) for n in module.counts],
                    "outcomes": ["".join("01"[is_right] for is_right in answers) for answers in module.right],
                }
                for module in self.modules
            },
            "seconds": round(self.seconds, 1),
        }

    def table(self) -> Table:
        """A row for every share, a column for every module: accuracy, and how many were right."""
        caption = f"{self.question_count} questions, {self.scoring.replace('_', ' ')}, {self.dtype} on {self.device}"
        table = Table(title=f"Accuracy on {Path(self.config.tasks).name}", caption=caption)
        table.add_column("base KV", justify="right")
        for module in self.modules:
            table.add_column(module.name, justify="right")
        for place, share in enumerate(self.config.shares):
            cells = [f"{module.accuracy[place]:.1%} ({module.counts[place]})" for module in self.modules]
            table.add_row(f"{share:.0%}", *cells)
        return table

    def draw(self, target: Path) -> None:
        """The picture, with 95% intervals. Raises `ImportError` where matplotlib is not installed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        panel = figure.add_subplot()
        shares = [100 * share for share in self.config.shares]
        for module in self.modules:
            intervals = [wilson_interval(n, self.question_count) for n in module.counts]
            low, high = ([100 * bounds[end] for bounds in intervals] for end in (0, 1))
            (line,) = panel.plot(shares, [100 * value for value in module.accuracy], marker="o", label=module.name)
            panel.fill_between(shares, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        label_panel(panel, shares)
        panel.set_title(f"{Path(self.config.tasks).name}, {self.question_count} questions")
        panel.legend(frameon=False)
        figure.savefig(target, dpi=120)


def measure(
    config: CurveConfig, *, on_progress: Callable[[str, float, int, int], object] = lambda *_: None
) -> SharingCurve:
    """Load base and modules, and answer every question at every share.

    `on_progress` is told the module's name, the share, how many more questions are done, and how many there are. Raises
    `ConfigError` for files and folders that do not fit, `IdentityError` for a module of another base.
    """
    from sglang_prefillshare.training.evaluate import read_tasks

    started = time.monotonic()
    opened = open_modules(
        config.modules,
        base=config.base,
        tokenizer_path=config.tokenizer_path,
        chat_template=config.chat_template,
        device=config.device,
        dtype=config.dtype,
    )
    tasks = read_tasks(
        config.tasks,
        opened.tokenizer,
        stop_ids=opened.stop_ids,
        append_eos=config.append_eos,
        limit=config.limit,
        max_length=opened.max_positions,
    )
    curves = []
    for name, evaluator in opened.evaluators(config.batch_size):
        right = [_answers(evaluator, tasks, name, share, on_progress) for share in config.shares]
        curves.append(ModuleCurve(name, opened.kind(name), opened.names_base[name], right))
    return SharingCurve(
        config=config,
        base=opened.base,
        base_fingerprint=opened.identity.model_fingerprint,
        device=opened.device,
        dtype=opened.dtype,
        scoring=tasks.scoring,
        question_count=len(tasks.questions),
        prompt_tokens=sum(len(question.prompt) for question in tasks.questions),
        modules=curves,
        seconds=time.monotonic() - started,
        environment=describe_environment(("torch", "transformers", "peft"), device=opened.device),
    )


def sharing_curve(config: CurveConfig, out: Path, *, console: Console | None = None) -> SharingCurve:
    """`measure`, then print the table and write curve.json and curve.png into `out`. Progress goes to stderr.

    Without matplotlib there is no picture, and a line says so.
    """
    console = console or Console()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def tell(name: str, share: float, done: int, total: int) -> None:
            total *= len(config.modules) * len(config.shares)
            progress.update(task, description=f"{name}, {share:.0%} base KV", advance=done, total=total)

        curve = measure(config, on_progress=tell)
    console.print(curve.table())
    target = out / "curve.json"
    write_json(target, curve.to_json())
    console.print(f"written to {target}", soft_wrap=True, highlight=False)
    try:
        curve.draw(out / "curve.png")
        console.print(f"drawn in {out / 'curve.png'}", soft_wrap=True, highlight=False)
    except ImportError as error:
        console.print(f"not drawn: {error}. Install it: pip install matplotlib", soft_wrap=True, highlight=False)
    return curve


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share that was found as `right` of `total` (Wilson's, which holds near 0 and 1 too)."""
    z = 1.96
    share, spread = right / total, z * z / total
    centre = share + spread / 2
    reach = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (centre - reach) / (1 + spread)), min(1.0, (centre + reach) / (1 + spread))


def label_panel(panel: Any, shares: Sequence[float]) -> None:
    """The axes of Figure 2: per cent of base KV, per cent of right answers."""
    panel.set_xticks(shares, [f"{share:g}" for share in shares])
    panel.set_xlabel("prompt KV from the base, %")
    panel.set_ylabel("accuracy, %")
    panel.set_ylim(-3, 103)
    panel.grid(alpha=0.25)


def _answers(
    evaluator: Evaluator, tasks: TaskSet, name: str, share: float, on_progress: Callable[[str, float, int, int], object]
) -> list[bool]:
    def tell(done: int) -> None:
        on_progress(name, share, done, len(tasks.questions))

    return evaluator.answers_right(tasks, share=share, on_progress=tell)
