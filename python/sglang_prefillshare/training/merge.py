"""`prefillshare merge`: a LoRA adapter added to its base's weights, as a checkpoint that a decode worker loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.identity.canonical import read_json_object
from sglang_prefillshare.identity.fingerprint import check_tokenizer, identify_base
from sglang_prefillshare.identity.folder import locate_model
from sglang_prefillshare.identity.manifest import check_manifest, read_manifest, write_manifest
from sglang_prefillshare.training.folder import copy_tokenizer, finish_checkpoint, stored_dtype


def merge(
    adapter: Path | str,
    out: Path | str,
    *,
    base: str | None = None,
    tokenizer_path: str | None = None,
    chat_template: str | None = None,
) -> Path:
    """Write `adapter` merged into its base as a whole checkpoint in `out`, which must be empty or absent; returns it.

    The sum is made in float32 and stored in the base's dtype. The base is the one the adapter names unless `base` is
    given; it must be the very one that the adapter's manifest names, by content. An adapter of method full-ft has no
    manifest, and its merged checkpoint gets none. `tokenizer_path` and `chat_template` are as workers are given them.
    Raises `ConfigError` for folders that do not fit, `IdentityError` for another base.
    """
    adapter, out = Path(adapter), Path(out)
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"{adapter} has no adapter_config.json, wanted the folder of a LoRA adapter.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder. Name one that is new.")
    named = base or read_json_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ConfigError(f"{adapter} does not name its base. Give it with --base.")
    try:
        start = locate_model(named)
    except ConfigError as error:
        raise ConfigError(f"the base of {adapter}: {error} If it lies elsewhere now, give it with --base.") from error
    identity = identify_base(named, tokenizer_path=tokenizer_path, chat_template=chat_template)
    manifest = read_manifest(adapter)
    if manifest is not None:
        check_manifest(manifest, identity, module=str(adapter))
    model = _merged(start, adapter)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    finish_checkpoint(start, out)
    copy_tokenizer(locate_model(tokenizer_path or named), out)
    if manifest is not None:
        if tokenizer_path is None:
            check_tokenizer(out, identity, chat_template=chat_template)
        write_manifest(out, manifest)
    return out


def _merged(base: Path, adapter: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(
            "merging needs the package peft, which is not installed. "
            "Install it: pip install --no-deps -r requirements/train.txt"
        ) from error
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged.to(getattr(torch, stored_dtype(base)))
