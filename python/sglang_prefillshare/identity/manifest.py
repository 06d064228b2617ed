"""`prefillshare.json` in a decode module's folder: the base it was trained on, and the split it was trained with."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sglang_prefillshare import __version__
from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity.canonical import read_json_object, replace_file
from sglang_prefillshare.identity.fingerprint import BaseIdentity
from sglang_prefillshare.identity.geometry import check_same_geometry
from sglang_prefillshare.protocol import BOUNDARY_RULE

__all__ = [
    "FILE_NAME",
    "Manifest",
    "check_manifest",
    "check_same_geometry",
    "check_training",
    "read_manifest",
    "write_manifest",
]

FILE_NAME: Final = "prefillshare.json"
FORMAT: Final = 1

_PART_MEANING: Final = {
    "weights": "the base's weights changed",
    "config": "the base's config.json changed",
    "tokenizer": "the base's tokenizer changed",
    "chat_template": "the base's chat template changed",
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a decode module says of its training. `base` is for people; `base_fingerprint` and `components` count."""

    base: str
    base_fingerprint: str
    components: BaseIdentity
    boundary: str = BOUNDARY_RULE
    format: int = FORMAT
    created_by: str = f"sglang-prefillshare {__version__}"

    @classmethod
    def for_base(cls, name: str, identity: BaseIdentity) -> Manifest:
        """The manifest of a module trained on `identity`, known to people as `name`."""
        return cls(base=name, base_fingerprint=identity.model_fingerprint, components=identity)


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest in a decode module's folder; `None` when there is none.

    Raises `IdentityError` naming the key when it is malformed, contradicts itself, or is of an unknown format.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return None
    data = read_json_object(path)
    found = data.get("format")
    if type(found) is not int or found != FORMAT:
        raise IdentityError(
            f"{path}: format is {found!r}, this version reads {FORMAT}. "
            "Install the sglang-prefillshare version that wrote it, or train again."
        )
    strings = {key: _string(path, data, key) for key in ("base", "base_fingerprint", "boundary", "created_by")}
    parts = data.get("components")
    if not isinstance(parts, dict):
        raise IdentityError(f"{path}: components is {type(parts).__name__}, wanted an object. {_REWRITE}")
    names = [field.name for field in dataclasses.fields(BaseIdentity)]
    components = BaseIdentity(**{name: _string(path, parts, name, within="components.") for name in names})
    if components.model_fingerprint != strings["base_fingerprint"]:
        raise IdentityError(
            f"{path}: base_fingerprint is {strings['base_fingerprint']}, its components give "
            f"{components.model_fingerprint}. {_REWRITE}"
        )
    return Manifest(components=components, format=found, **strings)


def write_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Write `manifest` into a decode module's folder, replacing an older one in one step; returns its path."""
    path = Path(folder) / FILE_NAME
    try:
        replace_file(path, json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}. Check the folder.") from error
    return path


def check_manifest(manifest: Manifest, identity: BaseIdentity, *, module: str = "this decode module") -> None:
    """Raise `IdentityError` unless the module was trained on exactly this base, with the split that we serve."""
    if manifest.boundary != BOUNDARY_RULE:
        raise IdentityError(
            f"{module} was trained with boundary {manifest.boundary!r}, this version serves {BOUNDARY_RULE!r}. "
            "Train it again with this version, or serve it with its own prefill."
        )
    differing = identity.differing_parts(manifest.components)
    if differing:
        raise IdentityError(
            f"{module} was trained on base {manifest.base!r} ({manifest.base_fingerprint}), this base is "
            f"{identity.model_fingerprint}: {', '.join(_PART_MEANING[name] for name in differing)}. "
            "Serve the base it was trained on, or train the module on this one."
        )


def check_training(module: str, base: str, identity: BaseIdentity, *, allow_untrained: bool) -> bool:
    """Whether the module's manifest says that it was trained on this base.

    Raises `IdentityError` where it says something else; `ConfigError` without one, unless `allow_untrained`: then a
    warning is printed.
    """
    manifest = read_manifest(module)
    if manifest is not None:
        check_manifest(manifest, identity, module=module)
    elif not allow_untrained:
        raise ConfigError(
            f"{module} has no {FILE_NAME}: nothing says that it was fine-tuned to read the KV of {base}. "
            f"If it was, record it with `prefillshare identity write {module} --base {base}`; to serve it all the "
            "same, start the server with --prefill-share-allow-untrained."
        )
    else:
        print(
            f"warning: {module} has no {FILE_NAME}; it is served untrained, its answers may be worse than with its own "
            "prefill.",
            file=sys.stderr,
        )
    return manifest is not None


_REWRITE: Final = "It was edited or damaged: train the module again, or copy the manifest it was trained with."


def _string(path: Path, data: dict[str, Any], key: str, *, within: str = "") -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value:
        shown = "missing" if key not in data else repr(value)
        raise IdentityError(f"{path}: {within}{key} is {shown}, wanted a string. {_REWRITE}")
    return value
