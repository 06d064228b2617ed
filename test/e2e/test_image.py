"""The CPU image without an engine: its steps in a clean root, then the demo's services in it as compose starts them.

Downloads about 1 GB and takes 7 GB of disk; 10 to 15 minutes on two cores.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.demo.exercises import draw_request
from examples.demo.rounds import SYSTEM, TOLD
from test.support.container.dockerfile import read_dockerfile
from test.support.container.image import Image, build, lacking_for_images
from test.support.container.room import Bind, Process, Room, room

ROOT = Path(__file__).parents[2]
STAGES = read_dockerfile(ROOT / "docker/Dockerfile.cpu")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
MODULE = "planner"
"""One module of three: the smallest deployment that shares a base."""

HEALTHY_WITHIN_S = 600.0
STOPPED_WITHIN_S = 30.0
ASK = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if reason := lacking_for_images():
        pytest.skip(f"needs {reason}")
    folder = tmp_path_factory.mktemp("image")
    try:
        yield build(STAGES, ROOT, folder)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def models(image: Image, tmp_path: Path) -> Iterator[Path]:
    """The compose file's volume, filled by the service that does it."""
    folder = tmp_path / "models"
    try:
        shutil.copytree(image.root / "models", folder)  # what an engine fills a new volume with, its owner too
        os.chown(folder, image.user.uid, image.user.gid)
        with room(image.root, binds=[Bind(folder, Path("/models"), is_writable=True)]) as opened:
            ran(opened, image, SERVICES["models"]["command"])
        yield folder
    finally:
        shutil.rmtree(folder)


def test_the_images_command_and_doctor_run_as_its_user(image: Image) -> None:
    print(report(image))
    with room(image.root) as opened:
        assert "Usage: prefillshare" in ran(opened, image, STAGES[-1].last("CMD").words)
        assert ran(opened, image, ["id", "--user"]).strip() == STAGES[-1].last("USER").value
        ran(opened, image, ["prefillshare", "doctor", "--quick"])


def test_the_demos_services_become_healthy_answer_right_and_stop(image: Image, models: Path, tmp_path: Path) -> None:
    shared_memory = SERVICES["pod"]["shm_size"].removesuffix("b")
    with room(image.root, binds=[Bind(models, Path("/models"))], shared_memory=shared_memory) as opened:
        began = time.monotonic()
        processes = {name: started(opened, image, name, tmp_path) for name in ("base", MODULE, "router")}
        for name, process in processes.items():
            wait_until_healthy(opened, image, name, process)
            print(f"{name} is healthy after {time.monotonic() - began:.0f} s")

        request = draw_request(random.Random("image"), "test")
        told = TOLD[MODULE].format(request=request.text)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": told}]
        body = json.dumps({"model": MODULE, "messages": messages, "temperature": 0, "max_tokens": 48})
        answer = ran(opened, image, ["python", "-c", ASK, "http://127.0.0.1:8000/v1/chat/completions", body])
        assert json.loads(answer)["choices"][0]["message"]["content"].strip() == request.plan

        for name, process in processes.items():
            print(f"{name} stopped after {process.stop(within_s=STOPPED_WITHIN_S):.1f} s")


def report(image: Image) -> str:
    """Seconds of the steps that take any, and what the image holds beside the Debian below it."""
    lines = [f"{seconds:6.0f} s  {step[:90]}" for step, seconds in image.seconds.items() if seconds >= 1.0]
    lines.append(f"{sum(image.seconds.values()):6.0f} s  all steps")
    lines.append(f"{megabytes(image.root):6.0f} MB image, of which {megabytes(image.base):.0f} are the Debian below it")
    return "\n".join(lines)


def megabytes(folder: Path) -> float:
    return int(subprocess.run(["du", "-sk", str(folder)], capture_output=True, check=True).stdout.split()[0]) / 1024


def ran(opened: Room, image: Image, words: Sequence[str], **env: str) -> str:
    """The output of a command in the image as its user; fails with that where the command does."""
    command = opened.command(words, user=image.user, workdir=image.workdir)
    found = subprocess.run(command, env=dict(image.env) | env, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, f"{words}: {found.stdout[-3000:]}{found.stderr[-3000:]}"
    return found.stdout


def started(opened: Room, image: Image, name: str, logs: Path) -> Process:
    """A service of the compose file. The router is told of the one module that is there."""
    words = list(SERVICES[name]["command"])
    for other in SERVICES:
        absent = [index for index, word in enumerate(words) if other != MODULE and word.startswith(f"{other}=")]
        for index in absent:
            del words[index - 1 : index + 1]  # with the option before it
    env = {**image.env, **SERVICES[name].get("environment", {})}
    command = opened.command(words, user=image.user, workdir=image.workdir)
    return Process(command, env=env, log=logs / f"{name}.log")


def wait_until_healthy(opened: Room, image: Image, name: str, process: Process) -> None:
    """Until the image's own health check, in the service's environment, ends with 0."""
    check = opened.command(STAGES[-1].last("HEALTHCHECK").words, user=image.user, workdir=image.workdir)
    env = {**image.env, **SERVICES[name].get("environment", {})}
    deadline = time.monotonic() + HEALTHY_WITHIN_S
    while (found := subprocess.run(check, env=env, capture_output=True, text=True)).returncode != 0:
        assert not process.has_ended and time.monotonic() < deadline, f"{name}: {found.stderr}\n{process.tail()}"
        time.sleep(2.0)
