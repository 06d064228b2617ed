"""SGLang's own benchmark runs against our router as it is, over several turns; the README shows the command."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sglang_prefillshare.deployment import Deployment

CONVERSATIONS = 4
OUTPUT_TOKENS = 8


@pytest.mark.parametrize(
    ("backend", "turns", "target"),
    [
        ("sglang", 1, ["--base-url", "{router}/m/planner"]),
        ("sglang-oai-chat", 3, ["--base-url", "{router}", "--model", "coder"]),  # the only one that has turns
    ],
)
def test_generated_shared_prefix(
    deployment: Deployment, models: Any, tmp_path: Path, backend: str, turns: int, target: list[str]
) -> None:
    out = tmp_path / "result.jsonl"
    command = [
        *(sys.executable, "-m", "sglang.benchmark.serving", "--backend", backend),
        *(word.format(router=deployment.router_url) for word in target),
        *("--tokenizer", str(models.base), "--dataset-name", "generated-shared-prefix"),
        *("--gsp-num-groups", "2", "--gsp-prompts-per-group", "2", "--gsp-num-turns", str(turns)),
        *("--gsp-system-prompt-len", "100", "--gsp-question-len", "20", "--gsp-output-len", str(OUTPUT_TOKENS)),
        *("--gsp-send-routing-key", "--num-prompts", str(CONVERSATIONS), "--seed", "5"),
        *("--output-file", str(out), "--disable-tqdm"),
    ]
    # It asks the hub about a model without a name, for 47 s where no hub can be reached.
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=offline)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    result = json.loads(out.read_text().splitlines()[-1])
    assert result["completed"] == CONVERSATIONS * turns, ran.stdout[-3000:]
    assert result["total_output_tokens"] == CONVERSATIONS * turns * OUTPUT_TOKENS
    calls = asyncio.run(last_calls(deployment, CONVERSATIONS * turns))
    assert {call["outcome"] for call in calls} == {"ok"}
    if turns > 1:  # each turn finds the one before it
        assert sum(call["cached_tokens"] for call in calls) > 0.5 * sum(call["prefill_tokens"] for call in calls)


async def last_calls(deployment: Deployment, count: int) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession() as client, client.get(f"{deployment.router_url}/calls?limit={count}") as found:
        return list((await found.json())["calls"])
