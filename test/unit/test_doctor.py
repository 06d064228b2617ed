"""`prefillshare doctor` on a machine that lacks what it looks for."""

from __future__ import annotations

import pytest

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
