"""The locks: every line one exact version, no package twice, and together what pip would choose."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sglang_prefillshare.host.seams import SGLANG_VERSION

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
LOCKS = sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def pins(name: str) -> list[Requirement]:
    """A lock's lines, those of the locks that it includes among them."""
    found = []
    for line in (REQUIREMENTS / f"{name}.txt").read_text().splitlines():
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if text.startswith("-r "):
            found += pins(text.removeprefix("-r ").removesuffix(".txt"))
        elif text:
            found.append(Requirement(text))
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_is_one_version_of_one_package(name: str) -> None:
    found = pins(name)
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in found)
    twice = {
        package: count for package, count in Counter(canonicalize_name(p.name) for p in found).items() if count > 1
    }
    assert twice == {}


@pytest.mark.parametrize("stack", ["cpu", "cuda"])
def test_both_stacks_have_the_sglang_that_our_hooks_are_for(stack: str) -> None:
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins(stack)}
    assert versions["sglang"] == f"=={SGLANG_VERSION}"
    assert {"torch", "triton", "transformers"} <= versions.keys()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_cuda_lock_is_what_pip_chooses_and_nothing_is_missing(tmp_path: Path) -> None:
    """Metadata of 11 GB of packages, and no package: minutes."""
    report = tmp_path / "report.json"
    command = ("install", "--dry-run", "--ignore-installed", "--quiet", "--report", report)
    lock = REQUIREMENTS / "cuda.txt"
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, command), "-r", str(lock)], capture_output=True, text=True
    )
    if "No matching distribution" in done.stderr or "Could not find a version" in done.stderr:
        pytest.skip("waits for a registry that has the CUDA packages")
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = {
        canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }
    locked = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins("cuda")}
    assert chosen == locked
