"""Transformers' Trainer with the cache-conditioned loss: what is multiplied, counted and switched off around eq. 7.

Accumulation, schedules, checkpoints, resuming, logging and several processes are the Trainer's own. Owns the
translation of a recipe into TrainingArguments, and the two ways to a base: a frozen second copy for full weights, the
same weights with the adapter switched off for LoRA.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import get_last_checkpoint

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.training.data import ExampleSet
from sglang_prefillshare.training.loss import (
    IGNORED,
    BasePrefix,
    Batch,
    base_prefill,
    collate,
    response_logits,
    token_losses,
)
from sglang_prefillshare.training.recipe import Recipe

BaseSource = Callable[[Any], AbstractContextManager[Any]]
"""From the model that the Trainer calls, to the model that computes the base's KV while the context is entered."""

_OURS: Final = {
    "output_dir": "output",
    "eval_strategy": "data.eval and training.eval_steps",
    "save_strategy": "training.save_steps",
    "logging_strategy": "training.logging_steps",
    "warmup_steps": "training.warmup_ratio",
    "label_smoothing_factor": "nothing: it is not supported",
    "use_liger_kernel": "nothing: it is not supported",
    "remove_unused_columns": "nothing: batches have columns of their own",
    "prediction_loss_only": "nothing: losses are summed per example",
    "batch_eval_metrics": "nothing: losses are summed per example",
    "dataloader_persistent_workers": "nothing: workers learn the epoch when they start",
    "eval_do_concat_batches": "nothing: losses are summed over the whole evaluation",
    "include_for_metrics": "nothing: metrics are made of losses alone",
    "train_sampling_strategy": "nothing: examples are drawn at random",
    "use_cache": "nothing: the decode module's cache is the base's",
    "gradient_checkpointing_kwargs": "nothing: recomputation must be non-reentrant",
    "resume_from_checkpoint": "resume",
}
"""TrainingArguments that cannot go into `training.extra`, and the key that decides each instead."""


def training_arguments(recipe: Recipe, *, has_eval: bool) -> TrainingArguments:
    """The recipe as TrainingArguments. Raises `ConfigError` for an argument that does not exist or cannot work."""
    training = recipe.training
    is_bf16 = _choose_bf16(training.bf16)
    evaluation: dict[str, Any] = {"eval_strategy": "no"}
    if has_eval:
        evaluation = {"eval_strategy": "epoch" if training.eval_steps is None else "steps"}
        evaluation |= {} if training.eval_steps is None else {"eval_steps": training.eval_steps}
    saving: dict[str, Any] = {"save_strategy": "epoch" if training.save_steps is None else "steps"}
    saving |= {} if training.save_steps is None else {"save_steps": training.save_steps}
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoint_folder(recipe)),
        "learning_rate": recipe.learning_rate,
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_ratio,  # below 1 it is a ratio
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "max_grad_norm": training.max_grad_norm,
        "bf16": is_bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": training.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
        "seed": training.seed,
        "logging_strategy": "steps",
        "logging_steps": training.logging_steps,
        "save_total_limit": training.save_total_limit,
        "report_to": _reporters(training.report_to),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "average_tokens_across_devices": True,
        **evaluation,
        **saving,
    }
    _check_extra(training.extra, arguments)
    try:
        built = TrainingArguments(**{**arguments, **training.extra})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"training: Transformers refuses these arguments: {error}") from error
    # In one process with several GPUs the Trainer would copy the module to each with DataParallel, which cannot carry
    # the base's KV. Several GPUs are several processes.
    built._n_gpu = min(built.n_gpu, 1)
    return built


def checkpoint_folder(recipe: Recipe) -> Path:
    """Where checkpoints and TensorBoard's events go. The folder above holds nothing but the finished module."""
    return Path(recipe.output) / "checkpoints"


