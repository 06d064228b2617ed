import subprocess
import sys
from pathlib import Path

import pytest

from sglang_prefillshare import environment
from sglang_prefillshare.environment import cpu_has_bfloat16, describe_device, describe_environment, package_version


def test_a_result_names_command_commit_versions_and_machine():
    code = "from sglang_prefillshare import environment; print(environment.describe_environment(('torch',)))"
    told = subprocess.run(
        [sys.executable, "-c", code, "--seeds", "3 or so"], capture_output=True, text=True, check=True
    )
    described = eval(told.stdout)
    assert described["command"].endswith("-c --seeds '3 or so'")
    assert set(described["versions"]) == {"python", "torch"}
    assert described["versions"]["torch"] == package_version("torch")
    assert described["device"]["kind"] == "cpu" and described["device"]["cpu_count"] > 0


def test_a_package_that_is_missing_is_none():
    assert describe_environment(("no-such-package",))["versions"]["no-such-package"] is None


def test_the_commit_is_that_of_the_checkout():
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = describe_environment(())["commit"]
    assert commit is None or commit.removesuffix("-dirty") == found.stdout.strip()


ZEN_3 = "flags : fpu sse2 fma avx f16c avx2 bmi2\n"
CASCADE_LAKE = "flags : fma avx2 avx512f avx512bw avx512dq avx512_vnni\n"
ZEN_4 = "flags : avx2 avx512f avx512bw avx512_bf16 avx512_vnni\n"
SAPPHIRE_RAPIDS = "flags : avx2 avx512f avx512bw avx512_bf16 amx_bf16 amx_tile amx_int8\n"
NEOVERSE_N1 = "Features : fp asimd asimddp\n"
NEOVERSE_V1 = "Features : fp asimd sve svebf16 i8mm bf16\n"


@pytest.mark.parametrize(
    ("cpuinfo", "has_bfloat16", "sets"),
    [
        (ZEN_3, False, ["avx2"]),
        (CASCADE_LAKE, False, ["avx2", "avx512f", "avx512bw", "avx512_vnni"]),
        (ZEN_4, True, ["avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"]),
        (SAPPHIRE_RAPIDS, True, ["avx2", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16"]),
        (NEOVERSE_N1, False, ["asimd"]),
        (NEOVERSE_V1, True, ["asimd", "sve", "bf16", "svebf16"]),
    ],
)
def test_a_cpu_has_bfloat16_if_it_multiplies_it_and_not_if_it_has_avx512_alone(
    cpuinfo: str, has_bfloat16: bool, sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "cpuinfo"
    other = f"processor : 1\n{cpuinfo.split()[0]} : bf16\n"
    path.write_text(f"processor : 0\nmodel name\t: A CPU: of 2\n{cpuinfo}bugs : none\n\n{other}")
    monkeypatch.setattr(environment, "CPUINFO", path)
    assert cpu_has_bfloat16() is has_bfloat16
    described = describe_device()
    assert (described["instruction_sets"], described["has_bfloat16"]) == (sets, has_bfloat16)
    assert described["name"] == "A CPU: of 2"


def test_where_nothing_tells_a_cpu_has_no_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "absent")
    assert not cpu_has_bfloat16() and describe_device()["instruction_sets"] == []


def test_torch_sees_the_bfloat16_that_this_machine_is_said_to_have():
    torch = pytest.importorskip("torch")
    told = torch.cpu.get_capabilities()
    assert cpu_has_bfloat16() == any(told.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
