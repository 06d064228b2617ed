"""The servers that end-to-end tests share: started once, on real SGLang, with tiny models in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sglang_prefillshare.deployment import Deployment
from test.support.models import make_adapter, make_base, make_decode_module, make_equal_module
from test.support.oracle import Oracle
from test.support.servers import deploy, launch_server, topology


@dataclass(frozen=True, slots=True)
class Models:
    """A base; three modules with other weights that were "trained" on it; one that has the base's own weights."""

    base: Path
    planner: Path
    coder: Path
    twin: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base", "llama", tied=False, seed=1)
    return Models(
        base=base,
        planner=make_decode_module(folder / "planner", base, seed=2),
        coder=make_decode_module(folder / "coder", base, seed=3),
        twin=make_equal_module(folder / "twin", base),
    )


@pytest.fixture(scope="session")
def adapters(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three modules that are adapters on the base: of other ranks, on other products."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "planner": make_adapter(folder / "planner", models.base, seed=2),
        "coder": make_adapter(folder / "coder", models.base, seed=3, rank=8, targets=("q_proj", "v_proj")),
        "reviewer": make_adapter(
            folder / "reviewer", models.base, seed=4, rank=2, targets=("o_proj", "gate_proj", "up_proj")
        ),
    }


@pytest.fixture(scope="session")
def adapter_oracles(models: Models, adapters: dict[str, Path]) -> dict[str, Oracle]:
    return {name: Oracle(models.base, models.base, adapter=folder) for name, folder in adapters.items()}


@pytest.fixture(scope="session")
def deployment(models: Models) -> Iterator[Deployment]:
    """Base, planner, coder, twin and router, over the default backend; the planner with SGLang's overlap loop.

    On a CPU, that is: on a GPU every worker runs it.
    """
    modules = {"planner": models.planner, "coder": models.coder, "twin": models.twin}
    with deploy(topology(models.base, modules, overlapped=("planner",))) as running:
        yield running


@pytest.fixture(scope="session")
def plain_server(models: Models) -> Iterator[str]:
    """The base on an ordinary SGLang server: what the twin must be equal to."""
    with launch_server(models.base, ["--enable-metrics"]) as url:  # as a role does: it adds fields to the answers
        yield url


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test to ask for servers waits for them to load, longer than a test may take otherwise."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))
