from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

from test.support.models import make_base, make_decode_module


@pytest.fixture(autouse=True)
def quiet_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No progress bars of loading and saving, and no digests in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", layers=1, head_dim=16, seed=3)


@pytest.fixture(scope="session")
def module_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decode_module(tmp_path_factory.mktemp("module") / "planner", base_folder, seed=5)
