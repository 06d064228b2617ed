"""Every seam fits the installed SGLang, and one that does not is named."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang_prefillshare.errors import SeamError  # noqa: E402 - after SGLang's plugins, as in a server
from sglang_prefillshare.host import seams  # noqa: E402


@pytest.mark.parametrize("seam", seams.ALL, ids=lambda seam: f"{seam.target}-{seam.hook}")
def test_the_installed_sglang_has_the_seam(seam: seams.Seam) -> None:
    seams.check(seam)
    assert callable(seam.load_hook())


def test_a_missing_target_is_named() -> None:
    gone = dataclasses.replace(seams.CPU_SCHEDULER[0], target="sglang.srt.managers.scheduler.Scheduler.not_there")
    with pytest.raises(SeamError, match=r"Scheduler\.not_there.*wanted 0\.5\.23"):
        seams.check(gone)


def test_a_changed_signature_is_named() -> None:
    changed = dataclasses.replace(seams.CPU_SCHEDULER[0], parameters=("self", "timeout_s"))
    with pytest.raises(SeamError, match=r"on_idle takes \('self',\), wanted \('self', 'timeout_s'\)"):
        seams.check(changed)


def test_a_hook_that_sglang_did_not_place_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "apply_hooks", classmethod(lambda cls: None))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    with pytest.raises(SeamError, match="not in place"):
        seams.install(seams.CPU_SCHEDULER)
