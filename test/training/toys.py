"""Small examples, recipes and data files for the tests of training."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sglang_prefillshare.training.loss import Example
from sglang_prefillshare.training.recipe import Recipe, parse_recipe
from test.support.models import SPECIAL_TOKENS, VOCAB_SIZE

LENGTHS = ((9, 4), (5, 7), (2, 1), (14, 3), (3, 2))
"""Prompt and response tokens of examples that need padding on every side."""

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs peft: pip install --no-deps -r requirements/train.txt"
)


def examples(share: float = 1.0, *, lengths: Sequence[tuple[int, int]] = LENGTHS, seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(seed)

    def tokens(count: int) -> Any:
        return generator.integers(len(SPECIAL_TOKENS), VOCAB_SIZE, count).astype(np.int32)

    return [Example(tokens(n), tokens(t), int(share * (n - 1))) for n, t in lengths]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sums(count: int) -> list[dict[str, str]]:
    """Records of unequal lengths."""
    return [
        {
            "prompt": f"{'What is ' * (1 + index % 3)}{index} and {index * 7 % 10}?",
            "completion": f" {index * 8}" * (1 + index % 4),
        }
        for index in range(count)
    ]


def recipe(folder: Path, base: Path, data: Path, *overrides: str) -> Recipe:
    text = f"""
base: {base}
output: {folder / "out"}
data: {{train: {data}}}
training:
  learning_rate: 1e-3
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  warmup_ratio: 0
  logging_steps: 1
  report_to: none
"""
    return parse_recipe(text, source="recipe", directory=folder, overrides=overrides)
