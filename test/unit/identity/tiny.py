"""The smallest folder that identity takes for a whole model, and ways to change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 4, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True},
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3}, "merges": [["a", "b"]]},
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "_name_or_path": "somewhere",
}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "model.embed_tokens.weight": random.standard_normal((5, 8), dtype=np.float32),
        "model.layers.0.self_attn.k_proj.weight": random.standard_normal((4, 8), dtype=np.float32),
        "model.layers.0.self_attn.v_proj.weight": random.standard_normal((4, 8), dtype=np.float32),
        "model.layers.1.mlp.up_proj.weight": random.standard_normal((16, 8)).astype(np.float16),
        "model.norm.weight": np.ones(8, dtype=np.float32),
    }


def write_json(path: Path, value: Any, **style: Any) -> None:
    path.write_text(json.dumps(value, **style))


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def write_model(folder: Path) -> Path:
    """The smallest folder that identity takes for a whole model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(), folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer.json", TOKENIZER)
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages }}"})
    return folder
