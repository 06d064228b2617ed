from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity.fingerprint import identify_base
from sglang_prefillshare.identity.manifest import check_manifest, read_manifest
from sglang_prefillshare.training.loss import Example, base_prefill, collate, response_logits
from sglang_prefillshare.training.merge import merge
from sglang_prefillshare.training.run import TrainSummary, train, train_recipe
from test.support.models import SPECIAL_TOKENS, VOCAB_SIZE, make_base
from test.support.oracle import generate, load_model
from test.training.toys import needs_peft, recipe, sums, write_jsonl

METHODS = ["prefillshare", "full-ft"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", sums(16))


def run(folder: Path, base: Path, data: Path, *overrides: str) -> TrainSummary:
    return train_recipe(recipe(folder, base, data, *overrides))


def saved(summary: TrainSummary) -> dict[str, torch.Tensor]:
    file = "adapter_model.safetensors" if summary.weights == "lora" else "model.safetensors"
    return dict(load_file(summary.output / file))


def losses(summary: TrainSummary) -> list[float]:
    log = json.loads((summary.output / "training.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_full_weights_become_an_ordinary_checkpoint(tmp_path: Path, base_folder: Path, data: Path, method: str) -> None:
    before = {file.name: file.read_bytes() for file in base_folder.iterdir() if file.is_file()}
    summary = run(tmp_path, base_folder, data, f"method={method}", f"data.eval={data}", "training.num_train_epochs=2")

    assert summary.steps == 8 and summary.examples == 16
    module = AutoModelForCausalLM.from_pretrained(summary.output)
    assert module.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(summary.output).chat_template
    assert (summary.output / "config.json").read_bytes() == before["config.json"]
    assert {file.name: file.read_bytes() for file in base_folder.iterdir() if file.is_file()} == before
    record = json.loads((summary.output / "training.json").read_text())
    assert record["recipe"]["method"] == method and record["base_fingerprint"] == summary.base_fingerprint
    assert record["data"]["train"]["examples"] == 16
    assert summary.metrics["eval_loss"] < losses(summary)[0]
    manifest = read_manifest(summary.output)
    if method == "full-ft":
        assert manifest is None and "no prefillshare.json" in summary.describe()
    else:
        assert manifest is not None
        check_manifest(manifest, identify_base(base_folder))


def test_a_recipe_file_with_overrides_is_one_call(tmp_path: Path, base_folder: Path, data: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: {base_folder}\noutput: {tmp_path / 'out'}\ndata: {{train: data.jsonl}}\n")
    summary = train(path, ["training.max_steps=1", "training.report_to=none", "training.bf16=false"])
    assert summary.steps == 1 and str(tmp_path / "out") in summary.describe()


def test_what_trains_is_the_cache_conditioned_loss(tmp_path: Path, base_folder: Path, data: Path) -> None:
    """With rate 0 the evaluation must give the base's own ordinary loss: the module is still the base."""
    summary = run(
        tmp_path, base_folder, data, f"data.eval={data}", "training.learning_rate=1e-12", "training.weight_decay=0",
        "training.per_device_eval_batch_size=3",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = load_model(base_folder)
    total, count = 0.0, 0
    for record in sums(16):
        prompt = tokenizer(record["prompt"])["input_ids"]
        response = [*tokenizer(record["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            scores = base(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        for place, token in enumerate(response, start=len(prompt) - 1):
            total -= float(scores[place, token])
        count += len(response)
    assert summary.metrics["eval_loss"] == pytest.approx(total / count, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_how_a_batch_is_split_does_not_change_the_trajectory(
    tmp_path: Path, base_folder: Path, data: Path, method: str
) -> None:
    # SGD, because AdamW makes a whole step of a gradient that is only noise.
    split = {
        f"{size}x{steps}": run(
            tmp_path, base_folder, data, f"method={method}", f"output={tmp_path / f'{size}x{steps}'}",
            f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={steps}",
            "training.num_train_epochs=2", "training.learning_rate=0.05", "training.extra.optim=sgd",
        )
        for size, steps in ((8, 1), (1, 8), (2, 4))
    }  # fmt: skip
    wanted = split.pop("8x1")
    assert losses(wanted)[-1] < losses(wanted)[0]
    for summary in split.values():
        assert losses(summary) == pytest.approx(losses(wanted), abs=2e-5)
        torch.testing.assert_close(saved(summary), saved(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["full", pytest.param("lora", marks=needs_peft)])
def test_resuming_equals_a_run_without_a_break(tmp_path: Path, base_folder: Path, data: Path, weights: str) -> None:
    settings = [
        f"weights={weights}", "share={random: 0.7}", "training.num_train_epochs=3", "training.save_steps=5",
        "training.gradient_accumulation_steps=1", *(["lora.dropout=0.1"] if weights == "lora" else []),
    ]  # fmt: skip
    whole = run(tmp_path, base_folder, data, *settings)
    wanted = saved(whole)
    # As if it had been stopped in the second epoch, after step 5.
    for path in [*whole.output.glob("*.*"), whole.output / "checkpoints" / "checkpoint-10"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    resumed = run(tmp_path, base_folder, data, *settings, "resume=true")

    assert resumed.steps == whole.steps == 12
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in saved(resumed).items())


def test_resuming_another_run_is_refused(tmp_path: Path, base_folder: Path, data: Path) -> None:
    run(tmp_path, base_folder, data, "training.max_steps=2", "training.save_steps=1")
    for override, message in (
        ("training.seed=7", "training.seed 42 -> 7"),
        ("share=0.5", "share 1.0 -> 0.5"),
        ("training.max_steps=3", "training.max_steps 2 -> 3"),
    ):
        settings = ["training.max_steps=2", "training.save_steps=1", "resume=true", override]
        with pytest.raises(ConfigError, match="would not continue the same run") as refused:
            run(tmp_path, base_folder, data, *settings)
        assert message in str(refused.value)
    write_jsonl(data, sums(15))
    with pytest.raises(ConfigError, match="training data is not that of the run so far"):
        run(tmp_path, base_folder, data, "training.max_steps=2", "training.save_steps=1", "resume=true")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        run(tmp_path, base_folder, data, "resume=true", f"output={tmp_path / 'other'}")
    with pytest.raises(ConfigError, match="which is no checkpoint"):
        run(tmp_path, base_folder, data, f"resume={tmp_path}")


def test_random_shares_repeat_under_one_seed_and_differ_from_a_whole_share(
    tmp_path: Path, base_folder: Path, data: Path
) -> None:
    def final(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        return saved(run(tmp_path, base_folder, data, f"output={tmp_path / name}", *overrides))

    first = final("first", "share={random: 1.0}")
    again = final("again", "share={random: 1.0}")
    whole = final("whole")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], whole[name]) for name in first)


def test_share_0_is_ordinary_fine_tuning(tmp_path: Path, base_folder: Path, data: Path) -> None:
    settings = ["training.learning_rate=0.05", "training.extra.optim=sgd"]
    ordinary = run(tmp_path, base_folder, data, *settings, "method=full-ft", f"output={tmp_path / 'ft'}")
    share_0 = run(tmp_path, base_folder, data, *settings, "share=0", f"output={tmp_path / 'share-0'}")
    torch.testing.assert_close(saved(share_0), saved(ordinary), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["full", pytest.param("lora", marks=needs_peft)])
def test_gradient_checkpointing_trains_the_same_module(
    tmp_path: Path, base_folder: Path, data: Path, weights: str
) -> None:
    settings = [f"weights={weights}", "training.learning_rate=0.05", "training.extra.optim=sgd", "share={random: 0.5}"]
    plain = run(tmp_path, base_folder, data, *settings, f"output={tmp_path / 'plain'}")
    checkpointed = run(
        tmp_path, base_folder, data, *settings, "training.gradient_checkpointing=true", f"output={tmp_path / 'gc'}"
    )
    torch.testing.assert_close(saved(checkpointed), saved(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["full", pytest.param("lora", marks=needs_peft)])
def test_bf16_trains(tmp_path: Path, base_folder: Path, data: Path, weights: str) -> None:
    settings = [f"weights={weights}", "training.num_train_epochs=3"]
    plain = run(tmp_path, base_folder, data, *settings, f"output={tmp_path / 'plain'}")
    bf16 = run(tmp_path, base_folder, data, *settings, f"output={tmp_path / 'bf16'}", "training.bf16=true")
    assert losses(bf16) == pytest.approx(losses(plain), rel=0.03)
    assert losses(bf16)[-1] < losses(bf16)[0]


def test_a_module_can_start_from_other_weights_than_the_base(
    tmp_path: Path, base_folder: Path, module_folder: Path, data: Path
) -> None:
    summary = run(
        tmp_path, base_folder, data, f"init={module_folder}", "training.learning_rate=1e-12", "training.weight_decay=0"
    )
    wanted = load_file(module_folder / "model.safetensors")
    torch.testing.assert_close(saved(summary), dict(wanted), atol=1e-6, rtol=0)
    manifest = read_manifest(summary.output)
    assert manifest is not None and manifest.base_fingerprint == identify_base(base_folder).model_fingerprint
    other = make_base(tmp_path / "wider", head_dim=32, layers=2)
    with pytest.raises(IdentityError, match="cannot read the base's KV"):
        run(tmp_path, base_folder, data, f"init={other}", f"output={tmp_path / 'other'}")


@pytest.mark.parametrize("tied", [False, True])
def test_a_bf16_base_makes_a_bf16_module_with_the_same_tensors(
    tmp_path: Path, folders: dict[Any, Path], data: Path, tied: bool
) -> None:
    base = tmp_path / "bf16-base"
    shutil.copytree(folders["qwen3", tied], base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    summary = run(tmp_path, base, data)
    before = load_file(base / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in saved(summary).items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved(summary).values())


# LoRA


@needs_peft
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("arch", "tied"), [("llama", False), ("qwen3", True)])
def test_a_merged_adapter_answers_as_the_adapter_does(
    tmp_path: Path, folders: dict[Any, Path], data: Path, arch: str, tied: bool, method: str
) -> None:
    from peft import PeftModel

    base = folders[arch, tied]
    summary = run(
        tmp_path, base, data, "weights=lora", f"method={method}", "training.learning_rate=3e-2", "lora.r=4",
        "training.num_train_epochs=2",
    )  # fmt: skip
    assert "lora_B" in " ".join(saved(summary)) and not (summary.output / "model.safetensors").exists()
    assert losses(summary)[-1] < losses(summary)[0]
    adapter = PeftModel.from_pretrained(load_model(base), summary.output).eval()
    prompt = [5, 9, 40, 77, 123]
    expected = generate(load_model(base), adapter, prompt, 8).token_ids

    merged = merge(summary.output, tmp_path / "merged")

    module = load_model(merged)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        torch.testing.assert_close(module(ids).logits, adapter(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(module(ids).logits, load_model(base)(ids).logits, atol=1e-2)
    assert generate(load_model(base), module, prompt, 8).token_ids == expected
    manifest = read_manifest(merged)
    assert (manifest is None) == (method == "full-ft")
    if manifest is not None:
        check_manifest(manifest, identify_base(base))


@needs_peft
def test_the_base_of_an_adapter_is_its_own_weights_with_the_adapter_off(
    tmp_path: Path, base_folder: Path, data: Path
) -> None:
    """The same run with a second copy as its base must take the same steps."""
    from sglang_prefillshare.training import run as running
    from sglang_prefillshare.training.trainer import frozen_copy

    settings = ["weights=lora", "training.learning_rate=1e-2", "training.num_train_epochs=2"]
    one = run(tmp_path, base_folder, data, *settings, f"output={tmp_path / 'one'}")
    before = running._base_source
    copy = load_model(base_folder).requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_base_source", lambda *_: frozen_copy(copy))
        two = run(tmp_path, base_folder, data, *settings, f"output={tmp_path / 'two'}")
    assert running._base_source is before
    assert all(torch.equal(tensor, saved(two)[name]) for name, tensor in saved(one).items())


@needs_peft
def test_merging_is_refused_for_another_base_or_folder(tmp_path: Path, base_folder: Path, data: Path) -> None:
    summary = run(tmp_path, base_folder, data, "weights=lora", "training.max_steps=1")
    other = make_base(tmp_path / "other", layers=2, head_dim=16, seed=99)
    with pytest.raises(IdentityError, match="the base's weights changed"):
        merge(summary.output, tmp_path / "merged", base=str(other))
    with pytest.raises(ConfigError, match="has no adapter_config"):
        merge(base_folder, tmp_path / "merged")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        merge(summary.output, summary.output)
    assert not (tmp_path / "merged").exists()


@needs_peft
def test_a_wrong_target_module_is_named(tmp_path: Path, base_folder: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora: .*nowhere"):
        run(tmp_path, base_folder, data, "weights=lora", "lora.target_modules=[nowhere]")


@needs_peft
@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path, base_folder: Path, data: Path) -> None:
    """LoRA, whose base pass goes through the same wrapped module as the step does."""
    settings = [
        "weights=lora", "share={random: 0.5}", "training.learning_rate=0.05", "training.extra.optim=sgd",
        "training.bf16=false",
    ]  # fmt: skip
    one = run(tmp_path, base_folder, data, *settings, "training.gradient_accumulation_steps=2")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from sglang_prefillshare.training.run import train; train(sys.argv[1], sys.argv[2:])"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps({"base": str(base_folder), "output": str(tmp_path / "two"), "data": {"train": str(data)}})
    )
    overrides = [
        *settings, "training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1",
        "training.warmup_ratio=0", "training.report_to=none",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, str(script), str(path), *overrides], check=True, timeout=100, env=environment)

    two = dict(load_file(tmp_path / "two" / "adapter_model.safetensors"))
    torch.testing.assert_close(two, saved(one), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "two" / "training.json").read_text())["result"]["steps"] == one.steps


# Refusals before the first step


def test_a_base_that_is_not_the_named_one_is_refused(tmp_path: Path, base_folder: Path, data: Path) -> None:
    fingerprint = identify_base(base_folder).model_fingerprint
    run(tmp_path, base_folder, data, f"base_fingerprint={fingerprint}", "training.max_steps=1")
    with pytest.raises(IdentityError, match="base_fingerprint says psb1-0"):
        run(tmp_path, base_folder, data, "base_fingerprint=psb1-0", f"output={tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()


def test_an_output_folder_in_use_is_refused_and_a_strangers_never_replaced(
    tmp_path: Path, base_folder: Path, data: Path
) -> None:
    first = run(tmp_path, base_folder, data, "training.max_steps=1")
    with pytest.raises(ConfigError, match="Continue its run with resume=true"):
        run(tmp_path, base_folder, data, "training.max_steps=1")
    run(tmp_path, base_folder, data, "training.max_steps=2", "overwrite=true")
    assert not (first.output / "checkpoints" / "checkpoint-1").exists()
    inside = shutil.copy(data, first.output / "data.jsonl")
    with pytest.raises(ConfigError, match="which this run reads"):
        run(tmp_path, base_folder, Path(inside), "overwrite=true")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="was not written by a training run"):
        run(tmp_path, base_folder, data, f"output={stranger}", "overwrite=true")
    assert (stranger / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=100000", "data.max_length is 100000, the base has 4096 positions"),
        ("training.extra.learning_rate=1", "training.extra sets learning_rate, which is a key of training itself"),
        ("training.extra.output_dir=x", "training.extra sets output_dir, which is decided by output"),
        ("training.extra.neftune_noise_alph=1", "Did you mean neftune_noise_alpha?"),
        ("training.lr_scheduler_type=up", "Transformers refuses these arguments"),
        ("training.report_to=[nobody]", "training.report_to names nobody, wanted auto, none or some of"),
        ("chat_template=chatml", "wanted a Jinja file"),
        ("data.eval=gone.jsonl", "data file 'gone.jsonl' does not exist"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    tmp_path: Path, base_folder: Path, data: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tmp_path, base_folder, data, override)
    assert message in str(refused.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()], "a mended recipe could not start"


def test_dropped_examples_are_counted_in_the_summary(tmp_path: Path, base_folder: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [*sums(8), {"prompt": "two words", "completion": ""}])
    with pytest.raises(ConfigError, match="1 of 9 examples cannot be learned from"):
        run(tmp_path, base_folder, data)
    summary = run(tmp_path, base_folder, data, "data.drop_invalid=true")
    assert summary.dropped == 1 and "dropped 1 examples" in summary.describe()
    record = json.loads((summary.output / "training.json").read_text())
    assert record["data"]["train"]["dropped"] == {"an empty response": 1}


def test_tensorboard_gets_its_events(tmp_path: Path, base_folder: Path, data: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install --no-deps -r requirements/train.txt")
    summary = run(tmp_path, base_folder, data, "training.max_steps=1", "training.report_to=auto")
    assert list((summary.output / "checkpoints").rglob("events.out.tfevents*"))


# Learning


def test_a_module_learns_to_look_up_a_value_in_the_bases_kv(tmp_path: Path) -> None:
    """The answer is decided by one token of the prompt, which the decode module sees only through the base's KV."""
    base_folder = make_base(tmp_path / "base", layers=2, head_dim=32, seed=1)
    base, module = load_model(base_folder).requires_grad_(False), load_model(base_folder).train()
    generator = np.random.default_rng(0)
    first_symbol, symbols = len(SPECIAL_TOKENS), 6
    answers = generator.integers(first_symbol + 100, VOCAB_SIZE, symbols)

    def draw(count: int) -> list[Example]:
        asked = generator.integers(0, symbols, count)
        noise = generator.integers(first_symbol + 50, first_symbol + 60, (count, 3))
        return [
            Example(
                np.asarray([*noise[row, :2], first_symbol + asked[row], noise[row, 2]], np.int32),
                np.asarray([answers[asked[row]]], np.int32),
                3,
            )
            for row in range(count)
        ]

    def right(examples: list[Example]) -> float:
        batch = collate(examples)
        with torch.no_grad():
            logits = response_logits(module, batch, base_prefill(base, batch))
        return float((logits.argmax(-1) == batch["labels"]).float().mean())

    held_out = draw(64)
    before = right(held_out)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    from sglang_prefillshare.training.loss import cache_conditioned_loss

    record = []
    for _ in range(60):
        loss = cache_conditioned_loss(module, base, collate(draw(16)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record.append(loss.item())
    assert before < 0.1
    assert right(held_out) > 0.9
    assert np.mean(record[-5:]) < 0.3 * np.mean(record[:5])
