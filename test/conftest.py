"""How tests are dealt out to the two processes of `make test` (pytest-xdist, `--dist loadscope`)."""

from __future__ import annotations

from typing import Any

WITH_SERVERS = ("test/demo/", "test/e2e/", "test/host/test_cpu_launch.py")
WITHOUT = ("test/e2e/test_scripts.py::test_scripts_of_one_process", "test/e2e/test_scripts.py::test_the_copy_benchmark")
"""Of those, tests that need none; the two processes are about as long then."""


def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """One process has all tests with SGLang servers, which share what they start; the other has the rest.

    Servers that start or answer leave half of two cores idle. (Groups of xdist's own, by marks, do nothing under
    pytest 9.2: it does not read the names that xdist gives tests anew.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):  # type: ignore[misc, no-any-unimported, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            has_servers = nodeid.startswith(WITH_SERVERS) and not nodeid.startswith(WITHOUT)
            return "servers" if has_servers else "rest"

    return Lanes(config, log)