def find_checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint that the recipe resumes from; `None` where it starts anew."""
    if recipe.resume is False:
        return None
    folder = checkpoint_folder(recipe)
    if isinstance(recipe.resume, str):
        if not (Path(recipe.resume) / "trainer_state.json").is_file():
            raise ConfigError(
                f"resume is {recipe.resume!r}, which is no checkpoint. Give a checkpoint's folder, or true."
            )
        return recipe.resume
    found: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise ConfigError(f"resume is true, and {folder} holds no checkpoint. Leave resume out to start anew.")
    return found


def frozen_copy(base: Any) -> BaseSource:
    """A base of its own, for a module whose weights all change."""
    return lambda _: nullcontext(base)


def without_adapter(unwrap: Callable[[Any], Any] = lambda model: model) -> BaseSource:
    """The module itself with its adapter switched off: the base without a second copy of its weights."""

    @contextmanager
    def base_of(model: Any) -> Iterator[Any]:
        with unwrap(model).disable_adapter():
            yield model

    return base_of


class CacheConditionedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is eq. 7. `base` is `None` for ordinary fine-tuning (method full-ft)."""

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        base: BaseSource | None,
        train_dataset: ExampleSet | None = None,
        eval_dataset: ExampleSet | None = None,
        pad_id: int = 0,
        save_dtype: torch.dtype | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        # Every process must run the base as often as the others where its weights are spread over them.
        min_context = 1 if base is not None and args.world_size > 1 else 0
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda examples: collate(examples, pad_id=pad_id, min_context=min_context),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=mean_losses,
            callbacks=[*callbacks, _TellEpoch(train_dataset)] if train_dataset is not None else list(callbacks),
        )
        self.base = base
        self.save_dtype = save_dtype
        # The loss below is divided by the response tokens of the whole accumulated batch, over all processes.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Eq. 7 of one micro-batch as its part of the mean over `num_items_in_batch` response tokens."""
        assert not return_outputs and num_items_in_batch is not None
        prefix = self.base_prefix(model, inputs)
        total = token_losses(response_logits(model, inputs, prefix), inputs["labels"]).sum()
        # Gradients are averaged over processes, and each holds a part of one sum.
        return total * self.accelerator.num_processes / num_items_in_batch

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Per example: the sum of its token losses, its tokens, and those that greedy decoding would have chosen."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            logits = response_logits(model, inputs, self.base_prefix(model, inputs))
            labels = inputs["labels"]
            rows = torch.stack(
                [
                    token_losses(logits, labels).sum(dim=1),
                    labels.ne(IGNORED).sum(dim=1).float(),
                    (logits.argmax(dim=-1) == labels).sum(dim=1).float(),
                ],
                dim=1,
            )
        return None, rows, rows[:, 1:2]

    def base_prefix(self, model: Any, inputs: Batch) -> BasePrefix | None:
        """C_base of a batch, from whatever is the base of `model`."""
        if self.base is None:
            return None
        with self.base(model) as base:
            return base_prefill(base, inputs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save in `save_dtype`, where one is set. Tied weights stay one tensor."""
        if self.save_dtype is not None:
            whole = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
            state_dict = _cast(whole, self.save_dtype)
        super()._save(output_dir, state_dict)


class _TellEpoch(TrainerCallback):  # type: ignore[misc]
    """Tells the training set which epoch begins, since shares are drawn per epoch."""

    def __init__(self, examples: ExampleSet) -> None:
        self._examples = examples

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._examples.set_epoch(int((state.epoch or 0) + 1e-6))


def mean_losses(prediction: EvalPrediction) -> dict[str, float]:
    """Means over all response tokens of an evaluation, however they were batched."""
    rows = np.asarray(prediction.predictions, dtype=np.float64)
    losses, tokens, right = rows.sum(axis=0)
    exact = float(np.mean(rows[:, 2] == rows[:, 1]))
    return {"loss": losses / tokens, "token_accuracy": right / tokens, "exact_match": exact}


def _cast(state: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    done: dict[tuple[int, torch.Size], torch.Tensor] = {}
    cast: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            key = (value.data_ptr(), value.shape)
            value = done.setdefault(key, value.to(dtype))
        cast[name] = value
    return cast


def _choose_bf16(wanted: bool | None) -> bool:
    if wanted is not None:
        return wanted
    return bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported())


def _reporters(report_to: str | Sequence[str]) -> list[str]:
    has_tensorboard = importlib.util.find_spec("tensorboard") is not None
    if report_to == "auto":
        return ["tensorboard"] if has_tensorboard else []
    if report_to == "none":
        return []
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"training.report_to names {name}, wanted auto, none or some of {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
    if "tensorboard" in names and not has_tensorboard:
        raise ConfigError(
            "training.report_to names tensorboard, which is not installed. "
            "Install it: pip install --no-deps -r requirements/train.txt"
        )
    return names


def _check_extra(extra: dict[str, Any], arguments: dict[str, Any]) -> None:
    known = {field.name for field in fields(TrainingArguments)}
    for name in extra:
        if name in _OURS:
            raise ConfigError(f"training.extra sets {name}, which is decided by {_OURS[name]}. Remove it.")
        if name in arguments:
            raise ConfigError(f"training.extra sets {name}, which is a key of training itself. Set training.{name}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else "See TrainingArguments in Transformers."
            raise ConfigError(f"training.extra has {name}, which TrainingArguments does not know. {hint}")
