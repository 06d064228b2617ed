import subprocess
import sys

from sglang_prefillshare.environment import describe_environment, package_version


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
