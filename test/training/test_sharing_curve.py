from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel

from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity.fingerprint import identify_base
from sglang_prefillshare.identity.manifest import Manifest, write_manifest
from sglang_prefillshare.training.data import base_token_count
from sglang_prefillshare.training.evaluate import Evaluator, read_tasks
from sglang_prefillshare.training.modules import named_modules
from sglang_prefillshare.training.sharing_curve import (
    SHARES,
    CurveConfig,
    measure,
    sharing_curve,
    wilson_interval,
)
from sglang_prefillshare.training.trainer import frozen_copy
from test.support.models import make_base, make_decode_module, make_tokenizer, sample_prompt
from test.support.oracle import base_cache, generate, load_model
from test.training.toys import needs_peft, write_jsonl

NEW_TOKENS = 6
QUESTIONS = 5


def clear_prompts(base: PreTrainedModel, module: PreTrainedModel) -> list[list[int]]:
    """Prompts of unequal lengths, one token among them, whose answers have no near tie at any whole share."""
    prompts = []
    for tokens in (17, 1, 40, 2, 3, 9):
        for attempt in range(50):
            prompt = sample_prompt(tokens, seed=tokens * 1000 + attempt)
            pairs = ((base, module), (module, module))
            if min(generate(*pair, prompt, NEW_TOKENS).smallest_gap for pair in pairs) > 3e-3:
                prompts.append(prompt)
                break
    assert len(prompts) == 6
    return prompts


def ids(prompts: Sequence[Sequence[int]]) -> list[Any]:
    return [np.asarray(prompt, dtype=np.int32) for prompt in prompts]


@pytest.fixture
def evaluator(base: PreTrainedModel, module: PreTrainedModel) -> Evaluator:
    return Evaluator(module, frozen_copy(base), batch_size=4)


