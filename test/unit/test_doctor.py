"""`prefillshare doctor` on a machine that lacks what it looks for."""

from __future__ import annotations

import pytest

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.host import doctor


def test_without_sglang_it_says_so_once_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda _package: "not installed")
    assert doctor.main() == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("sglang is not installed, wanted 0.5.23") == 1
    assert "Not ready." in printed


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda _package: "0.5.99")
    monkeypatch.setattr(doctor, "_seams", lambda _console: [])
    assert doctor.main() == 1
    assert "sglang is 0.5.99, wanted 0.5.23" in " ".join(capsys.readouterr().out.split())


def test_a_foreign_platform_setting_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", "someone_elses")
    monkeypatch.setattr(doctor, "_seams", lambda _console: [])
    assert doctor.main() == 1
    assert "SGLANG_PLATFORM=someone_elses" in capsys.readouterr().out


def test_a_gpu_pool_that_cannot_be_exported_is_told_of_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Pinned:
        def data_ptr(self) -> int:
            return 4096

    def cannot(_addresses: object, *, device: int) -> None:
        raise HandoffError("cannot export its KV pool over CUDA IPC: cuIpcGetMemHandle returned NOT_SUPPORTED.")

    assert doctor._handoff() == "shared memory" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_size, **_where: Pinned())
    monkeypatch.setattr(doctor, "CudaAllocations", cannot)
    assert doctor._handoff().startswith("nixl only: cannot export its KV pool")
    monkeypatch.setattr(doctor, "CudaAllocations", lambda _addresses, *, device: None)
    assert doctor._handoff() == "CUDA IPC"
