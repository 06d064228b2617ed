from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from benchmark.training import figure2
from benchmark.training.characters import (
    CHARACTERS,
    CODES,
    ROW_TOKENS,
    TASKS,
    decode,
    encode,
    pretraining_row,
)
from sglang_prefillshare.training.loss import collate
from sglang_prefillshare.training.sharing_curve import SHARES

TINY = figure2.Sizes(
    hidden=32, layers=1, heads=2, pretrain_steps=3, pretrain_rows=4, finetune_steps=3, finetune_rows=4, eval_prompts=12,
    eval_rows=8,
)  # fmt: skip


def test_every_character_has_a_token() -> None:
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 96
    assert decode(encode("#[a4,k7]k ~\n")) == "#[a4,k7]k ~\n"


def test_data_depends_on_the_seed_alone() -> None:
    def rows(seed: int) -> list[Any]:
        generator = random.Random(seed)
        return [pretraining_row(generator) for _ in range(20)]

    assert rows(1) == rows(1) != rows(2)
    for task, sample in TASKS.items():
        first, again, other = (next(figure2.draw(task, seed)) for seed in ("a", "a", "b"))
        assert first == again != other
        assert first == sample(random.Random("a"))


def test_what_weighs_in_a_pretraining_row_can_be_known() -> None:
    generator = random.Random(0)
    kinds = set()
    for _ in range(300):
        row = pretraining_row(generator)
        certain = [place for place, weight in enumerate(row.weights) if weight == 1]
        assert len(row.text) == ROW_TOKENS and certain
        kinds.add(row.skill)
        if row.skill == "succession":
            assert all(int(row.text[place]) == (int(row.text[place - 1]) + 1) % 10 for place in certain)
            continue
        for place in certain:  # the symbol before it came up earlier, with the same one behind it
            assert row.text[place - 1 : place + 1] in row.text[:place]
    assert kinds == {"succession", "recall", "repetition"}


def test_answers_follow_from_their_prompts() -> None:
    generator = random.Random(0)
    for _ in range(100):
        sample = TASKS["code"](generator)
        pairs = dict(pair for pair in sample.prompt[2 : sample.prompt.index("]")].split(","))  # type: ignore[misc]
        key = sample.prompt[-1]
        assert sample.answer == CODES[int(pairs[key])] + key.upper()
        sample = TASKS["next_key"](generator)
        keys = [pair[0] for pair in sample.prompt[2 : sample.prompt.index("]")].split(",")]
        assert sample.answer.lower() == keys[keys.index(sample.prompt[-1]) + 1]


def run(seed: int) -> dict[str, Any]:
    with Progress(console=Console(quiet=True)) as progress:
        return figure2.run_seed(TINY, seed=seed, progress=progress)


def test_a_seed_repeats_and_the_summary_holds_all(tmp_path: Path) -> None:
    first, again, other = run(0), run(0), run(1)
    for result in (first, again, other):
        assert result.pop("seconds")["total"] > 0
    assert first == again
    summary = {"task": "code", **figure2.summarise([first, other]), "per_seed": [first, other]}
    assert summary["shares"] == list(SHARES)
    for part, task in ((summary, "code"), (summary["limits"], "next_key")):
        for method in figure2.METHODS:
            values = [(first[task][method][place] + other[task][method][place]) / 2 for place in range(len(SHARES))]
            assert part[method] == pytest.approx(values)
            assert part["spread"][method]["min"][0] == min(first[task][method][0], other[task][method][0])
    assert "spread" not in figure2.summarise([first])
    json.dumps(summary)

    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (requirements/dev.txt)")
    from benchmark.training.plot import draw_curves

    draw_curves(summary, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_sees_the_same_examples_and_leaves_the_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = figure2.new_model(TINY, seed=0)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    seen: dict[str, list[Any]] = {}
    for method, share in figure2.METHODS.items():

        def collated(examples: Any, into: str = method) -> Any:
            seen.setdefault(into, []).extend((example.prompt.tolist(), example.base_tokens) for example in examples)
            return collate(examples)

        with monkeypatch.context() as patch:
            patch.setattr(figure2, "collate", collated)
            module = figure2.finetune(base, "code", share, TINY, seed=0, on_step=lambda loss: None)
        assert any(not torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    prompts = {method: [prompt for prompt, _ in examples] for method, examples in seen.items()}
    assert prompts["full_ft"] == prompts["prefillshare"] == prompts["prefillshare_mixed"]
    assert all(count == 0 for _, count in seen["full_ft"])
    assert all(count == len(prompt) - 1 for prompt, count in seen["prefillshare"])
    assert len({count for _, count in seen["prefillshare_mixed"]}) > 2
