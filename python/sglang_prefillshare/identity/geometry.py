"""Whether a decode module can read a base's KV at all: the settings that decide its layout and its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sglang_prefillshare.errors import IdentityError

_PLAIN_FIELDS: Final = (
    "model_type", "num_hidden_layers", "vocab_size",
    # Latent attention (DeepSeek): the cached vector is made of these.
    "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    # Which layers attend how far, or keep state of another kind.
    "attention_chunk_size", "sliding_window_pattern", "no_rope_layers", "no_rope_layer_interval",
    "num_kv_shared_layers", "full_attention_interval", "attn_layer_indices", "hybrid_override_pattern",
)  # fmt: skip


def kv_geometry(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that decide KV layout and meaning, with the defaults that Transformers fills in."""
    nested = config.get("text_config") or config.get("llm_config")
    if isinstance(nested, Mapping):  # a multimodal model: its language part owns the KV
        config = nested
    heads = config.get("num_attention_heads")
    head_dim = config.get("head_dim")
    if head_dim is None and isinstance(heads, int) and heads and isinstance(config.get("hidden_size"), int):
        head_dim = config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads")
    geometry = {name: config.get(name) for name in _PLAIN_FIELDS}
    geometry["num_key_value_heads"] = heads if kv_heads is None else kv_heads
    geometry["head_dim"] = head_dim
    geometry["sliding_window"] = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    layer_types = config.get("layer_types")
    geometry["layer_types"] = None if set(layer_types or ()) <= {"full_attention"} else layer_types
    geometry["rope"] = _rope(config)
    return geometry


def check_same_geometry(base_config: Mapping[str, Any], module_config: Mapping[str, Any]) -> None:
    """Raise `IdentityError` naming the first field in which a decode module cannot read the base's KV.

    Both arguments are parsed config.json files.
    """
    base, module = kv_geometry(base_config), kv_geometry(module_config)
    for name, wanted in base.items():
        if module[name] != wanted:
            raise IdentityError(
                f"the decode module cannot read the base's KV: its {name} is {module[name]!r}, the base has "
                f"{wanted!r}. Fine-tune the module from this base, or serve it with its own prefill."
            )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in one form: Transformers 4 wrote rope_theta beside rope_scaling, 5 writes rope_parameters."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if rope and all(isinstance(value, Mapping) for value in rope.values()):  # per layer type
        return {kind: _rope_settings(config, dict(value)) for kind, value in rope.items()}
    return _rope_settings(config, rope)


def _rope_settings(config: Mapping[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    legacy_type = rope.pop("type", None)
    rope.setdefault("rope_type", legacy_type or "default")
    theta = config.get("rope_theta")
    rope.setdefault("rope_theta", 10000.0 if theta is None else theta)
    partial = config.get("partial_rotary_factor")
    rope.setdefault("partial_rotary_factor", 1.0 if partial is None else partial)
    local_theta = config.get("rope_local_base_freq")
    if local_theta is not None:
        rope.setdefault("rope_local_base_freq", local_theta)
    return {key: value for key, value in rope.items() if value is not None}
