from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.training.recipe import (
    Columns,
    Data,
    Lora,
    RandomShare,
    Recipe,
    Source,
    Training,
    load_recipe,
    parse_recipe,
)

ROOT = Path(__file__).parents[2]

TEXT = "base: base\noutput: out\ndata: {train: a.jsonl}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "a.jsonl").write_text("")
    return tmp_path


def parsed(folder: Path, text: str, *overrides: str) -> Recipe:
    return parse_recipe(text, source="r.yaml", directory=folder, overrides=overrides)


def test_defaults_are_the_papers(folder: Path) -> None:
    recipe = parsed(folder, TEXT)
    training = recipe.training
    assert (recipe.method, recipe.share, recipe.weights) == ("prefillshare", 1.0, "full")
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 16)
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.999, 0.1)
    assert (training.warmup_ratio, training.max_grad_norm, training.num_train_epochs) == (0.03, 0.0, 1.0)
    assert recipe.data.max_length == 1024


def test_paths_are_looked_up_beside_the_recipe(folder: Path) -> None:
    (folder / "r.yaml").write_text(TEXT)
    recipe = load_recipe(folder / "r.yaml")
    assert recipe.base == str(folder / "base")
    assert recipe.data.train[0].path == str(folder / "a.jsonl")


def test_sources_take_three_forms(folder: Path) -> None:
    text = (
        "base: base\noutput: out\ndata:\n  train: [a.jsonl, {path: org/name, split: test}]\n  eval: {path: a.jsonl}\n"
    )
    data = parsed(folder, text).data
    assert [(source.path, source.split) for source in data.train[1:]] == [("org/name", "test")]
    assert len(data.eval) == 1


def test_overrides_win_and_are_read_as_yaml(folder: Path) -> None:
    recipe = parsed(
        folder,
        TEXT + "training: {seed: 1}\n",
        "training.seed=2",
        "training.learning_rate=2e-5",
        "share={random: 0.5}",
        "weights=lora",
        "lora.r=4",
        "training.extra.fsdp=full_shard",
    )
    assert recipe.training.seed == 2
    assert recipe.learning_rate == 2e-5
    assert recipe.share == RandomShare(random=0.5)
    assert recipe.lora == Lora(r=4)
    assert recipe.training.extra == {"fsdp": "full_shard"}


@pytest.mark.parametrize("text", ["1e-5", "1E-05", "1.0e-5", "0.00001"])
def test_learning_rates_may_be_written_as_people_do(folder: Path, text: str) -> None:
    assert parsed(folder, TEXT + f"training: {{learning_rate: {text}}}\n").learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml is empty, wanted the keys base, output and data"),
        ("[1]", "r.yaml is a list"),
        ("a: [", "r.yaml:1: not valid YAML"),
        ("base: base\nbase: base\n", "r.yaml:2: base is given twice, first in line 1"),
        ("base: base\ndata: {train: a.jsonl}\n", "r.yaml: output is missing"),
        (TEXT + "shares: 1\n", "r.yaml:4: unknown key shares. Did you mean share?"),
        (TEXT + "training:\n  sed: 1\n", "r.yaml:5: unknown key training.sed. Did you mean seed?"),
        (TEXT + "training:\n  seed: one\n", "r.yaml:5: training.seed is 'one', wanted a whole number"),
        (TEXT + "training: 3\n", "r.yaml:4: training is 3, wanted a mapping"),
        (TEXT + "method: lora\n", "r.yaml:4: method is 'lora', wanted prefillshare or full-ft"),
        (TEXT + "share: 1.5\n", "r.yaml:4: share is 1.5, wanted 0 to 1, or {random: PROBABILITY}"),
        (TEXT + "share: {random: 2}\n", "random is 2.0, wanted a probability, 0 to 1"),
        (TEXT + "share: {rnd: 1}\n", "r.yaml:4: unknown key share.rnd"),
        (TEXT + "method: full-ft\nshare: 0.5\n", "share is 0.5 with method full-ft"),
        (TEXT + "lora: {r: 8}\n", "lora is given with weights: full"),
        (TEXT + "weights: lora\ninit: base\n", "init is given with weights: lora"),
        (TEXT + "weights: lora\nlora: {r: 0}\n", "lora: r is 0, wanted 1 or more"),
        (TEXT + "resume: true\noverwrite: true\n", "contradict each other"),
        (TEXT + "training: {max_steps: 0}\n", "max_steps is 0, wanted 1 or more, or -1"),
        ("base: ./gone\noutput: o\ndata: {train: a.jsonl}\n", "model './gone' does not exist"),
        ("base: base\noutput: o\ndata: {train: gone.jsonl}\n", "data file 'gone.jsonl' does not exist"),
        ("base: base\noutput: o\ndata: {train: []}\n", "wanted one source or more"),
        ("base: base\noutput: o\ndata:\n  train:\n  - a.jsonl\n  - {pth: x}\n", "r.yaml:6: unknown key data.train[1]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(folder, text)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed", "override is 'training.seed', wanted KEY=VALUE"),
        (".seed=1", "wanted KEY=VALUE"),
        ("training.seed=x", "override 'training.seed=x': training.seed is 'x', wanted a whole number"),
        ("training.sed=1", "override 'training.sed=1': unknown key training.sed. Did you mean seed?"),
        ("base.path=x", "base is text in the recipe, wanted a mapping"),
        ("data.max_length=2", "override 'data.max_length=2': data: max_length is 2, wanted 3 or more"),
    ],
)
def test_a_wrong_override_is_named(folder: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(folder, TEXT, override)
    assert message in str(refused.value)


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_recipes_are_frozen_and_plain(folder: Path) -> None:
    recipe = parsed(folder, TEXT)
    with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
        recipe.base = "other"  # type: ignore[misc]
    assert msgspec.convert(recipe.to_json(), Recipe) == recipe


def test_the_documentation_knows_every_key() -> None:
    documentation = (ROOT / "docs" / "training.md").read_text()
    for part in (Recipe, Lora, RandomShare, Data, Source, Columns, Training):
        for name in part.__struct_fields__:
            assert f"`{name}`" in documentation, f"docs/training.md does not mention {name} of {part.__name__}"


def test_the_example_recipe_is_one(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "training" / "recipe.yaml").read_text()
    (tmp_path / "out" / "models" / "base").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "training" / "data.jsonl", tmp_path)
    recipe = parse_recipe(
        text.replace("out/models/base", str(tmp_path / "out" / "models" / "base")), source="recipe", directory=tmp_path
    )
    assert recipe.method == "prefillshare"


def test_importing_the_package_or_parsing_a_recipe_loads_no_torch() -> None:
    package = "sglang_prefillshare.training"
    code = (
        f"import sys, {package}, {package}.recipe, {package}.run, {package}.merge; "
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
