"""What our platform's entry point does to the process that it is called in."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from sglang_prefillshare.host.cpu import entry


@pytest.fixture(autouse=True)
def own_thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(("before", "after"), [((700, 10, 10), (50_000, 20, 100)), ((900, 5, 5), (900, 5, 5))])
def test_imports_are_not_collected_at_every_step_unless_somebody_chose_when(
    before: tuple[int, int, int], after: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(entry, "_has_accelerator", lambda: False)
    monkeypatch.setattr(entry.torchvision_standin, "install_if_absent", lambda: None)
    gc.set_threshold(*before)
    assert entry.activate() is not None
    assert gc.get_threshold() == after


def test_where_sglang_has_a_platform_nothing_is_changed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entry, "_has_accelerator", lambda: True)
    gc.set_threshold(700, 10, 10)
    assert entry.activate() is None and gc.get_threshold() == (700, 10, 10)
