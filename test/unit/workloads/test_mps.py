"""CUDA MPS around a benchmark: the control program is a script that writes down what it is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_prefillshare.workloads.mps import CONTROL, LOG_DIRECTORY, PIPE_DIRECTORY, cuda_mps


def control(folder: Path, monkeypatch: pytest.MonkeyPatch, *, status: int = 0) -> Path:
    """Put the script first on PATH; the file with a line per call: arguments, input, pipe directory."""
    told = folder / "told"
    script = folder / CONTROL
    script.write_text(
        f'#!/bin/sh\necho "$*|$(cat)|$CUDA_MPS_PIPE_DIRECTORY" >> {told}\necho no device >&2\nexit {status}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv(PIPE_DIRECTORY, raising=False)
    return told


def test_a_daemon_of_our_own_is_started_told_to_workers_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = control(tmp_path, monkeypatch)
    with cuda_mps() as (environ, line):
        assert environ.keys() == {PIPE_DIRECTORY, LOG_DIRECTORY} and "with CUDA MPS" in line
        pipe = environ[PIPE_DIRECTORY]
        assert Path(pipe).is_dir()
    assert told.read_text().splitlines() == [f"-d||{pipe}", f"|get_server_list|{pipe}", f"|quit -t 5|{pipe}"]
    assert not Path(pipe).exists()


def test_a_benchmark_that_ends_with_an_error_ends_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = control(tmp_path, monkeypatch)
    with pytest.raises(ZeroDivisionError), cuda_mps():
        raise ZeroDivisionError
    assert "quit" in told.read_text().splitlines()[-1]


def test_what_cannot_be_had_is_said_and_the_benchmark_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control(tmp_path, monkeypatch, status=1)
    with cuda_mps() as (environ, line):
        assert environ == {} and line.startswith("without CUDA MPS") and "no device" in line
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with cuda_mps() as (environ, line):
        assert environ == {} and f"no {CONTROL} here" in line


def test_one_that_runs_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = control(tmp_path, monkeypatch)
    monkeypatch.setenv(PIPE_DIRECTORY, "/run/mps")
    with cuda_mps() as (environ, line):
        assert environ == {} and "/run/mps" in line
    assert not told.exists()
