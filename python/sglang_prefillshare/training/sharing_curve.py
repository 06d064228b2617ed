"""`prefillshare eval sharing-curve`: accuracy against the share of prompt KV that is the base's (paper, Figure 2).

Owns which modules may be measured on which base, loading them, and the three forms of the result: table, JSON, plot.
How a question is answered is `evaluate.py`'s.
"""

from __future__ import annotations

import json
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
from sglang_prefillshare.errors import ConfigError, IdentityError, PrefillShareError
from sglang_prefillshare.identity.canonical import read_json_object, replace_file
from sglang_prefillshare.identity.fingerprint import BaseIdentity, check_tokenizer, identify_base, read_config
from sglang_prefillshare.identity.folder import locate_model
from sglang_prefillshare.identity.geometry import check_same_geometry
from sglang_prefillshare.identity.manifest import check_manifest, read_manifest

if TYPE_CHECKING:
    from sglang_prefillshare.training.evaluate import TaskSet
    from sglang_prefillshare.training.trainer import BaseSource

SHARES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Those of the paper's Figure 2."""

_ADAPTER: Final = "adapter_config.json"


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
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype is {self.dtype!r}, wanted float32, bfloat16 or float16.")


def named_modules(entries: Sequence[str]) -> dict[str, str]:
    """Modules by name from `NAME=MODULE` or `MODULE`, which is then called as its folder is."""
    modules: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or Path(entry).exists():
            name, path = Path(entry).name or entry, entry
        if not name or not path or name in modules:
            found = f"a second {name!r}" if name in modules else repr(entry)
            raise ConfigError(f"modules has {found}, wanted MODULE or NAME=MODULE, each name only once.")
        modules[name] = path
    return modules


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

    def to_json(self) -> dict[str, Any]:
        """The whole result; each question's outcome is a character, 1 for right, in the order of the task file."""
        return {
            "question": "How does accuracy depend on the share of the prompt's KV that the base computed?",
            "created_by": f"sglang-prefillshare {__version__}",
            **describe_environment(("torch", "transformers", "peft"), device=self.device),
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
    import torch
    from transformers import AutoTokenizer

    from sglang_prefillshare.training.evaluate import Evaluator, read_tasks
    from sglang_prefillshare.training.loss import check_plain_attention
    from sglang_prefillshare.training.run import load_model, padding_id, read_stop_ids, read_template

    started = time.monotonic()
    folders = {name: _module_folder(path) for name, path in config.modules.items()}
    base_path = config.base or _named_base(folders)
    try:
        is_gguf = locate_model(base_path).is_file()
    except ConfigError as error:
        if config.base is not None:
            raise
        raise ConfigError(f"a module names its base: {error} If it lies elsewhere now, give it with --base.") from error
    if is_gguf:
        raise ConfigError(f"base {base_path} is a GGUF file, wanted a folder. Convert it to a checkpoint first.")
    identity = identify_base(base_path, tokenizer_path=config.tokenizer_path, chat_template=config.chat_template)
    names_base = {name: _check_module(folder, base_path, identity, config=config) for name, folder in folders.items()}
    tokenizer = AutoTokenizer.from_pretrained(locate_model(config.tokenizer_path or base_path))
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    device = config.device or str(torch.accelerator.current_accelerator() or "cpu")
    dtype = config.dtype or ("float32" if device.startswith("cpu") else "bfloat16")
    stop_ids = frozenset[int]().union(
        *(read_stop_ids(str(path)) for path in (locate_model(base_path), *_whole(folders)))
    )
    tasks = read_tasks(
        config.tasks,
        tokenizer,
        stop_ids=stop_ids,
        append_eos=config.append_eos,
        limit=config.limit,
        max_length=read_config(base_path).get("max_position_embeddings"),
    )
    base: Any = load_model(base_path, dtype).requires_grad_(False).eval().to(device)
    check_plain_attention(base.config)
    curves = []
    for name, folder in folders.items():
        module, source = _load(folder, base, lambda: load_model(base_path, dtype).to(device), dtype)
        evaluator = Evaluator(module.to(device).eval(), source, config.batch_size, padding_id(tokenizer))
        right = [_answers(evaluator, tasks, name, share, on_progress) for share in config.shares]
        curves.append(ModuleCurve(name, "adapter" if _is_adapter(folder) else "full", names_base[name], right))
    return SharingCurve(
        config=config,
        base=base_path,
        base_fingerprint=identity.model_fingerprint,
        device=device,
        dtype=dtype,
        scoring=tasks.scoring,
        question_count=len(tasks.questions),
        prompt_tokens=sum(len(question.prompt) for question in tasks.questions),
        modules=curves,
        seconds=time.monotonic() - started,
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
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(target, json.dumps(curve.to_json(), indent=2) + "\n")
    except OSError as error:
        raise PrefillShareError(f"cannot write {target}: {error.strerror or error}. Check the folder.") from error
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
    evaluator: Any, tasks: TaskSet, name: str, share: float, on_progress: Callable[[str, float, int, int], object]
) -> list[bool]:
    def tell(done: int) -> None:
        on_progress(name, share, done, len(tasks.questions))

    right: list[bool] = evaluator.answers_right(tasks, share=share, on_progress=tell)
    return right


def _module_folder(path: str) -> Path:
    folder = locate_model(path)
    if not ((folder / _ADAPTER).is_file() or (folder / "config.json").is_file()):
        raise ConfigError(
            f"{path} has neither config.json nor {_ADAPTER}. Give the folder of a decode module or of an adapter."
        )
    return folder


def _is_adapter(folder: Path) -> bool:
    return (folder / _ADAPTER).is_file()


def _whole(folders: Mapping[str, Path]) -> list[Path]:
    return [folder for folder in folders.values() if not _is_adapter(folder)]


def _named_base(folders: Mapping[str, Path]) -> str:
    """The base that the first module which names one was trained on, as far as it can be found under that name."""
    for folder in folders.values():
        manifest = read_manifest(folder)
        if manifest is not None:
            return manifest.base
        if _is_adapter(folder):
            named = read_json_object(folder / _ADAPTER).get("base_model_name_or_path")
            if isinstance(named, str) and named:
                return named
    raise ConfigError(f"{', '.join(folders)}: no module names its base. Give it with --base.")


def _check_module(folder: Path, base: str, identity: BaseIdentity, *, config: CurveConfig) -> bool:
    """Raise unless the module can read this base's KV. True where its manifest says that it was trained to.

    One without a manifest may be measured: that is the paper's naive sharing.
    """
    if not _is_adapter(folder):
        check_same_geometry(read_config(base), read_config(folder))
    manifest = read_manifest(folder)
    if manifest is not None:
        check_manifest(manifest, identity, module=str(folder))
    if config.tokenizer_path is None and any(folder.glob("tokenizer*")):
        check_tokenizer(folder, identity, chat_template=config.chat_template)
    return manifest is not None


def _load(folder: Path, base: Any, fresh_base: Callable[[], Any], dtype: str) -> tuple[Any, BaseSource]:
    """A module, and the way from it to its base: the one that is loaded, or itself without its adapter."""
    from sglang_prefillshare.training.run import load_model
    from sglang_prefillshare.training.trainer import frozen_copy, without_adapter

    if not _is_adapter(folder):
        return load_model(str(folder), dtype), frozen_copy(base)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(
            f"{folder} is an adapter, and the package peft is not installed. "
            "Install it: pip install --no-deps -r requirements/train.txt"
        ) from error
    try:
        return PeftModel.from_pretrained(fresh_base(), folder), without_adapter()
    except (RuntimeError, ValueError) as error:
        raise IdentityError(
            f"adapter {folder} does not fit the base: {str(error).splitlines()[0]} "
            "Give the base it was trained on with --base."
        ) from error
