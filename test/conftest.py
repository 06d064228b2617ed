"""How tests are dealt out to the two processes that `make test` runs them in (pytest-xdist, `--dist loadgroup`)."""

from __future__ import annotations

from pathlib import Path

import pytest

E2E = Path(__file__).parent / "e2e"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process has all tests with servers, one set at a time; the other takes the rest, file by file."""
    for item in items:
        group = "servers" if item.path.is_relative_to(E2E) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
