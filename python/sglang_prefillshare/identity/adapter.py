"""A decode module that is a LoRA adapter: what its folder says, and whether it can be served beside others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.identity.canonical import read_json_object

CONFIG_FILE: Final = "adapter_config.json"

_EMBEDDING: Final = ("embed_tokens", "lm_head", "wte", "word_embeddings")
_MERGE: Final = "Merge it into the base's weights (`prefillshare merge`) and serve it as a decode worker."


@dataclass(frozen=True, slots=True)
class Adapter:
    """A module's name, its folder and the rank of its largest product."""

    name: str
    folder: Path
    rank: int


def read_adapter(name: str, folder: str | Path, *, max_rank: int | None = None) -> Adapter:
    """Raise `ConfigError` for a folder without an adapter, and for one that SGLang would serve as something else.

    SGLang adds (alpha / r) B A x to products and nothing else, and reads no other word of `adapter_config.json`.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{name}={folder}: there is no {CONFIG_FILE}. Give the folder of a LoRA adapter.")
    config = read_json_object(path)
    for key, is_served, wanted in _SERVED:
        found = config.get(key)
        if not is_served(found):
            raise ConfigError(f"{path}: {key} is {found!r}, wanted {wanted}: SGLang serves nothing else. {_MERGE}")
    _check_parts({name.rpartition(".")[2] for name in config["target_modules"]}, path)
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"{path}: r is {rank!r}, wanted a whole number from 1 on.")
    if max_rank is not None and rank > max_rank:
        raise ConfigError(f"{path}: r is {rank}, and --max-lora-rank is {max_rank}. Raise it, or leave it out.")
    added = Path(folder) / "added_tokens.json"
    if added.exists() and read_json_object(added):
        raise ConfigError(f"{added}: it adds tokens to the vocabulary, which the base does not know. {_MERGE}")
    return Adapter(name, Path(folder), rank)


def _check_parts(targets: set[str], path: Path) -> None:
    """SGLang computes q, k and v in one product, and so gate and up; the first of each must be there."""
    for part, others in (("q_proj", {"k_proj", "v_proj"}), ("v_proj", {"q_proj"}), ("gate_proj", {"up_proj"})):
        if part not in targets and (found := targets & others):
            raise ConfigError(
                f"{path}: target_modules has {', '.join(sorted(found))} without {part}, which SGLang adds in one "
                f"product. Train with {part} as well. {_MERGE}"
            )


def _is_absent(value: Any) -> bool:
    return value is None or value is False or value == "none" or (isinstance(value, Mapping | list) and not value)


def _are_products(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(name, str) and name.rpartition(".")[2] not in _EMBEDDING for name in value)
    )


_SERVED: Final[tuple[tuple[str, Callable[[Any], bool], str], ...]] = (
    ("peft_type", lambda value: value == "LORA", "LORA"),
    ("target_modules", _are_products, "a list of products, neither embeddings nor lm_head"),
    *(
        (key, _is_absent, "none")
        for key in (
            *("modules_to_save", "bias", "lora_bias", "use_dora", "use_rslora", "use_qalora", "use_bdlora"),
            *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication", "target_parameters"),
            *("trainable_token_indices", "alora_invocation_tokens", "arrow_config"),
        )
    ),
)
"""Key of the configuration, whether a value is served, and what is."""
