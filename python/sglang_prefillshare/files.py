"""Files and folders that are complete or absent, and the lock under which folders are made."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_prefillshare.errors import PrefillShareError
from sglang_prefillshare.identity.canonical import replace_file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time in here, by a lock on the file `path`."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        yield


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its final name on success, in place of an older one, and is removed on failure."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` and the folders above it. Raises `PrefillShareError` where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise PrefillShareError(f"cannot write {path}: {error.strerror or error}. Check the folder.") from error
