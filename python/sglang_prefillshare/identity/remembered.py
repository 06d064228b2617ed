"""Digests of weight files remembered between starts, so that a restart need not read tens of gigabytes again.

One small JSON file per set of weight files. Nothing here is needed for a right answer: an entry that is absent,
unreadable or stale in any field means that the weights are read again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from sglang_prefillshare.identity.canonical import canonical_json, replace_file

logger = logging.getLogger(__name__)

_FORMAT: Final = "psw1"
SETTLED_NS: int = 2_000_000_000
"""A file changed more recently than this is not remembered: a second write within one tick of the file system's
clock would leave size and times as they were."""

Stamp = dict[str, Any]


def default_cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "prefillshare"


def stamp_files(files: Sequence[Path]) -> list[Stamp]:
    """What must be unchanged for a digest to hold still. `ctime_ns` catches a write whose mtime was set back."""
    stamps = []
    for file in files:
        real = file.resolve()
        stat = real.stat()
        stamps.append(
            {
                "path": str(real),
                "size": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
                "ctime_ns": stat.st_ctime_ns,
                "inode": stat.st_ino,
            }
        )
    return sorted(stamps, key=lambda stamp: str(stamp["path"]))


def recall(stamps: Sequence[Stamp], cache_dir: Path) -> str | None:
    """The digest remembered for exactly these stamps, or `None`."""
    try:
        entry = json.loads(_entry_path(stamps, cache_dir).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(entry, dict) or entry.get("format") != _FORMAT or entry.get("files") != list(stamps):
        return None
    digest = entry.get("digest")
    if not isinstance(digest, str) or entry.get("check") != _check(stamps, digest):
        return None
    return digest


def remember(stamps: Sequence[Stamp], digest: str, cache_dir: Path, *, read_at_ns: int) -> None:
    """Keep `digest` for the next start. `read_at_ns` is the wall clock just before the files were stamped."""
    newest_ns = max(max(int(stamp["mtime_ns"]), int(stamp["ctime_ns"])) for stamp in stamps)
    if read_at_ns - newest_ns < SETTLED_NS:
        return
    entry = {"format": _FORMAT, "files": list(stamps), "digest": digest, "check": _check(stamps, digest)}
    try:
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(_entry_path(stamps, cache_dir), json.dumps(entry, indent=1))
    except OSError as error:
        logger.info("the weights' digest is not remembered (%s); the next start reads them again", error)


def now_ns() -> int:
    return time.time_ns()


def _entry_path(stamps: Sequence[Stamp], cache_dir: Path) -> Path:
    paths = canonical_json([stamp["path"] for stamp in stamps])
    return cache_dir / f"weights-{blake3(paths).hexdigest(16)}.json"


def _check(stamps: Sequence[Stamp], digest: str) -> str:
    return blake3(canonical_json([_FORMAT, list(stamps), digest])).hexdigest(16)
