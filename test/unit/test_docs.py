"""The documents, as far as they name files: each is where they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FILES = [
    f"/{path.relative_to(ROOT)}"
    for folder in ("benchmark", "docker", "examples", "kernels", "python", "requirements", "scripts", "test")
    for path in (ROOT / folder).rglob("*.*")
]
NAMED = re.compile(r"(?<![\w./*-])(?:\./)?([\w-][\w./-]*\.(?:py|sh|txt))\b")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    """A path may be short, `routing/policy.py` for one, but what it has must be right."""
    named = set(NAMED.findall(document.read_text()))
    missing = sorted(name for name in named if not any(file.endswith(f"/{name}") for file in FILES))
    assert not missing, f"{document.name} names {missing}, found nowhere in the tree. Say where they are now."
