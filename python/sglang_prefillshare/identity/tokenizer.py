"""Digests of what turns a request into token ids: the tokenizer, and the chat template on top of it.

Both are read from files, so that a start needs no Transformers. Two tokenizers that Transformers wrote at different
times are the same when they encode alike: indentation, key order, the spelling of merges, and settings that act on
batches or on training only (padding, truncation, `pad_token`, `model_max_length`) do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity.canonical import digest_json, read_json_object
from sglang_prefillshare.identity.folder import locate_model

_SETTINGS: Final = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "keep_accents", "legacy", "remove_space",
    "sp_model_kwargs", "split_special_tokens", "strip_accents", "tokenize_chinese_chars",
)  # fmt: skip
"""Keys of tokenizer_config.json that change how text is split or what is put around it."""

_NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED_TOKENS: Final = ("additional_special_tokens", "extra_special_tokens")
_TOKEN_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
_VOCABULARY_FILES: Final = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json")
_NOT_ENCODING: Final = ("version", "padding", "truncation", "added_tokens")


@dataclass(frozen=True, slots=True)
class TokenizerIdentity:
    """Hex digests of a tokenizer and of the chat template it is used with."""

    tokenizer: str
    chat_template: str


def tokenizer_identity(
    model_path: str | Path, *, chat_template: str | None = None, revision: str | None = None
) -> TokenizerIdentity:
    """Identity of the tokenizer in `model_path`. `chat_template` is SGLang's flag: a file, or a built-in's name.

    Raises `ConfigError` when there is no tokenizer or no such template, `IdentityError` for an unreadable file.
    """
    folder = locate_model(model_path, revision=revision)
    if folder.is_file():  # a GGUF file carries its tokenizer and template inside
        inside = blake3(max_threads=blake3.AUTO).update_mmap(folder).hexdigest()
        template = inside if chat_template is None else digest_json(_explicit_template(chat_template))
        return TokenizerIdentity(inside, template)
    settings = _settings(folder)
    try:
        own_templates = _own_templates(folder, settings)
        encoding = {"encoding": _encoding(folder, settings), "settings": _prompt_settings(settings)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise IdentityError(
            f"the tokenizer files in {folder} are malformed ({type(error).__name__}: {error}). Save the model again."
        ) from error
    templates = own_templates if chat_template is None else _explicit_template(chat_template)
    tokens = _tokens_in(templates, settings)
    return TokenizerIdentity(digest_json(encoding), digest_json({"templates": templates, "tokens": tokens}))


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed by special_tokens_map.json as Transformers completes it."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            merged.update({key: value for key, value in read_json_object(folder / name).items() if value is not None})
    return merged


def _prompt_settings(settings: dict[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {key: settings[key] for key in _SETTINGS if key in settings}
    # bos is put before a prompt by many tokenizers; eos only when asked for. A module that merely stops at another
    # token than its base therefore still encodes alike.
    chosen["bos_token"] = _content(settings.get("bos_token"))
    if settings.get("add_eos_token"):
        chosen["eos_token"] = _content(settings.get("eos_token"))
    return chosen


def _encoding(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    fast = folder / "tokenizer.json"
    if fast.is_file():
        data = read_json_object(fast)
        model = _model(data)
        parts = {key: value for key, value in data.items() if key not in _NOT_ENCODING and value is not None}
        return {**parts, "model": model, "added_tokens": _added_tokens(folder, settings, data, model)}
    files = [folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()]
    files += sorted([*folder.glob("*.tiktoken"), *folder.glob("tokenizer.model*"), *folder.glob("tiktoken.model")])
    if not files:
        raise ConfigError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab files). "
            "Copy the base's tokenizer into it, or name its folder with --tokenizer-path."
        )
    # Without tokenizer.json the class decides how the vocabulary is used.
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    vocabulary = {file.name: _vocabulary(file) for file in files}
    return {"files": vocabulary, "class": kind, "added_tokens": _added_tokens(folder, settings, {}, {})}


def _model(data: dict[str, Any]) -> dict[str, Any]:
    """The `model` part of tokenizer.json. Absent, null and false are the library's one default; a merge was once
    written as "a b" and is now ["a", "b"]."""
    raw = data.get("model")
    if not isinstance(raw, dict):
        return {}
    model = {key: value for key, value in raw.items() if value is not None and value is not False}
    if isinstance(model.get("merges"), list):
        model["merges"] = [item.split(" ") if isinstance(item, str) else item for item in model["merges"]]
    return model


def _added_tokens(
    folder: Path, settings: dict[str, Any], data: dict[str, Any], model: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Every token added to the vocabulary, by content, from the places that Transformers merges when it loads."""
    tokens: dict[str, dict[str, Any]] = {}
    listed = [(token.get("id"), token) for token in data.get("added_tokens") or []]
    listed += [(int(number), token) for number, token in (settings.get("added_tokens_decoder") or {}).items()]
    for number, token in listed:
        tokens[token["content"]] = {"id": number, **{flag: bool(token.get(flag)) for flag in _TOKEN_FLAGS}}
    vocabulary = model.get("vocab")
    known: dict[str, Any] = vocabulary if isinstance(vocabulary, dict) else {}
    if (folder / "added_tokens.json").is_file():
        known = {**known, **read_json_object(folder / "added_tokens.json")}
        for content in known.keys() - (vocabulary or {}):
            tokens.setdefault(content, _plain_token(known[content], special=False))
    special: list[Any] = [settings.get(name) for name in _NAMED_TOKENS if name in settings]
    for name in _LISTED_TOKENS:
        value = settings.get(name) or []
        special += list(value.values()) if isinstance(value, dict) else list(value)
    for entry in special:
        text = _content(entry)
        if text is not None and text not in tokens:
            tokens[text] = _plain_token(known.get(text), special=True)
    return tokens


