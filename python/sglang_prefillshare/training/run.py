"""`prefillshare train`: from a recipe to a decode module's folder.

Everything that can be refused is refused before the first step: the base's identity, the data, the arguments, the
output folder. What is written at the end is an ordinary checkpoint (or PEFT adapter) that a decode worker takes.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang_prefillshare import __version__
from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.files import write_json
from sglang_prefillshare.identity.canonical import read_json_object
from sglang_prefillshare.identity.fingerprint import BaseIdentity, check_tokenizer, identify_base, read_config
from sglang_prefillshare.identity.folder import locate_model
from sglang_prefillshare.identity.geometry import check_same_geometry
from sglang_prefillshare.identity.manifest import FILE_NAME, Manifest, write_manifest
from sglang_prefillshare.training.data import ExampleSet, Prepared, prepare
from sglang_prefillshare.training.folder import copy_tokenizer, finish_checkpoint, stored_dtype
from sglang_prefillshare.training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from sglang_prefillshare.training.trainer import BaseSource, CacheConditionedTrainer

RECORD: Final = "training.json"
"""In the output folder: the recipe that ran, what it ran on, and what came out."""

_FREE_ON_RESUME: Final = frozenset(
    {
        "output", "resume", "overwrite", "base", "init", "tokenizer_path", "chat_template",
        "training.logging_steps", "training.eval_steps", "training.save_steps", "training.save_total_limit",
        "training.report_to", "training.per_device_eval_batch_size", "data.eval",
    }
)  # fmt: skip
"""Keys that may change between a run and its continuation. Base and data are compared by content instead."""


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What a run did. `metrics` are the Trainer's last ones, losses per response token. `is_main` is true in one of
    several processes, the one that should tell."""

    output: Path
    method: str
    weights: str
    base_fingerprint: str
    steps: int
    examples: int
    dropped: int
    seconds: float
    metrics: dict[str, float]
    manifest: Path | None
    is_main: bool = True

    def describe(self) -> str:
        losses = ", ".join(
            f"{name} {self.metrics[name]:.4f}" for name in ("train_loss", "eval_loss") if name in self.metrics
        )
        kind = "adapter" if self.weights == "lora" else "checkpoint"
        lines = [
            f"{self.output}: {kind}, {self.method}, {self.steps} steps on {self.examples} examples in "
            f"{self.seconds:.0f} s; {losses}"
        ]
        if self.dropped:
            lines.append(f"dropped {self.dropped} examples that cannot be learned from")
        if self.manifest is None:
            lines.append(f"no {FILE_NAME}: method {self.method} does not learn to read the base's KV")
        elif self.weights == "lora":
            lines.append(f"to serve it: prefillshare merge {self.output} FOLDER")
        else:
            lines.append(f"trained on {self.base_fingerprint}; serve it as a decode module of that base")
        return "\n".join(lines)


def train(recipe_path: Path | str, overrides: Sequence[str] = ()) -> TrainSummary:
    """Run a recipe file with `key.sub=value` overrides; see `train_recipe`."""
    return train_recipe(load_recipe(recipe_path, overrides))


