"""A training recipe as frozen values, parsed once from one YAML file and `key.sub=value` overrides.

docs/training.md describes every key. Paths are looked up beside the recipe first, then in the working directory. What
a key means for Transformers is `trainer.py`'s to know, what is in the data `data.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from sglang_prefillshare.config import resolve_model
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.parsing import convert, kind_of, load_tree

_DATA_SUFFIXES: Final = (".jsonl", ".json")


def _check(name: str, value: object, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise ConfigError(f"{name} is {value!r}, wanted {wanted}.")


class RandomShare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """With probability `random`, an example's share is drawn uniformly from [0, 1); otherwise it is 1."""

    random: float

    def __post_init__(self) -> None:
        _check("random", self.random, 0 <= self.random <= 1, "a probability, 0 to 1")


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The adapter, in PEFT's words."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        _check("r", self.r, self.r >= 1, "1 or more")
        _check("alpha", self.alpha, self.alpha >= 1, "1 or more")
        _check("dropout", self.dropout, 0 <= self.dropout < 1, "0 or more, below 1")


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Records: a JSONL or JSON file, a folder that `datasets` saved, or a dataset's name on the hub."""

    path: str
    name: str | None = None
    split: str = "train"


class Columns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the columns are called in the data."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    tools: str = "tools"


class Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which records, and how they become token ids."""

    train: tuple[Source, ...]
    eval: tuple[Source, ...] = ()
    columns: Columns = Columns()
    max_length: int = 1024
    drop_invalid: bool = False
    append_eos: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    def __post_init__(self) -> None:
        _check("train", list(self.train), len(self.train) > 0, "one source or more")
        _check("max_length", self.max_length, self.max_length >= 3, "3 or more")


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Transformers' TrainingArguments by their own names, with the paper's values (App. A) where it states them."""

    learning_rate: float | None = None
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 16
    per_device_eval_batch_size: int = 4
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 0.0
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    seed: int = 42
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = 2
    report_to: str | tuple[str, ...] = "auto"
    extra: dict[str, Any] = {}

    def __post_init__(self) -> None:
        rate = self.learning_rate
        _check("learning_rate", rate, rate is None or rate > 0, "above 0")
        _check("num_train_epochs", self.num_train_epochs, self.num_train_epochs > 0, "above 0")
        _check("max_steps", self.max_steps, self.max_steps == -1 or self.max_steps > 0, "1 or more, or -1 for epochs")
        _check("warmup_ratio", self.warmup_ratio, 0 <= self.warmup_ratio < 1, "0 or more, below 1")
        _check("max_grad_norm", self.max_grad_norm, self.max_grad_norm >= 0, "0 (no clipping) or more")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size",
                     "logging_steps", "eval_steps", "save_steps", "save_total_limit"):  # fmt: skip
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, "1 or more")


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training run: which base, which method, which data, and where the decode module goes."""

    base: str
    output: str
    data: Data
    base_fingerprint: str | None = None
    tokenizer_path: str | None = None
    chat_template: str | None = None
    init: str | None = None
    method: Literal["prefillshare", "full-ft"] = "prefillshare"
    share: float | RandomShare = 1.0
    weights: Literal["full", "lora"] = "full"
    lora: Lora | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    training: Training = Training()
    resume: bool | str = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.share, RandomShare):
            _check("share", self.share, 0 <= self.share <= 1, "0 to 1, or {random: PROBABILITY}")
        if self.method == "full-ft" and self.share != 1.0:
            raise ConfigError(
                f"share is {self.share!r} with method full-ft, which has no base KV to share. Leave share out."
            )
        if self.weights == "full" and self.lora is not None:
            raise ConfigError("lora is given with weights: full. Set weights: lora, or leave lora out.")
        if self.weights == "lora" and self.init is not None:
            raise ConfigError(
                "init is given with weights: lora, whose adapter is a change of the base itself. Leave init out, or "
                "train full weights."
            )
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite contradict each other. Choose one.")

    @property
    def learning_rate(self) -> float:
        """The given one, else the middle of the paper's grid for full weights and its top for an adapter."""
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        return 1e-4 if self.weights == "lora" else 1e-5

    def to_json(self) -> dict[str, Any]:
        """Plain values, as result files store them."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file. Raises `ConfigError` naming file, line and key, or the override."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the recipe {path}: {reason}.") from error
    return parse_recipe(text, source=str(path), directory=path.parent, overrides=overrides)


def parse_recipe(text: str, *, source: str, directory: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Parse YAML `text`; `source` names it in errors."""
    tree, lines = load_tree(text, source)
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} is {kind_of(tree)}, wanted the keys base, output and data.")
    origins = {path: f"{source}:{line}" for path, line in lines.items()}
    for override in overrides:
        key = _apply(tree, override)
        origins[key] = f"override {override!r}"
    _expand_sources(tree)
    recipe = convert(tree, Recipe, origins=origins, source=source)
    try:
        return _resolve_paths(recipe, directory)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _apply(tree: dict[str, Any], override: str) -> str:
    """Set `key.sub=value` in `tree`; the value is YAML. Returns the key."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"override is {override!r}, wanted KEY=VALUE such as training.learning_rate=2e-5.")
    value, _ = load_tree(text, f"override {override!r}")
    at = tree
    for name in names[:-1]:
        inner = at.get(name)
        if inner is None:
            inner = at[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {name} is {kind_of(inner)} in the recipe, wanted a mapping.")
        at = inner
    at[names[-1]] = value
    return ".".join(names)


def _expand_sources(tree: dict[str, Any]) -> None:
    """`train: a.jsonl`, `train: {path: …}` and a list of either all become a list of mappings."""
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    for key in ("train", "eval"):
        if data.get(key) is None:
            data.pop(key, None)
            continue
        entries = data[key] if isinstance(data[key], list) else [data[key]]
        data[key] = [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


def _resolve_paths(recipe: Recipe, directory: Path) -> Recipe:
    models = {
        name: resolve_model(value, directory)
        for name in ("base", "init", "tokenizer_path")
        if (value := getattr(recipe, name)) is not None
    }
    output = Path(recipe.output).expanduser()
    if recipe.chat_template is not None:
        models["chat_template"] = _existing(recipe.chat_template, directory) or recipe.chat_template
    data = msgspec.structs.replace(
        recipe.data,
        train=tuple(_resolve_source(source, directory) for source in recipe.data.train),
        eval=tuple(_resolve_source(source, directory) for source in recipe.data.eval),
    )
    return msgspec.structs.replace(recipe, **models, output=str(output.resolve()), data=data)


def _resolve_source(source: Source, directory: Path) -> Source:
    path = _existing(source.path, directory)
    if path is not None:
        return msgspec.structs.replace(source, path=path)
    if source.path.endswith(_DATA_SUFFIXES) or source.path.startswith((".", "/", "~")):
        raise ConfigError(
            f"data file {source.path!r} does not exist, neither from {directory.resolve()} nor from the working "
            "directory. Give a JSONL file, a folder that `datasets` saved, or a dataset's name."
        )
    return source


def _existing(path: str, directory: Path) -> str | None:
    expanded = Path(path).expanduser()
    for candidate in (directory / expanded, expanded):
        if candidate.exists():
            return str(candidate.resolve())
    return None