def _plain_token(number: int | None, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(_TOKEN_FLAGS, False)
    return {"id": number, **flags, "normalized": not special, "special": special}


def _vocabulary(file: Path) -> str:
    if file.suffix == ".json":
        return digest_json(read_json_object(file))
    try:
        return blake3(file.read_bytes()).hexdigest()
    except OSError as error:
        raise IdentityError(f"cannot read {file}: {error.strerror or error}. Check its permissions.") from error


def _own_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The model's templates by name. Files win over tokenizer_config.json, as in Transformers."""
    templates: dict[str, str] = {}
    configured = settings.get("chat_template")
    if isinstance(configured, str):
        templates["default"] = configured
    elif isinstance(configured, list):
        templates.update({str(item.get("name")): str(item.get("template")) for item in configured})
    if (folder / "chat_template.jinja").is_file():
        templates = {"default": _text(folder / "chat_template.jinja")}
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = _text(file)
    return {name: _as_rendered(text) for name, text in templates.items()}


def _explicit_template(chat_template: str) -> dict[str, str]:
    path = Path(chat_template).expanduser()
    if path.is_file():
        if path.suffix == ".json":  # SGLang's own conversation format
            return {"conversation": digest_json(read_json_object(path))}
        return {"default": _as_rendered(_text(path))}
    if path.suffix in (".jinja", ".json") or len(path.parts) > 1:
        raise ConfigError(f"chat template {chat_template} does not exist. Give a file, or the name of a built-in one.")
    return {"built-in": chat_template}


def _tokens_in(templates: dict[str, str], settings: dict[str, Any]) -> dict[str, str | None]:
    """The special tokens a template can print: it renders another prompt when one of these changes."""
    text = "\n".join(templates.values())
    return {name: _content(settings.get(name)) for name in _NAMED_TOKENS if name in text}


def _as_rendered(text: str) -> str:
    """As Jinja sees it: line ends become \\n, and one at the very end is dropped."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(f"cannot read {file}: {error}. Check the file and its permissions.") from error
