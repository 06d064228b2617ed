"""Every script under `benchmark/` and `examples/` runs to its last line, in its smallest form, on real servers.

What a script asks of a machine is in its own tests; here only its end and its file are looked at. Scripts that start
servers of their own are given those that run already, which is all that is replaced besides sizes.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sglang_prefillshare.deployment import Deployment
from test.e2e.conftest import Models

ROOT = Path(__file__).parents[2]
RUN_BY = {
    "benchmark/kernels/copy_pages.py": "test_the_copy_benchmark_in_tritons_interpreter",
    "benchmark/kernels/host_cost.py": "test_scripts_of_one_process",
    "benchmark/kernels/cpu_operators.py": "test_scripts_of_one_process",
    "benchmark/handoff/run.py": "test_scripts_of_one_process",
    "benchmark/handoff/session.py": "test_scripts_with_servers",
    "benchmark/serving/idle.py": "test_scripts_with_servers",
    "benchmark/serving/overload.py": "test_scripts_with_servers",
    "benchmark/serving/connections.py": "test_scripts_of_one_process",
    "benchmark/serving/prefix_index.py": "test_scripts_of_one_process",
    "benchmark/serving/router.py": "test_scripts_with_servers",
    "benchmark/serving/streams.py": "test_scripts_of_one_process",
    "benchmark/training/figure2.py": "test_scripts_of_one_process",
    "benchmark/training/step_cost.py": "test_scripts_of_one_process",
    "benchmark/training/table1.py": "test_table_1",
    "examples/demo/run.py": "test/demo/test_run.py",
    "examples/demo/models.py": "test/demo/test_run.py",  # makes its models
    "examples/demo/oracle.py": "test/demo/test_run.py",  # is its last step
}


def test_every_script_is_run_by_a_test_of_this_file() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("benchmark", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert found == RUN_BY.keys()
    assert all(name in globals() or (ROOT / name).is_file() for name in RUN_BY.values())


def run(module: Any, *options: Any) -> str:
    done = CliRunner().invoke(module.main, [str(option) for option in options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def handoff(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> Path:
    run(module, "--tokens", 16, "--repetitions", 2, "--seconds", 5, "--out", out)
    return out / "bench" / "handoff" / "summary.json"


def host_cost(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> Path:
    assert "wanted 15 us at most" in run(module, "--repeats", 2, "--out", out)
    return out / "bench" / "kernels" / "host_cost.json"


def cpu_operators(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "EXTEND", ((0, 16), (32, 8)))
    patch.setattr(module, "DECODE", ((1, 16), (2, 32)))
    patch.setattr(module, "TOKENS", (1, 8))
    assert "products with weights, bfloat16" in run(module, "--repeats", 1)


def streams(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> Path:
    patch.setattr(os, "sched_setaffinity", lambda *_: None)  # the other tests' cores
    assert "2 clients" in run(module, "--clients", 2, "--seconds", 0.3, "--out", out)
    return out / "bench" / "streams" / "summary.json"


def connections(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> Path:
    few = ("--idle", 10, "--slow", 2, "--half", 2, "--endless", 2, "--seconds", 0.5)
    assert "0 failures" in run(module, *few, "--out", out)
    return out / "bench" / "connections" / "summary.json"


def prefix_index(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "REPEATS", 2)
    assert "4000 blocks of events" in run(module, "--blocks", 100, "--event-blocks", 4000)


def step_cost(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> Path:
    sizes = ("--prompt-tokens", 8, "--response-tokens", 4, "--batch-size", 1, "--steps", 1)
    run(module, *sizes, "--base", models.base, "--out", out)
    return out / "bench" / "training" / "summary.json"


def figure2(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> Path:
    small = dict(hidden=32, layers=1, heads=2, pretrain_rows=4, finetune_rows=4, eval_prompts=12, eval_rows=8)
    patch.setattr(module, "Sizes", partial(module.Sizes, **small))
    run(module, "--threads", 1, "--pretrain-steps", 1, "--finetune-steps", 1, "--out", out)
    assert (out / "curve.png").stat().st_size
    return out / "curve.json"


Small = Callable[[Any, Path, Models, pytest.MonkeyPatch], Path | None]
ALONE: Mapping[str, Small] = {
    "benchmark.handoff.run": handoff,
    "benchmark.kernels.host_cost": host_cost,
    "benchmark.kernels.cpu_operators": cpu_operators,
    "benchmark.serving.streams": streams,
    "benchmark.serving.connections": connections,
    "benchmark.serving.prefix_index": prefix_index,
    "benchmark.training.step_cost": step_cost,
    "benchmark.training.figure2": figure2,
}


@pytest.fixture
def settings_of_torch() -> Iterator[None]:
    """Scripts have processes, and torch, to themselves."""
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("settings_of_torch")
@pytest.mark.parametrize("name", ALONE)
def test_scripts_of_one_process(name: str, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    written = ALONE[name](importlib.import_module(name), tmp_path, models, monkeypatch)
    assert written is None or json.loads(written.read_text())


@pytest.fixture
def served(deployment: Deployment, models: Models, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Give a script the servers that run, in the place of those that it would start."""

    @contextmanager
    def running(*_args: Any, **_kw: Any) -> Iterator[Deployment]:
        yield deployment

    def give(module: Any) -> None:
        monkeypatch.setattr(module, "Deployment", running)

    return give


