"""One byte string per value: canonical JSON and the digests taken over it."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from blake3 import blake3

from sglang_prefillshare.errors import IdentityError


def canonical_json(value: Any) -> bytes:
    """Bytes that are equal for equal JSON values, however the file was indented, ordered or its numbers written.

    `10000` and `10000.0` are one number: config files are re-saved with either.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def digest_json(value: Any) -> str:
    return blake3(canonical_json(value)).hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises `IdentityError` when it cannot be read or is something else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise IdentityError(
            f"cannot read {path}: {error.strerror or error}. Check the file and its permissions."
        ) from error
    except ValueError as error:
        raise IdentityError(f"{path} is not JSON ({error}). Download or save the model again.") from error
    if not isinstance(value, dict):
        raise IdentityError(f"{path} holds a JSON {type(value).__name__}, wanted an object. Save the model again.")
    return value


def replace_file(path: Path, content: str) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part. Raises `OSError`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
