"""An image made without an engine: all steps of a Dockerfile, each stage in a copy of a clean Debian."""

from __future__ import annotations

import os
import shutil
import string
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from test.support.container import registries
from test.support.container.dockerfile import Stage, Step
from test.support.container.room import PATH, Bind, User, lacking, room

IMAGES = {"python:3.11-slim-bookworm": ("bookworm", ("ca-certificates", "netbase", "python3-venv", "tzdata"))}
"""What stands here for an image of a registry: a Debian suite, and packages that make it as able as that image."""

STEP_TIMEOUT_S = 3600.0
_ENV = {"PATH": PATH, "LANG": "C.UTF-8"}

Ignored = Callable[[str, list[str]], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Image:
    """What the last stage left, and how a container of it begins. `seconds` is by step, as the file has it."""

    root: Path
    base: Path
    env: Mapping[str, str]
    workdir: str
    user: User
    seconds: Mapping[str, float]


@dataclass(slots=True)
class _Stage:
    """A stage under way: its root, and what the steps so far have set."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: dict(_ENV))
    workdir: str = "/"
    user: User = field(default_factory=User)


def lacking_for_images() -> str:
    """What this machine lacks to make an image, in words; empty if nothing."""
    if shutil.which("debootstrap") is None:
        return "debootstrap (apt install debootstrap)"
    return lacking()


def build(stages: Sequence[Stage], context: Path, folder: Path) -> Image:
    """Run all steps. `folder` then holds the root of the last stage and the clean one that it began with.

    Raises `AssertionError` with the step and the end of its output where one fails.
    """
    ignored = shutil.ignore_patterns(*_ignored_everywhere(context))
    seconds: dict[str, float] = {}
    clean: dict[str, Path] = {}
    done: dict[str | None, _Stage] = {}
    for number, stage in enumerate(stages):
        if stage.base not in clean and stage.base not in done:
            began = time.monotonic()
            clean[stage.base] = _debian(stage.base, folder / f"base-{number}")
            seconds[f"FROM {stage.base}"] = time.monotonic() - began
        root = folder / f"stage-{number}"
        before = done.get(stage.base) or _Stage(clean[stage.base])
        subprocess.run(["cp", "-a", str(before.root), str(root)], check=True)
        state = done[stage.name] = _Stage(root, dict(before.env), before.workdir, before.user)
        for step in stage.steps:
            began = time.monotonic()
            _take(step, state, context, done, ignored)
            seconds[str(step)] = time.monotonic() - began
    last = done.pop(stages[-1].name)
    for other in done.values():
        shutil.rmtree(other.root)
    return Image(last.root, clean[stages[-1].base], last.env, last.workdir, last.user, seconds)


def _debian(image: str, root: Path) -> Path:
    if image not in IMAGES:
        raise ValueError(f"found FROM {image}, wanted one of {sorted(IMAGES)}. Say in IMAGES what stands for it here.")
    suite, packages = IMAGES[image]
    options = ["--variant=minbase", f"--include={','.join(packages)}"]
    made = subprocess.run(
        ["debootstrap", *options, suite, str(root), registries.debian_mirror(suite)],
        env=_ENV | registries.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=STEP_TIMEOUT_S,
    )
    assert made.returncode == 0, f"debootstrap ended with {made.returncode}:\n{made.stdout[-4000:]}"
    (root / "etc/apt/apt.conf.d/99registries").write_text(registries.apt_settings())
    return root


def _take(step: Step, state: _Stage, context: Path, done: Mapping[str | None, _Stage], ignored: Ignored) -> None:
    match step.instruction:
        case "ARG":
            name, _, default = step.value.partition("=")
            if default:
                state.env.setdefault(name, default)
        case "ENV":
            before = dict(state.env)
            for word in step.words:
                name, _, value = word.partition("=")
                state.env[name] = string.Template(value).safe_substitute(before)
        case "WORKDIR":
            state.workdir = os.path.join(state.workdir, step.value)
            _in(state.root, state.workdir).mkdir(parents=True, exist_ok=True)
        case "USER":
            state.user = _user(state.root, int(step.value))
        case "COPY":
            assert step.options.keys() <= {"from"}, f"found {step}, wanted no option but --from"
            source_root, left_out = (done[step.options["from"]].root, None) if step.options else (context, ignored)
            *sources, target = step.words
            for source in sources:
                place = os.path.join(state.workdir, target)
                _copy(_in(source_root, source), _in(state.root, place), is_into=target.endswith("/"), left_out=left_out)
        case "RUN":
            _run(step, state)
        case "CMD" | "HEALTHCHECK":
            assert step.words, f"found {step}, wanted the form of a list"


def _run(step: Step, state: _Stage) -> None:
    env = registries.environment() | state.env
    binds = [Bind(path, path) for path in registries.local_paths(env)]
    with room(state.root, binds=binds, has_network=True) as opened:
        ran = subprocess.run(
            opened.command(["/bin/sh", "-c", step.value], user=state.user, workdir=state.workdir),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=STEP_TIMEOUT_S,
        )
    assert ran.returncode == 0, f"{step}\nended with {ran.returncode}:\n{ran.stdout[-4000:]}"


def _copy(source: Path, target: Path, *, is_into: bool, left_out: Ignored | None) -> None:
    """As COPY does: what a folder holds; or one file, into a folder where the step or what is there says so."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=left_out, dirs_exist_ok=True)
        return
    if is_into or target.is_dir():
        target = target / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def _in(root: Path, path: str) -> Path:
    return root / path.removeprefix("./").lstrip("/")


def _user(root: Path, uid: int) -> User:
    for line in (root / "etc/passwd").read_text().splitlines():
        fields = line.split(":")
        if int(fields[2]) == uid:
            return User(uid, int(fields[3]), is_privileged=False)
    raise AssertionError(f"found no user {uid} in the image, wanted one that a step before USER makes")


def _ignored_everywhere(context: Path) -> list[str]:
    lines = (context / ".dockerignore").read_text().splitlines()
    return [line.removeprefix("**/").rstrip("/") for line in lines if line.startswith("**/")]
