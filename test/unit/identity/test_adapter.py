"""Which adapters may be served, as their folders say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.identity.adapter import read_adapter

ADAPTERS = Path(__file__).parents[3] / "examples" / "demo" / "adapters"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


def adapter(folder: Path, **changes: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
    return folder


@pytest.mark.parametrize("name", ["planner", "coder", "reviewer"])
def test_the_demos_adapters_are_served(name: str) -> None:
    assert read_adapter(name, ADAPTERS / name).rank == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', wanted LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "neither embeddings nor lm_head"),
        ({"target_modules": ["model.embed_tokens"]}, "neither embeddings nor lm_head"),
        ({"target_modules": "all-linear"}, "a list of products"),
        ({"target_modules": []}, "a list of products"),
        ({"target_modules": ["k_proj"]}, "k_proj without q_proj"),
        ({"target_modules": ["q_proj"]}, "q_proj without v_proj"),
        ({"target_modules": ["o_proj", "up_proj"]}, "up_proj without gate_proj"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 64}, "r is 64, and --max-lora-rank is 16"),
    ],
)
def test_what_sglang_would_serve_as_something_else_is_refused(tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        read_adapter("planner", adapter(tmp_path, **changes), max_rank=16)


@pytest.mark.parametrize(
    "targets", [["q_proj", "k_proj", "v_proj"], ["gate_proj"], ["o_proj"], ["layers.0.mlp.down_proj"]]
)
def test_products_of_any_kind_are_served(tmp_path: Path, targets: list[str]) -> None:
    assert read_adapter("planner", adapter(tmp_path, target_modules=targets, r=16), max_rank=16).rank == 16


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no adapter_config\.json"):
        read_adapter("planner", tmp_path)


def test_new_tokens_are_refused(tmp_path: Path) -> None:
    (adapter(tmp_path) / "added_tokens.json").write_text('{"<|new|>": 512}')
    with pytest.raises(ConfigError, match="adds tokens"):
        read_adapter("planner", tmp_path)
