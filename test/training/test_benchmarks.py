"""What `make table1` and `make bench-training` make of their measurements. The measuring is theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark.training.step_cost import Config, Trained, Variant, peak_bytes
from benchmark.training.step_cost import summarise as summarise_steps
from benchmark.training.table1 import METHODS, Run, is_right, kept, result_of, score, summarise, table, write_data
from examples.demo.rounds import ROLES, Role


def measured(own: float | None, base: float | None, *, exact: float = 0.5) -> dict[str, dict[str, float]]:
    """What is kept of a run: right answers at each share, and `exact` times as many exact matches."""
    accuracy = {share: value for share, value in (("0.0", own), ("1.0", base)) if value is not None}
    return {"accuracy": accuracy, "exact_match": {share: exact * value for share, value in accuracy.items()}}


def test_a_table_has_the_mean_over_seeds_of_each_method_at_each_share() -> None:
    results = {}
    for seed, right in ((0, 0.5), (1, 0.75)):
        results[Run("coder", "prefillshare", seed)] = measured(None, right)
        results[Run("coder", "prefillshare_2x", seed)] = measured(None, 1.0)
        results[Run("coder", "full_ft", seed)] = measured(1.0, right / 2)
    results[Run("coder", "full_ft_2x", 0)] = measured(0.8, 0.4)
    roles = summarise(results)["roles"]
    assert list(roles) == ["coder"]
    assert roles["coder"]["accuracy"]["mean"] == {
        "prefillshare_at_1": 0.625, "prefillshare_2x_at_1": 1.0, "full_ft_at_0": 1.0, "full_ft_at_1": 0.3125,
        "full_ft_2x_at_0": 0.8, "full_ft_2x_at_1": 0.4,
    }  # fmt: skip
    assert roles["coder"]["accuracy"]["per_seed"]["full_ft_at_1"] == [0.25, 0.375]
    assert roles["coder"]["exact_match"]["per_seed"]["full_ft_at_1"] == [0.125, 0.1875]


def test_a_table_is_of_the_runs_that_are_kept(tmp_path: Path) -> None:
    for name, accuracy in (("coder-full_ft-0", 0.9), ("coder-full_ft-1", 0.8), ("reviewer-prefillshare_2x-0", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(measured(accuracy, 0.25)))
    (tmp_path / "coder-prefillshare-0").mkdir()  # is being trained
    runs = kept(tmp_path)
    assert [run.name for run in runs] == ["coder-full_ft-0", "coder-full_ft-1", "reviewer-prefillshare_2x-0"]
    drawn = table({"test_questions": 8, **summarise({run: result_of(run, tmp_path) for run in runs})})
    assert [list(column.cells) for column in drawn.columns] == [
        ["coder", "reviewer"], ["full_ft", "prefillshare_2x"], ["160", "320"], ["8", "8"],
        ["85.0 (80.0-90.0)", ""], ["25.0 (25.0-25.0)", "25.0"],
        ["42.5 (40.0-45.0)", ""], ["12.5 (12.5-12.5)", "12.5"],
    ]  # fmt: skip


def test_code_is_right_where_it_computes_what_is_wanted_and_a_plan_as_an_exact_match() -> None:
    wanted = ["set(xs)", "sum(xs)", "max(xs)", '" ".join(ws)']
    answers = ["set(x for x in xs)", "sum(xs)", None, '" ".join(sorted(ws))']
    found = score("coder", {0.0: answers, 1.0: wanted}, wanted)
    assert found == {"accuracy": {"0.0": 0.5, "1.0": 1.0}, "exact_match": {"0.0": 0.25, "1.0": 1.0}}
    assert not is_right("planner", "set(x for x in xs)", "set(xs)")
    assert not is_right("reviewer", "exit()", "set(xs)") and not is_right("reviewer", "", "set(xs)")


@pytest.mark.parametrize("role", ROLES)
def test_both_methods_have_the_same_data_and_steps_where_they_are_compared(role: Role) -> None:
    for suffix in ("", "_2x", "_long"):
        shared, ordinary = METHODS[f"prefillshare{suffix}"], METHODS[f"full_ft{suffix}"]
        assert replace(shared, of_recipe=ordinary.of_recipe) == ordinary
    for method in METHODS.values():
        assert method.batch_size * method.steps(role) == method.epochs * method.examples(role)


def test_a_longer_training_begins_with_the_same_examples_and_has_none_twice(tmp_path: Path) -> None:
    write_data(tmp_path)
    for role in ROLES:
        train, long, test = (
            (tmp_path / "data" / f"{role}.{name}.jsonl").read_text().splitlines() for name in ("train", "long", "test")
        )
        assert long[: len(train)] == train and len(set(long)) == len(long) > len(train)
        assert len(test) == 200


@pytest.mark.parametrize("role", ROLES)
def test_a_run_is_found_again_by_its_name(role: str) -> None:
    run = Run.named(f"{role}-full_ft-3")
    assert (run.role, run.method, run.seed) == (role, "full_ft", 3) and run.name == f"{role}-full_ft-3"


def test_speed_is_compared_step_by_step_and_memory_with_one_copy_of_the_base() -> None:
    full, shared, lora, shared_lora = (
        Variant(method, weights) for weights in ("full", "lora") for method in ("full-ft", "prefillshare")
    )
    samples = {full: [4.0, 8.0, 6.0], shared: [2.0, 2.0, 3.0], lora: [1.0, 1.0, 1.0], shared_lora: [1.0, 0.5, 2.0]}
    found = summarise_steps(samples, {full: 100, shared: 130, lora: 60, shared_lora: 50}, 40)["compared"]
    assert found["full"] == {
        "speedup": 2.0, "speedup_min": 2.0, "speedup_max": 4.0, "more_bytes": 30, "allowed_more_bytes": 40,
    }  # fmt: skip
    assert found["lora"]["speedup"] == 1.0 and found["lora"]["more_bytes"] == -10


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("method", ["full-ft", "prefillshare"])
def test_every_way_to_train_makes_steps(method: str, weights: str, base_folder: Path) -> None:
    config = Config(str(base_folder), 12, 3, 2, 1, 0, "float32", "cpu", 1)
    trained = Trained(Variant(method, weights), config)
    before = [weight.clone() for weight in trained.weights]
    trained.step()
    assert any(not weight.equal(old) for weight, old in zip(trained.weights, before, strict=True))
    assert trained.base_bytes > 0 and peak_bytes("cpu") > trained.base_bytes
