"""How tests are dealt out to the two processes of `make test` (pytest-xdist, `--dist loadgroup`)."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
WITH_SERVERS = (HERE / "demo", HERE / "e2e", HERE / "host" / "test_cpu_launch.py")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process has all tests with SGLang servers, which share what they start; the other has the rest.

    Servers that start or answer leave half of two cores idle.
    """
    for item in items:
        has_servers = any(item.path.is_relative_to(place) for place in WITH_SERVERS)
        item.add_marker(pytest.mark.xdist_group("servers" if has_servers else "rest"))
