"""What `prefillshare train` made is served, and answers as the offline evaluation of the same weights does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("peft", reason="waits for the packages of requirements/train.txt: run `make setup`")

from sglang_prefillshare.cli import cli
from sglang_prefillshare.deployment import Deployment
from test.support.models import make_base
from test.support.oracle import Oracle, clear_prompt
from test.support.servers import deploy, greedy, post, session, topology

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base, and a module trained on its KV: an adapter, merged into whole weights."""
    folder = tmp_path_factory.mktemp("trained")
    base = make_base(folder / "base", seed=51)
    lines = [{"prompt": f"Plan {word} in steps.", "completion": f"First {word}, then rest."} for word in "abcdefgh"]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"base: {base}\noutput: {folder / 'adapter'}\nweights: lora\ndata: {{train: data.jsonl}}\n"
        "training: {learning_rate: 1e-2, max_steps: 12, per_device_train_batch_size: 4, report_to: none}\n"
    )
    for command in (["train", str(recipe)], ["merge", str(folder / "adapter"), str(folder / "planner")]):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
    return base, folder / "planner"


def test_a_trained_module_is_served_and_generates_what_it_does_offline(trained: tuple[Path, Path]) -> None:
    base, planner = trained
    oracle = Oracle(base, planner)
    prompts = [clear_prompt(oracle, length, NEW_TOKENS, seed=60 + length) for length in (2, 30, 180)]
    wanted = [oracle.generate(prompt, NEW_TOKENS).token_ids for prompt in prompts]
    untrained = Oracle(base, base)
    assert [untrained.generate(prompt, NEW_TOKENS).token_ids for prompt in prompts] != wanted, (
        "training changed nothing"
    )

    async def run(deployment: Deployment) -> list[list[int]]:
        async with session() as client:
            url = f"{deployment.router_url}/generate"
            return [(await post(client, url, greedy(p, NEW_TOKENS, model="planner"))).token_ids for p in prompts]

    with deploy(topology(base, {"planner": planner})) as running:  # starts only with the manifest that training wrote
        assert asyncio.run(run(running)) == wanted
