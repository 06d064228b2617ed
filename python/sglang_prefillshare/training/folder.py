"""The files of a decode module's folder that training does not change: they are the base's, copied as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.identity.canonical import read_json_object

_TOKENIZER_FILES: Final = (
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "tekken.json", "*.tiktoken", "tiktoken.model", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


def copy_tokenizer(source: Path, folder: Path, *, chat_template: str | None = None) -> None:
    """Copy the tokenizer's files from `source`, so that both sides of a handoff read the same tokens.

    A `chat_template` file takes the place of the tokenizer's own template.
    """
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    if chat_template is not None:
        shutil.copyfile(chat_template, folder / "chat_template.jinja")


def finish_checkpoint(start: Path, folder: Path) -> None:
    """Give a saved checkpoint the configuration files of the one it started from: the architecture is the same."""
    for name in ("config.json", "generation_config.json"):
        if (start / name).is_file():
            shutil.copyfile(start / name, folder / name)


def stored_dtype(folder: Path) -> str:
    """The dtype that a checkpoint's config.json names; float32 where it names none."""
    config: dict[str, Any] = read_json_object(folder / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"{folder} is stored in {name}, wanted float32, float16 or bfloat16. Choose another base.")
    return str(name)