def idle(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> Path:
    run(module, "--seconds", 1, "--requests", 2, "--out", out)
    return out / "bench" / "idle" / "summary.json"


def router(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> Path:
    run(module, "--requests", 2, "--prompt-tokens", 8, "--out", out)
    return out / "bench" / "router" / "summary.json"


def overload(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> Path:
    sizes = ("--pool-tokens", 64, "--prompt-tokens", 20, "--new-tokens", 4)
    assert "overload, none" in run(module, "--minutes", 0.03, *sizes, "--stream", "--vary", "--out", out)
    return out / "bench" / "overload" / "summary.json"


def session(module: Any, out: Path, models: Models, patch: pytest.MonkeyPatch) -> Path:
    agents = ("planner", "coder", "twin")
    patch.setattr(module, "AGENTS", agents)
    patch.setattr(module, "FIRST_CONTEXT_TOKENS", 100)
    patch.setattr(module, "TOKEN_IDS", (100, 500))
    patch.setattr(module, "prepare_models", lambda _out: {name: getattr(models, name) for name in ("base", *agents)})
    run(module, "--increments", 2, "--turns", 1, "--dtype", "float32", "--out", out)
    return out / "bench" / "handoff" / "session.json"


SERVED: Mapping[str, Small] = {
    "benchmark.serving.idle": idle,
    "benchmark.serving.overload": overload,
    "benchmark.serving.router": router,
    "benchmark.handoff.session": session,
}


@pytest.mark.parametrize("name", SERVED)
def test_scripts_with_servers(
    name: str, tmp_path: Path, models: Models, served: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(name)
    served(module)
    written = SERVED[name](module, tmp_path, models, monkeypatch)
    assert written is not None and json.loads(written.read_text())


def in_a_process(*command: Any, timeout_s: float, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_copy_benchmark_in_tritons_interpreter(tmp_path: Path) -> None:
    """A process of its own: whether kernels are interpreted is decided when they are imported."""
    script, out = ROOT / "benchmark" / "kernels" / "copy_pages.py", tmp_path / "rows.json"
    sizes = ("--layers", 1, "--sizes-mib", 0.0625, "--page-sizes", 4, "--repeats", 2, "--warmup", 0, "--flush-mib", 1)
    in_a_process(script, *sizes, "--out", out, timeout_s=300, TRITON_INTERPRET="1")
    found = {row["variant"] for row in json.loads(out.read_text())["rows"]}
    assert found >= {"copy", "planned", "handoff", "staged", "torch", "limit"}


def test_table_1(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step and one question of one role, with a tiny base: two hours in some seconds."""
    module = importlib.import_module("benchmark.training.table1")
    monkeypatch.setattr(module, "TEST_COUNT", 1)
    monkeypatch.setattr(module.Method, "steps", lambda self, role: 1)

    def made(one: Any, out: Path) -> Any:
        module.make(one, models.base, out)
        return module.result_of(one, out)

    monkeypatch.setattr(module, "made", made)
    monkeypatch.setattr(module, "prepare_base", lambda _out: models.base)
    run(module, "--role", "coder", "--method", "prefillshare", "--out", tmp_path)
    assert json.loads((tmp_path / "table.json").read_text())["test_questions"] == 1
