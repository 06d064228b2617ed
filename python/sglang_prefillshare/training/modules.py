"""The decode modules that a measurement is about, and their base: which fit together, and how they are loaded.

A module is a whole checkpoint or an adapter. Opening checks identities and reads the tokenizer, but no weights;
`evaluators` loads the base once, and the modules one after another. What they are asked is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity.canonical import read_json_object
from sglang_prefillshare.identity.fingerprint import BaseIdentity, check_tokenizer, identify_base, read_config
from sglang_prefillshare.identity.folder import locate_model
from sglang_prefillshare.identity.geometry import check_same_geometry
from sglang_prefillshare.identity.manifest import check_manifest, read_manifest

if TYPE_CHECKING:
    from sglang_prefillshare.training.evaluate import Evaluator
    from sglang_prefillshare.training.trainer import BaseSource

DTYPES: Final = ("float32", "bfloat16", "float16")

_ADAPTER: Final = "adapter_config.json"


def named_modules(entries: Sequence[str]) -> dict[str, str]:
    """Modules by name from `NAME=MODULE` or `MODULE`, which is then called as its folder is."""
    modules: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or Path(entry).exists():
            name, path = Path(entry).name or entry, entry
        if not name or not path or name in modules:
            found = f"a second {name!r}" if name in modules else repr(entry)
            raise ConfigError(f"modules has {found}, wanted MODULE or NAME=MODULE, each name only once.")
        modules[name] = path
    return modules


@dataclass(frozen=True, slots=True)
class Modules:
    """Modules of one base, by the names that the caller gave them. No weights are loaded yet.

    `names_base`: whether a module's manifest says that it was trained on this base's KV. `stop_ids` are the tokens at
    which serving stops, besides the tokenizer's EOS. `max_positions` is the base's.
    """

    base: str
    identity: BaseIdentity
    folders: Mapping[str, Path]
    names_base: Mapping[str, bool]
    tokenizer: Any
    stop_ids: frozenset[int]
    max_positions: int | None
    device: str
    dtype: str

    def kind(self, name: str) -> str:
        """`adapter` or `full`."""
        return "adapter" if _is_adapter(self.folders[name]) else "full"

    def evaluators(self, batch_size: int) -> Iterator[tuple[str, Evaluator]]:
        """Every module by name, loaded when its turn comes. Raises `IdentityError` for an adapter of another base."""
        from sglang_prefillshare.training.evaluate import Evaluator
        from sglang_prefillshare.training.loss import check_plain_attention
        from sglang_prefillshare.training.run import padding_id

        base: Any = _load_whole(self.base, self.dtype).requires_grad_(False).eval().to(self.device)
        check_plain_attention(base.config)
        for name, folder in self.folders.items():
            module, source = _load(folder, base, lambda: _load_whole(self.base, self.dtype).to(self.device), self.dtype)
            yield name, Evaluator(module.to(self.device).eval(), source, batch_size, padding_id(self.tokenizer))


def open_modules(
    modules: Mapping[str, str],
    *,
    base: str | None = None,
    tokenizer_path: str | None = None,
    chat_template: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Modules:
    """Find modules (folders or hub ids by name) and their base, which is the one that they name unless given.

    `tokenizer_path` and `chat_template` are as workers are given them; `device` is the accelerator, else the CPU, and
    `dtype` float32 on a CPU, else bfloat16, unless given. Raises `ConfigError` for files and folders that do not fit,
    `IdentityError` for a module of another base.
    """
    import torch
    from transformers import AutoTokenizer

    from sglang_prefillshare.training.run import read_stop_ids, read_template

    folders = {name: _module_folder(path) for name, path in modules.items()}
    base_path = base or _named_base(folders)
    try:
        is_gguf = locate_model(base_path).is_file()
    except ConfigError as error:
        if base is not None:
            raise
        raise ConfigError(f"a module names its base: {error} If it lies elsewhere now, give it with --base.") from error
    if is_gguf:
        raise ConfigError(f"base {base_path} is a GGUF file, wanted a folder. Convert it to a checkpoint first.")
    identity = identify_base(base_path, tokenizer_path=tokenizer_path, chat_template=chat_template)
    names_base = {
        name: _check_module(
            folder, base_path, identity, has_tokenizer_path=tokenizer_path is not None, chat_template=chat_template
        )
        for name, folder in folders.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(locate_model(tokenizer_path or base_path))
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    device = device or str(torch.accelerator.current_accelerator() or "cpu")
    whole = [folder for folder in folders.values() if not _is_adapter(folder)]
    return Modules(
        base=base_path,
        identity=identity,
        folders=folders,
        names_base=names_base,
        tokenizer=tokenizer,
        stop_ids=frozenset[int]().union(*(read_stop_ids(str(path)) for path in (locate_model(base_path), *whole))),
        max_positions=read_config(base_path).get("max_position_embeddings"),
        device=device,
        dtype=dtype or ("float32" if device.startswith("cpu") else "bfloat16"),
    )


def _module_folder(path: str) -> Path:
    folder = locate_model(path)
    if not ((folder / _ADAPTER).is_file() or (folder / "config.json").is_file()):
        raise ConfigError(
            f"{path} has neither config.json nor {_ADAPTER}. Give the folder of a decode module or of an adapter."
        )
    return folder


def _is_adapter(folder: Path) -> bool:
    return (folder / _ADAPTER).is_file()


def _named_base(folders: Mapping[str, Path]) -> str:
    """The base that the first module which names one was trained on, as far as it can be found under that name."""
    for folder in folders.values():
        manifest = read_manifest(folder)
        if manifest is not None:
            return manifest.base
        if _is_adapter(folder):
            named = read_json_object(folder / _ADAPTER).get("base_model_name_or_path")
            if isinstance(named, str) and named:
                return named
    raise ConfigError(f"{', '.join(folders)}: no module names its base. Give it with --base.")


def _check_module(
    folder: Path, base: str, identity: BaseIdentity, *, has_tokenizer_path: bool, chat_template: str | None
) -> bool:
    """Raise unless the module can read this base's KV. True where its manifest says that it was trained to.

    One without a manifest may be measured: that is the paper's naive sharing.
    """
    if not _is_adapter(folder):
        check_same_geometry(read_config(base), read_config(folder))
    manifest = read_manifest(folder)
    if manifest is not None:
        check_manifest(manifest, identity, module=str(folder))
    if not has_tokenizer_path and any(folder.glob("tokenizer*")):
        check_tokenizer(folder, identity, chat_template=chat_template)
    return manifest is not None


def _load(folder: Path, base: Any, fresh_base: Callable[[], Any], dtype: str) -> tuple[Any, BaseSource]:
    """A module, and the way from it to its base: the one that is loaded, or itself without its adapter."""
    from sglang_prefillshare.training.trainer import frozen_copy, without_adapter

    if not _is_adapter(folder):
        return _load_whole(str(folder), dtype), frozen_copy(base)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(
            f"{folder} is an adapter, and the package peft is not installed. "
            "Install it: pip install --no-deps -r requirements/train.txt"
        ) from error
    try:
        return PeftModel.from_pretrained(fresh_base(), folder), without_adapter()
    except (RuntimeError, ValueError) as error:
        raise IdentityError(
            f"adapter {folder} does not fit the base: {str(error).splitlines()[0]} "
            "Give the base it was trained on with --base."
        ) from error


def _load_whole(path: str, dtype: str) -> Any:
    """A whole model, without Transformers' progress bar: the measurement shows one of its own."""
    from transformers.utils import logging

    from sglang_prefillshare.training.run import load_model

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load_model(path, dtype)
    finally:
        if was_shown:
            logging.enable_progress_bar()
