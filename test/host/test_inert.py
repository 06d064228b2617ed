"""Installed means inert (contract 5): without our flags, SGLang is configured and hooked as if we were not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test.support.models import make_base

_DESCRIBE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import prepare_server_args
import sglang.srt.managers.scheduler, sglang.srt.disaggregation.decode, sglang.srt.disaggregation.prefill
import sglang.srt.managers.tokenizer_manager, sglang.srt.entrypoints.http_server
import msgspec
args = prepare_server_args(sys.argv[1:])
args.resolve_once()
from sglang.srt.arg_groups.overrides import resolved_view
view = resolved_view(args)
fields = {name: repr(getattr(view, name)) for name in msgspec.structs.asdict(args)}
print("RESULT" + json.dumps({"fields": fields, "hooks": sorted(HookRegistry._patched)}))
"""


def describe(model: Path, *, plugins: str) -> dict[str, Any]:
    """SGLang's resolved configuration and its patched functions, in a process with only these plugins."""
    command = [sys.executable, "-c", _DESCRIBE, "--model-path", str(model), "--dtype", "float32"]
    command += ["--random-seed", "1", "--port", "30500", "--nccl-port", "30501"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "SGLANG_PLUGINS": plugins}, timeout=110
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("inert") / "model")


def test_without_our_flags_every_setting_is_what_it_is_without_us(model: Path) -> None:
    # The CPU platform stays on both sides: without it SGLang does not run on a CPU at all.
    without = describe(model, plugins="prefillshare_cpu")
    installed = describe(model, plugins="prefillshare_cpu,prefillshare")
    assert installed["fields"] == without["fields"]
    assert without["hooks"] == []
    allowed = {
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "sglang.srt.server_args.ServerArgs.check_server_args",
    }
    assert set(installed["hooks"]) <= allowed, "only the flags may be hooked before a role is chosen"
