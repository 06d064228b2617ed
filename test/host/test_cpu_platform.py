"""What the CPU platform fills in where the user left it open, through SGLang's own command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_prefillshare import environment
from test.support.models import make_base


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("platform") / "base", "llama", seed=1)


@pytest.mark.parametrize(
    ("features", "arguments", "wanted"),
    [
        ("avx2 avx512f avx512bw", [], "float32"),
        ("avx2 avx512f avx512_bf16", [], "auto"),
        ("fp asimd bf16", [], "auto"),
        ("avx2", ["--dtype", "bfloat16"], "bfloat16"),
    ],
)
def test_a_cpu_without_bfloat16_computes_in_float32_unless_told_otherwise(
    model: Path,
    features: str,
    arguments: list[str],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import prepare_server_args

    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {features}\n")
    monkeypatch.setattr(environment, "CPUINFO", cpuinfo)
    server_args = prepare_server_args(["--model-path", str(model), *arguments])
    server_args.resolve_once()
    assert resolving_view(server_args).dtype == wanted
    said = capsys.readouterr().err.count("no bfloat16 of its own")
    assert said == (wanted == "float32")


@pytest.mark.parametrize(
    ("variable", "arguments", "is_off"),
    [
        (None, [], True),
        ("0", [], True),
        ("1", [], False),
        ("1", ["--disable-overlap-schedule"], True),
        ("1", ["--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "nixl"], True),
        ("1", ["--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "nixl"], False),
    ],
)
def test_the_overlap_loop_runs_on_a_cpu_only_where_it_is_asked_for(
    model: Path, variable: str | None, arguments: list[str], is_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import prepare_server_args

    monkeypatch.delenv("PREFILLSHARE_CPU_OVERLAP", raising=False)
    if variable is not None:
        monkeypatch.setenv("PREFILLSHARE_CPU_OVERLAP", variable)
    server_args = prepare_server_args(["--model-path", str(model), *arguments])
    server_args.resolve_once()
    assert resolving_view(server_args).disable_overlap_schedule is is_off
