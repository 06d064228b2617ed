from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3Config

from sglang_prefillshare.errors import IdentityError
from sglang_prefillshare.identity.geometry import check_same_geometry
from test.unit.identity.tiny import CONFIG

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model_type", {"model_type": "qwen3"}),
        ("num_hidden_layers", {"num_hidden_layers": 3}),
        ("num_key_value_heads", {"num_key_value_heads": 4}),
        ("head_dim", {"head_dim": 4}),
        ("head_dim", {"hidden_size": 16}),
        ("vocab_size", {"vocab_size": 6}),
        ("rope", {"rope_theta": 500000.0}),
        ("rope", {"rope_scaling": LLAMA3_ROPE}),
        ("rope", {"partial_rotary_factor": 0.5}),
        ("sliding_window", {"sliding_window": 128}),
        ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("kv_lora_rank", {"kv_lora_rank": 512}),
    ],
)
def test_a_differing_field_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(IdentityError, match=rf"its {field} is .* the base has .*Fine-tune the module from this base"):
        check_same_geometry(CONFIG, CONFIG | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 2},
        {"rope_scaling": None, "rope_theta": 10000},
        {"layer_types": ["full_attention", "full_attention"], "sliding_window": None},
        {"sliding_window": 128, "use_sliding_window": False},
        {"intermediate_size": 99, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
    ],
)
def test_what_does_not_decide_kv_may_differ(changes: dict[str, Any]) -> None:
    check_same_geometry(CONFIG, CONFIG | changes)


def test_without_kv_heads_every_head_has_its_own() -> None:
    plain = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    check_same_geometry(plain, CONFIG | {"num_key_value_heads": CONFIG["num_attention_heads"]})
    with pytest.raises(IdentityError, match="its num_key_value_heads is 2, the base has 4"):
        check_same_geometry(plain, CONFIG)


def test_rope_settings_of_transformers_4_and_5_are_compared_alike() -> None:
    four = CONFIG | {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    five = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    five |= {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear", "factor": 2.0}}
    check_same_geometry(four, five)
    with pytest.raises(IdentityError, match="its rope is"):
        check_same_geometry(four, five | {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}})


def test_a_multimodal_model_is_compared_by_its_language_part() -> None:
    check_same_geometry(CONFIG, {"model_type": "vlm", "text_config": CONFIG})


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_a_config_saved_again_by_transformers_is_the_same(kind: type) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    # As an older release wrote it: without head_dim, rope_parameters and layer_types.
    older = {"model_type": kind.model_type, "vocab_size": 100, "rope_theta": 10000.0, "head_dim": 16, **sizes}
    check_same_geometry(older, kind(**older).to_dict())
