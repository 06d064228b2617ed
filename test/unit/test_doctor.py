"""`prefillshare doctor` on a machine that lacks what it looks for."""

from __future__ import annotations

import pytest

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import cuda_memory
from sglang_prefillshare.host import doctor
from sglang_prefillshare.host.trial import Proof
from test.support.cuda_driver import FakeDriver, uuid_of


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


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is there but the handoff, of which the test decides."""
    monkeypatch.setattr(doctor, "_versions", lambda _console: [])
    monkeypatch.setattr(doctor, "_entry_points", lambda _console: [])
    monkeypatch.setattr(doctor, "_seams", lambda _console: [])
    monkeypatch.setattr(doctor, "_installed", lambda _package: "0.5.23")
    monkeypatch.setattr(doctor.trial, "default_device", lambda: "cpu")


def test_a_handoff_that_fails_is_told_with_its_reason_and_a_failure(
    sound: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*, backend: str, device: str) -> None:
        raise HandoffError(f"{backend} on {device}: the pool [closed] is no one's; choose nixl.")

    monkeypatch.setattr(doctor.trial, "prove", fail)
    assert doctor.main() == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "failed prefillshare on cpu: the pool [closed] is no one's; choose nixl." in printed
    assert printed.endswith("Not ready.")
    assert doctor.main(backend="nixl") == 1
    assert "failed nixl on cpu" in " ".join(capsys.readouterr().out.split())


def test_quick_tries_no_handoff(sound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.trial, "prove", lambda **_: pytest.fail("a handoff was tried"))
    assert doctor.main(quick=True) == 0


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_a_worker_would_refuse_is_refused_here(
    sound: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(doctor.trial, "prove", lambda **_: pytest.fail("a handoff was tried"))
    monkeypatch.setenv(name, "expandable_segments:True")
    assert doctor.main() == 1
    assert f"{name} asks for expandable segments" in " ".join(capsys.readouterr().out.split())


def test_gpus_that_are_no_peers_are_named(
    sound: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    driver = FakeDriver({0: [], 1: []}, are_peers=False)
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor.trial, "prove", lambda **_: Proof((1,), 8, 1 << 20, 0.5))
    assert doctor.main() == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"GPU 0 and GPU {uuid_of(1)} are no peers" in printed
    assert "8 pages of 1 tokens, 1.0 MiB, all bytes equal, in 0.5 s" in printed and printed.endswith("Ready.")
