"""`prefillshare workers`: what a router says of its members, as a table for people."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sglang_prefillshare.errors import ConfigError, WorkerError

_COLOURS: Final = {"ready": "green", "starting": "yellow", "draining": "yellow", "refused": "red", "down": "red"}
_BASE_CHARACTERS: Final = 13
"""Of a fingerprint, in a table: enough to tell the bases of one router apart."""


def fetch(router: str, *, timeout_s: float) -> dict[str, Any]:
    """What `GET /workers` answers. Raises `WorkerError` where there is no such router."""
    url = f"{router.rstrip('/')}/workers"
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--router is {router!r}, wanted a URL such as http://127.0.0.1:8000.")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            told = json.load(response)
    except urllib.error.HTTPError as error:
        raise WorkerError(f"{url} answered {error.code}, wanted the members of a router. Correct --router.") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise WorkerError(f"no router answers at {url}: {why}. Start it, or correct --router.") from error
    if not isinstance(told, dict) or not isinstance(told.get("workers"), list):
        raise WorkerError(f"{url} has no members, wanted those of a `prefillshare route`. Correct --router.")
    return told


def show(told: Mapping[str, Any], *, console: Console) -> None:
    """Print the members, and below them why some are not ready, and what is wrong with a source."""
    console.print(render(told))


def render(told: Mapping[str, Any]) -> RenderableType:
    workers = told["workers"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("worker", "role", "modules", "base", "status", "requests", "named by"):
        is_address = heading == "worker"
        table.add_column(heading, justify="right" if heading == "requests" else "left", no_wrap=is_address)
    for worker in workers:
        status = str(worker.get("status"))
        table.add_row(
            _text(worker.get("url")),
            _text(worker.get("role") or "?"),
            _text(", ".join(worker.get("modules") or []) or "-"),
            _text((worker.get("base_fingerprint") or "?")[:_BASE_CHARACTERS]),
            _text(status, _COLOURS.get(status, "")),
            _text(worker.get("inflight_requests", "?")),
            _text(", ".join(worker.get("sources") or []) or "-"),
        )
    reasons = [
        _text(f"{worker.get('url')} is {worker.get('status')}: {worker['reason']}")
        for worker in workers
        if worker.get("reason")
    ]
    problems = [
        _text(f"{source['source']}: {source['problem']}", "red")
        for source in told.get("sources", ())
        if source.get("problem")
    ]
    return Group(table if workers else Text("no workers"), *reasons, *problems)


def _text(value: Any, style: str = "") -> Text:
    """What a worker calls itself must not steer the terminal."""
    shown = "".join(character if character.isprintable() else "\ufffd" for character in str(value))
    return Text(shown, style=style)