@torch.no_grad()
def one_by_one(base: PreTrainedModel, module: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """A greedy answer with base KV for the first `count` tokens, unpadded."""
    cache = base_cache(base, prompt[:count])
    fed, answer = prompt[count:], list[int]()
    while len(answer) < NEW_TOKENS:
        logits = module(torch.tensor([fed]), past_key_values=cache, use_cache=True).logits[0, -1]
        fed = [int(logits.argmax())]
        answer += fed
    return answer


def test_at_share_1_it_answers_as_a_served_pair(
    base: PreTrainedModel, module: PreTrainedModel, evaluator: Evaluator
) -> None:
    prompts = clear_prompts(base, module)
    wanted = [generate(base, module, prompt, NEW_TOKENS).token_ids for prompt in prompts]
    assert evaluator.generate(ids(prompts), share=1.0, max_new_tokens=NEW_TOKENS) == wanted


def test_at_share_0_it_is_plain_generation(
    base: PreTrainedModel, module: PreTrainedModel, evaluator: Evaluator
) -> None:
    prompts = clear_prompts(base, module)
    wanted = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        out = module.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )  # fmt: skip
        wanted.append(out[0, len(prompt) :].tolist())
    assert evaluator.generate(ids(prompts), share=0.0, max_new_tokens=NEW_TOKENS) == wanted
    assert wanted != evaluator.generate(ids(prompts), share=1.0, max_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_between_them_the_base_has_the_first_tokens_only(
    base: PreTrainedModel, module: PreTrainedModel, evaluator: Evaluator, share: float
) -> None:
    prompts = clear_prompts(base, module)
    wanted = [one_by_one(base, module, prompt, base_token_count(len(prompt), share)) for prompt in prompts]
    assert evaluator.generate(ids(prompts), share=share, max_new_tokens=NEW_TOKENS) == wanted


def test_answers_end_at_a_stop_token_or_their_own_limit(
    base: PreTrainedModel, module: PreTrainedModel, evaluator: Evaluator
) -> None:
    prompts = clear_prompts(base, module)
    whole = evaluator.generate(ids(prompts), share=1.0, max_new_tokens=NEW_TOKENS)
    stop = whole[2][1]
    wanted = [
        generate(base, module, prompt, limit, stop_token_ids={stop}).token_ids
        for limit, prompt in enumerate(prompts, start=1)
    ]
    done: list[int] = []
    found = evaluator.generate(
        ids(prompts), share=1.0, max_new_tokens=range(1, 7), stop_ids={stop}, on_progress=done.append
    )
    assert found == wanted and len(found[2]) == 2
    assert done == [4, 2]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_log_likelihoods_are_those_of_single_unpadded_rows(
    base: PreTrainedModel, module: PreTrainedModel, evaluator: Evaluator, share: float
) -> None:
    pairs = [(sample_prompt(n, seed=n), sample_prompt(t, seed=100 + t)) for n, t in ((9, 3), (2, 1), (30, 5), (4, 4))]
    wanted = []
    for prompt, response in pairs:
        count = base_token_count(len(prompt), share)
        fed = torch.tensor([[*prompt[count:], *response[:-1]]])
        with torch.no_grad():
            logits = module(fed, past_key_values=base_cache(base, prompt[:count]), use_cache=True).logits[0]
        scores = logits[-len(response) :].log_softmax(-1)
        wanted.append(float(scores.gather(1, torch.tensor(response)[:, None]).sum()))
    found = evaluator.log_likelihoods([tuple(ids(pair)) for pair in pairs], share=share)  # type: ignore[misc]
    assert found == pytest.approx(wanted, abs=1e-4)


# Task files


def test_conversations_are_rendered_as_in_training(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    chat = [{"role": "user", "content": "What is 2+3?"}]
    file = write_jsonl(
        tmp_path / "t.jsonl", [{"prompt": chat, "answer": "5", "id": 7}, {"prompt": "2+3=", "answer": "5"}]
    )
    first, second = read_tasks(str(file), tokenizer).questions
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert first.prompt.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert second.prompt.tolist() == tokenizer("2+3=")["input_ids"]
    for question in (first, second):
        assert question.answers[0].tolist() == [*tokenizer("5")["input_ids"], tokenizer.eos_token_id]
    without = read_tasks(str(file), tokenizer, append_eos=False)
    assert without.questions[1].answers[0].tolist() == tokenizer("5")["input_ids"]
    assert without.stop_ids == frozenset()


def test_choices_are_named_by_index_or_text(tmp_path: Path) -> None:
    record = {"prompt": "2+3=", "choices": ["4", "5", "15"]}
    file = write_jsonl(tmp_path / "t.jsonl", [{**record, "answer": 1}, {**record, "answer": "15"}])
    tasks = read_tasks(str(file), make_tokenizer())
    assert tasks.scoring == "log_likelihood"
    assert [question.right for question in tasks.questions] == [1, 2]
    assert [len(question.answers) for question in tasks.questions] == [3, 3]


def test_an_answer_that_is_rendered_in_part_is_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", [GOOD])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_tasks(str(file), make_tokenizer()).questions) == 1
    calls = [{"function": {"name": "add", "arguments": {}}}]
    answer = [{"role": "assistant", "content": "So.", "tool_calls": calls}]
    write_jsonl(file, [{"prompt": [{"role": "user", "content": "2+3"}], "answer": answer}])
    with pytest.raises(ConfigError, match=r"t.jsonl:1, tool_calls\[0\].function.name: tool calls that the rendered"):
        read_tasks(str(file), make_tokenizer())


GOOD = {"prompt": "a b", "answer": "c"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no question"),
        ([{**GOOD, "anwser": "d"}], r"t.jsonl:1: unknown key 'anwser'. Did you mean answer\?"),
        ([GOOD, {**GOOD, "level": 3}], r"t.jsonl:2: unknown key 'level'. Known are prompt"),
        ([{"prompt": "a b"}], "t.jsonl:1: answer is missing"),
        ([{**GOOD, "answer": 4}], "answer is 4, wanted text"),
        ([{**GOOD, "answer": " "}], "an empty response"),
        ([{**GOOD, "prompt": ""}], "an empty prompt"),
        ([{**GOOD, "choices": ["c"]}], "wanted a list of two texts or more"),
        ([{**GOOD, "choices": ["d", "e"]}], "answer 'c' is 0 of the choices"),
        ([{"prompt": "a b", "choices": ["d", "e"], "answer": 2}], "answer is 2, wanted an index from 0 to 1"),
        ([GOOD, {**GOOD, "choices": ["c", "e"]}], r"with choices \(.*t.jsonl:2\) and without \(.*t.jsonl:1\)"),
        ([GOOD, {**GOOD, "prompt": "word " * 50}], "1 of 2 questions are longer than the base's 30 positions"),
    ],
)
def test_wrong_task_files_are_refused(tmp_path: Path, records: list[Any], message: str) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", records)
    with pytest.raises(ConfigError, match=message):
        read_tasks(str(file), make_tokenizer(), max_length=30)


# The whole command


@pytest.fixture
def decode_folder(tmp_path: Path, base_folder: Path) -> Path:
    return make_decode_module(tmp_path / "planner", base_folder, seed=5)


def answered(base: PreTrainedModel, module: PreTrainedModel) -> list[dict[str, str]]:
    """Records with what the served pair generates as the right answer: accuracy at share 1 must be 1."""
    tokenizer = make_tokenizer()
    records = []
    for number in range(60):
        prompt = f"{'The planner ' * (number % 4)}asks {number} times"
        answer = generate(base, module, tokenizer(prompt)["input_ids"], 3)
        text = tokenizer.decode(answer.token_ids)
        if tokenizer(text)["input_ids"] == answer.token_ids and answer.smallest_gap > 3e-3:  # some are no UTF-8
            records.append({"prompt": prompt, "answer": text})
        if len(records) == QUESTIONS:
            return records
    raise AssertionError(f"only {len(records)} answers survive decoding and encoding")


@pytest.fixture
def tasks(tmp_path: Path, base: PreTrainedModel, module: PreTrainedModel) -> Path:
    return write_jsonl(tmp_path / "tasks.jsonl", answered(base, module))


def test_table_json_and_plot_tell_the_same(
    tmp_path: Path, base_folder: Path, decode_folder: Path, tasks: Path, base: PreTrainedModel, module: PreTrainedModel
) -> None:
    config = CurveConfig({"planner": str(decode_folder), "same": str(base_folder)}, str(tasks), str(base_folder),
                         append_eos=False, batch_size=2)  # fmt: skip
    console = Console(record=True, width=100, file=io.StringIO())
    curve = sharing_curve(config, tmp_path / "out", console=console)

    written = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert written == json.loads(json.dumps(curve.to_json()))
    assert written["shares"] == list(SHARES) and written["questions"] == QUESTIONS
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    for place, share in enumerate(SHARES):
        right = []
        for record in map(json.loads, tasks.read_text().splitlines()):
            prompt, wanted = (tokenizer(record[key])["input_ids"] for key in ("prompt", "answer"))
            found = one_by_one(base, module, prompt, base_token_count(len(prompt), share))
            right.append(found[: len(wanted)] == wanted)
        assert written["modules"]["planner"]["outcomes"][place] == "".join("01"[is_right] for is_right in right)
        assert written["accuracy"]["planner"][place] == sum(right) / QUESTIONS
    assert written["accuracy"]["planner"][-1] == 1 > written["accuracy"]["planner"][0]
    assert len(set(written["accuracy"]["same"])) == 1  # the base itself does not mind whose KV it reads
    assert written["base_fingerprint"] == identify_base(base_folder).model_fingerprint
    assert written["modules"]["planner"]["names_base"] and not written["modules"]["same"]["names_base"]

    text = console.export_text()
    assert f"100.0% ({QUESTIONS})" in next(line for line in text.splitlines() if " 100% " in line)
    assert str(tmp_path / "out" / "curve.json") in text
    if "not drawn" not in text:
        assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_choices_are_scored_by_likelihood(tmp_path: Path, base_folder: Path, decode_folder: Path) -> None:
    record = {"prompt": "Which numbers are prime?", "choices": [" 2", " a good question", " Paris"], "answer": 0}
    file = write_jsonl(tmp_path / "t.jsonl", [{**record, "answer": index} for index in range(3)])
    curve = measure(CurveConfig({"m": str(decode_folder)}, str(file), str(base_folder)))
    assert curve.scoring == "log_likelihood"
    assert curve.modules[0].counts == [1] * len(SHARES)  # one of the three is the likeliest


@needs_peft
def test_an_adapter_reads_the_base_that_it_changes(tmp_path: Path, base_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from sglang_prefillshare.training.merge import merge

    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(load_model(base_folder), lora)
    adapted.peft_config["default"].base_model_name_or_path = str(base_folder)
    adapted.save_pretrained(tmp_path / "adapter")
    write_manifest(tmp_path / "adapter", Manifest.for_base(str(base_folder), identify_base(base_folder)))
    whole = merge(tmp_path / "adapter", tmp_path / "whole")

    records = answered(load_model(base_folder), load_model(whole))
    file = write_jsonl(tmp_path / "adapter.jsonl", records)
    config = CurveConfig({"adapter": str(tmp_path / "adapter"), "whole": str(whole)}, str(file), append_eos=False)
    adapter_curve, whole_curve = measure(config).modules
    assert adapter_curve.kind == "adapter" and whole_curve.kind == "full"
    assert adapter_curve.right == whole_curve.right
    assert adapter_curve.names_base and adapter_curve.accuracy[-1] == 1 > adapter_curve.accuracy[0]


def test_a_module_of_another_base_is_refused(tmp_path: Path, decode_folder: Path, tasks: Path) -> None:
    other = make_base(tmp_path / "other", layers=2, head_dim=16, seed=8)
    with pytest.raises(IdentityError, match=r"was trained on base .*the base's weights changed"):
        measure(CurveConfig({"planner": str(decode_folder)}, str(tasks), str(other)))
    larger = make_base(tmp_path / "larger", layers=3, head_dim=16)
    with pytest.raises((ConfigError, IdentityError), match="num_hidden_layers"):
        measure(CurveConfig({"planner": str(decode_folder)}, str(tasks), str(larger)))


def test_a_base_must_be_named_by_someone(tmp_path: Path, module_folder: Path, tasks: Path) -> None:
    with pytest.raises(ConfigError, match=r"no module names its base. Give it with --base"):
        measure(CurveConfig({"m": str(module_folder)}, str(tasks)))
    moved = make_decode_module(tmp_path / "moved", module_folder, seed=1, manifest=False)
    write_manifest(moved, Manifest.for_base("/gone/base", identify_base(module_folder)))
    with pytest.raises(ConfigError, match=r"a module names its base: /gone/base .* give it with --base"):
        measure(CurveConfig({"m": str(moved)}, str(tasks)))
    with pytest.raises(ConfigError, match=r"there is no task file nowhere.jsonl"):
        measure(CurveConfig({"m": str(module_folder)}, "nowhere.jsonl", str(module_folder)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"neither config.json nor adapter_config.json"):
        measure(CurveConfig({"m": str(tmp_path / "empty")}, str(tasks), str(module_folder)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": (0.5, 1.5)}, "wanted one number or more from 0 to 1"),
        ({"shares": ()}, "wanted one number or more"),
        ({"shares": (1.0, 1.0)}, "wanted each only once"),
        ({"batch_size": 0}, "wanted 1 or more"),
        ({"dtype": "int8"}, "wanted float32, bfloat16 or float16"),
        ({"modules": {}}, "no decode module is given"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CurveConfig(**{"modules": {"m": "folder"}, "tasks": "t.jsonl", **settings})


def test_modules_are_named_by_folder_or_by_the_caller() -> None:
    assert named_modules(["out/planner", "naive=out/full-ft/"]) == {"planner": "out/planner", "naive": "out/full-ft/"}
    for wrong in (["a/planner", "b/planner"], ["=out"], ["planner="]):
        with pytest.raises(ConfigError, match="wanted MODULE or NAME=MODULE"):
            named_modules(wrong)


def test_intervals_hold_at_the_ends() -> None:
    assert wilson_interval(0, 100) == pytest.approx((0.0, 0.0370), abs=1e-4)
    assert wilson_interval(100, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
