"""Where a model lies on this machine: a folder, a GGUF file, or a hub id resolved to its local snapshot."""

from __future__ import annotations

import re
from pathlib import Path

from sglang_prefillshare.errors import ConfigError

# What identity reads. `*.bin` and GGUF are left to SGLang's own download: then the snapshot is already there.
_DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate_model(model_path: str | Path, *, revision: str | None = None) -> Path:
    """The local folder (or GGUF file) that `model_path` names; a hub id is looked up in the local cache first.

    Raises `ConfigError` when there is no such path and no such model on the hub, or the hub cannot be reached.
    """
    path = Path(model_path).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(model_path)):
        raise ConfigError(f"{model_path} is neither a folder nor a hub id (owner/name). Give the folder of a model.")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(str(model_path), revision=revision, local_files_only=True))
        if (snapshot / "config.json").is_file() or any(snapshot.glob("tokenizer*")):
            return snapshot
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(str(model_path), revision=revision, allow_patterns=_DOWNLOAD_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{model_path} is no folder here, is not in the local hub cache, and cannot be downloaded ({error}). "
            "Give the model's folder, or download it first: hf download OWNER/NAME."
        ) from error