def train_recipe(recipe: Recipe) -> TrainSummary:
    """Train as `recipe` says and write the module. Call it in every process that `accelerate launch` starts.

    Raises `ConfigError` or `IdentityError` before the first step for all that is known to be wrong by then. The base's
    weights are never changed.
    """
    _check_installed()
    from transformers import AutoTokenizer, set_seed

    from sglang_prefillshare.training.trainer import checkpoint_folder, find_checkpoint, training_arguments

    started = time.monotonic()
    args = training_arguments(recipe, has_eval=bool(recipe.data.eval))
    checkpoint = find_checkpoint(recipe)
    with args.main_process_first(local=False, desc="base identity"):
        # The digest of the weights is remembered, so the other processes read it and not the weights.
        identity = identify_base(recipe.base, tokenizer_path=recipe.tokenizer_path, chat_template=recipe.chat_template)
    _check_base(recipe, identity)
    if args.process_index == 0 and checkpoint is None:
        _check_output(recipe, checkpoint_folder(recipe))
    tokenizer = AutoTokenizer.from_pretrained(locate_model(recipe.tokenizer_path or recipe.base))
    if recipe.chat_template is not None:
        tokenizer.chat_template = read_template(recipe.chat_template)
    stops = read_stop_ids(recipe.init or recipe.base)
    train_set = prepare(recipe.data.train, recipe.data, tokenizer, stop_ids=stops)
    eval_set = prepare(recipe.data.eval, recipe.data, tokenizer, stop_ids=stops) if recipe.data.eval else None
    record = _record(recipe, identity, train_set, eval_set)
    is_main = args.process_index == 0
    if is_main and checkpoint is not None:
        _check_same_run(checkpoint_folder(recipe) / RECORD, record)
    set_seed(recipe.training.seed)  # before an adapter draws its first weights
    trainer = build_trainer(recipe, args, train_set, eval_set, pad_id=padding_id(tokenizer))
    if is_main:
        if checkpoint is None:
            _claim_output(recipe, checkpoint_folder(recipe))
            write_json(checkpoint_folder(recipe) / RECORD, record)
        _say(_opening(recipe, identity, train_set, eval_set))
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = {name: float(value) for name, value in result.metrics.items()}
    metrics |= _last_evaluation(trainer.state.log_history)
    manifest = _finish(recipe, trainer, identity)
    summary = TrainSummary(
        output=Path(recipe.output),
        method=recipe.method,
        weights=recipe.weights,
        base_fingerprint=identity.model_fingerprint,
        steps=trainer.state.global_step,
        examples=len(train_set.examples),
        dropped=train_set.dropped.total,
        seconds=time.monotonic() - started,
        metrics=metrics,
        manifest=manifest,
        is_main=is_main,
    )
    if args.world_size > 1:
        trainer.accelerator.end_training()
    if is_main:
        outcome = {"steps": summary.steps, "seconds": round(summary.seconds, 1), "metrics": metrics}
        write_json(Path(recipe.output) / RECORD, {**record, "result": outcome, "log": trainer.state.log_history})
    return summary


def build_trainer(
    recipe: Recipe, args: Any, train_set: Prepared, eval_set: Prepared | None, *, pad_id: int
) -> CacheConditionedTrainer:
    """Load the models and put them into a trainer. With full weights and method prefillshare there are two."""
    from sglang_prefillshare.training.loss import check_plain_attention, keep_prefix_under_checkpointing
    from sglang_prefillshare.training.trainer import CacheConditionedTrainer

    compute = "bfloat16" if args.bf16 else "float32"
    # Weights that change are kept in float32, frozen ones in what they are computed in.
    dtype = recipe.dtype or ("float32" if recipe.weights == "full" else compute)
    module = load_model(recipe.init or recipe.base, dtype)
    limit = getattr(module.config, "max_position_embeddings", None)
    if limit is not None and recipe.data.max_length > limit:
        raise ConfigError(
            f"data.max_length is {recipe.data.max_length}, the base has {limit} positions. Lower data.max_length."
        )
    base: BaseSource | None = None
    share = 0.0 if recipe.method == "full-ft" else recipe.share
    if recipe.method == "prefillshare":
        check_plain_attention(module.config)
    if recipe.weights == "lora":
        module = add_adapter(module, recipe)
    if recipe.training.gradient_checkpointing and recipe.method == "prefillshare":
        keep_prefix_under_checkpointing(module)
    if recipe.method == "prefillshare":
        base = _base_source(recipe, args, "bfloat16" if args.bf16 else dtype)
    seed = recipe.training.seed
    return CacheConditionedTrainer(
        model=module,
        args=args,
        base=base,
        train_dataset=ExampleSet(train_set.examples, share=share, seed=seed),
        eval_dataset=(
            None
            if eval_set is None
            else ExampleSet(eval_set.examples, share=0.0 if recipe.method == "full-ft" else 1.0, seed=seed)
        ),
        pad_id=pad_id,
    )


