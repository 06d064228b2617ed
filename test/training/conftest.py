from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from test.support.models import Arch, make_base, make_decode_module
from test.support.oracle import load_model


@pytest.fixture(autouse=True)
def quiet_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No progress bars of loading and saving, and no digests in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Arch, bool], Path]:
    """Bases of two layers, by architecture and whether their embeddings are tied."""
    root = tmp_path_factory.mktemp("bases")
    kinds: list[tuple[Arch, bool]] = [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)]
    return {
        (arch, tied): make_base(root / f"{arch}-{tied}", arch, tied=tied, layers=2, head_dim=16, seed=3)
        for arch, tied in kinds
    }


@pytest.fixture(scope="session")
def base_folder(folders: dict[tuple[Arch, bool], Path]) -> Path:
    return folders["llama", False]


@pytest.fixture(scope="session")
def module_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decode module with other weights than its base, and without a manifest."""
    return make_decode_module(tmp_path_factory.mktemp("module"), base_folder, seed=5, manifest=False)


@pytest.fixture
def base(base_folder: Path) -> PreTrainedModel:
    return load_model(base_folder).requires_grad_(False)


@pytest.fixture
def module(module_folder: Path) -> PreTrainedModel:
    return load_model(module_folder).train()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