def load_model(path: str, dtype: str) -> Any:
    """A causal language model in `dtype`, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(locate_model(path), dtype=getattr(torch, dtype))


def add_adapter(module: Any, recipe: Recipe) -> Any:
    """`module` with a fresh LoRA adapter (PEFT); its own weights are frozen."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(
            "weights is lora, and the package peft is not installed. "
            "Install it: pip install --no-deps -r requirements/train.txt"
        ) from error
    from sglang_prefillshare.training.recipe import Lora

    lora = recipe.lora or Lora()
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        adapted = get_peft_model(module, config)
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error
    # What PEFT writes down as the adapter's base: a path that still means something from another folder.
    adapted.peft_config["default"].base_model_name_or_path = recipe.base
    return adapted


def _base_source(recipe: Recipe, args: Any, dtype: str) -> BaseSource:
    from sglang_prefillshare.training.trainer import frozen_copy, without_adapter

    if recipe.weights == "lora":
        from accelerate.utils import extract_model_from_parallel

        return without_adapter(extract_model_from_parallel)
    base = load_model(recipe.base, dtype).requires_grad_(False).eval().to(args.device)
    return frozen_copy(base)


def _check_installed() -> None:
    missing = [name for name in ("torch", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"training needs {', '.join(missing)}, which this environment lacks. "
            "Run `make setup`, or install the extra: pip install 'sglang-prefillshare[train]'"
        )


def _check_base(recipe: Recipe, identity: BaseIdentity) -> None:
    found = identity.model_fingerprint
    if recipe.base_fingerprint is not None and recipe.base_fingerprint != found:
        raise IdentityError(
            f"base {recipe.base} is {found}, base_fingerprint says {recipe.base_fingerprint}. "
            "Give the base that was named, or its own fingerprint (prefillshare identity show MODEL)."
        )
    if locate_model(recipe.base).is_file():
        raise ConfigError(f"base {recipe.base} is a GGUF file, wanted a folder. Convert it to a checkpoint first.")
    if recipe.init is not None:
        check_same_geometry(read_config(recipe.base), read_config(recipe.init))
        if recipe.tokenizer_path is None:
            check_tokenizer(recipe.init, identity, chat_template=recipe.chat_template)


def _finish(recipe: Recipe, trainer: CacheConditionedTrainer, identity: BaseIdentity) -> Path | None:
    """Write the module into the output folder; returns its manifest's path, `None` for a method that reads no base."""
    import torch

    output = Path(recipe.output)
    start = locate_model(recipe.init or recipe.base)
    if trainer.args.process_index == 0:
        (output / FILE_NAME).unlink(missing_ok=True)  # of an earlier end: a manifest stands beside whole weights only
    if recipe.weights == "full":
        trainer.save_dtype = getattr(torch, stored_dtype(start))
    trainer.save_model(str(output))
    if trainer.args.process_index != 0:
        return output / FILE_NAME if recipe.method == "prefillshare" else None
    (output / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing of ours reads
    copy_tokenizer(locate_model(recipe.tokenizer_path or recipe.base), output, chat_template=recipe.chat_template)
    if recipe.weights == "full":
        finish_checkpoint(start, output)
    if recipe.method != "prefillshare":
        return None
    check_tokenizer(output, identity, chat_template=recipe.chat_template)
    return write_manifest(output, Manifest.for_base(recipe.base, identity))


def _check_output(recipe: Recipe, checkpoints: Path) -> None:
    """Raise unless the output folder holds no files, or those of a run that may be replaced."""
    output = Path(recipe.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file, wanted a folder.")
    if not any(path.is_file() for path in output.rglob("*")):
        return
    if not recipe.overwrite:
        raise ConfigError(
            f"output {output} is not empty. Continue its run with resume=true, replace it with overwrite=true, or "
            "name another folder."
        )
    if not ((output / RECORD).is_file() or (checkpoints / RECORD).is_file()):
        raise ConfigError(
            f"output {output} was not written by a training run ({RECORD} is missing), so overwrite leaves it "
            "alone. Name another folder."
        )
    needed = [recipe.base, recipe.init, *(source.path for source in (*recipe.data.train, *recipe.data.eval))]
    for path in needed:
        if path is not None and Path(path).resolve().is_relative_to(output.resolve()):
            raise ConfigError(f"overwrite would remove {path}, which this run reads. Name another output.")


def _claim_output(recipe: Recipe, checkpoints: Path) -> None:
    """An output folder without files. Called when nothing is left that could refuse the run."""
    _check_output(recipe, checkpoints)
    if recipe.overwrite:
        shutil.rmtree(recipe.output, ignore_errors=True)
    checkpoints.mkdir(parents=True, exist_ok=True)


def _record(recipe: Recipe, identity: BaseIdentity, train_set: Prepared, eval_set: Prepared | None) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "created_by": f"sglang-prefillshare {__version__}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "recipe": recipe.to_json(),
        "base_fingerprint": identity.model_fingerprint,
        "data": {
            name: {
                "examples": len(part.examples),
                "prompt_tokens": part.prompt_tokens,
                "response_tokens": part.response_tokens,
                "dropped": dict(part.dropped.counts),
                "digest": part.digest,
            }
            for name, part in (("train", train_set), ("eval", eval_set))
            if part is not None
        },
    }


def _check_same_run(path: Path, now: dict[str, Any]) -> None:
    """Raise unless `now` continues the run recorded at `path`: the same base, data, method and schedule."""
    if not path.is_file():
        raise ConfigError(f"resume: {path} is missing, so nothing says what this run was. Start anew.")
    before = read_json_object(path)
    if before.get("base_fingerprint") != now["base_fingerprint"]:
        raise IdentityError(
            f"resume: the run began on base {before.get('base_fingerprint')}, this base is {now['base_fingerprint']}. "
            "Give the base it began with, or start anew."
        )
    if before.get("data", {}).get("train", {}).get("digest") != now["data"]["train"]["digest"]:
        raise ConfigError("resume: the training data is not that of the run so far. Give the same, or start anew.")
    old, new = _flat(before.get("recipe", {})), _flat(now["recipe"])
    changed = sorted(
        key
        for key in old.keys() | new.keys()
        if old.get(key) != new.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in _FREE_ON_RESUME)
        and not key.startswith("data.train")
    )
    if changed:
        told = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
        raise ConfigError(f"resume would not continue the same run: {told}. Set them back, or start anew.")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def _last_evaluation(log: Sequence[dict[str, Any]]) -> dict[str, float]:
    found = [entry for entry in log if "eval_loss" in entry]
    return {key: float(value) for key, value in found[-1].items() if key.startswith("eval_")} if found else {}


def read_stop_ids(model: str) -> set[int]:
    """The tokens at which serving stops: `eos_token_id` in config.json and generation_config.json."""
    folder = locate_model(model)
    stops: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            value = read_json_object(folder / name).get("eos_token_id")
            stops |= {value} if isinstance(value, int) else set(value or ())
    return stops


def padding_id(tokenizer: Any) -> int:
    """Any token will do: padded positions are masked, and have no label."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def read_template(chat_template: str) -> str:
    """The text of a Jinja file. Raises `ConfigError` for a template that Transformers cannot render."""
    path = Path(chat_template)
    if not path.is_file() or path.suffix == ".json":
        raise ConfigError(
            f"chat_template is {chat_template!r}, wanted a Jinja file. Built-in names and SGLang's own JSON format "
            "cannot be trained with: write the template down as Jinja, and serve with that file."
        )
    return path.read_text(encoding="utf-8")


def _opening(recipe: Recipe, identity: BaseIdentity, train_set: Prepared, eval_set: Prepared | None) -> str:
    prompts, responses = train_set.prompt_tokens, train_set.response_tokens
    lines = [
        f"base     {recipe.base} ({identity.model_fingerprint})",
        f"method   {recipe.method}, {recipe.weights} weights, share {recipe.share}"
        if recipe.method == "prefillshare"
        else f"method   {recipe.method}, {recipe.weights} weights",
        f"data     {len(train_set.examples)} examples, {prompts} prompt tokens, {responses} response tokens",
    ]
    if eval_set is not None:
        lines.append(f"eval     {len(eval_set.examples)} examples, {eval_set.response_tokens} response tokens")
    for name, part in (("train", train_set), ("eval", eval_set)):
        if part is not None and part.dropped.total:
            lines.append(f"dropped  {part.dropped.total} of {name}: {part.dropped.describe()}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
