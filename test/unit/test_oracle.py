"""The oracle against three other ways to get its answer, and the tiny models against what the suites need of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from sglang_prefillshare.identity.fingerprint import check_tokenizer, identify_base
from sglang_prefillshare.identity.manifest import check_manifest, read_manifest
from test.support.models import (
    SPECIAL_TOKENS,
    make_base,
    make_decode_module,
    make_equal_module,
    make_tokenizer,
    sample_prompt,
)
from test.support.oracle import Oracle, base_cache, clear_prompt, forced, generate

LENGTHS = (1, 2, 7, 40, 150)
NEW_TOKENS = 24


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen3", "qwen3-tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    arch, _, tied = request.param.partition("-")
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "base", arch, tied=bool(tied), seed=1)
    return Oracle(base, make_decode_module(folder / "module", base, seed=2))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", seed=3)


def ordinary(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[]
    )
    return answer[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_module_equal_to_its_base_answers_as_generate_does(base_folder: Path, tmp_path: Path, length: int) -> None:
    oracle = Oracle(base_folder, make_equal_module(tmp_path / "equal", base_folder))
    prompt = clear_prompt(oracle, length, NEW_TOKENS)
    assert oracle.generate(prompt, NEW_TOKENS).token_ids == ordinary(oracle.base, prompt)


@pytest.mark.parametrize("length", [length for length in LENGTHS if length > 1])
def test_the_answer_is_neither_the_bases_nor_the_modules_own(pair: Oracle, length: int) -> None:
    prompt = clear_prompt(pair, length, NEW_TOKENS)
    answer = pair.generate(prompt, NEW_TOKENS).token_ids
    for model in (pair.base, pair.module):
        differing = sum(ours != theirs for ours, theirs in zip(answer, ordinary(model, prompt), strict=True))
        assert differing > NEW_TOKENS // 2


def test_a_prompt_of_one_token_uses_no_base_kv(pair: Oracle) -> None:
    prompt = clear_prompt(pair, 1, NEW_TOKENS)
    assert pair.generate(prompt, NEW_TOKENS).token_ids == ordinary(pair.module, prompt)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_forward_over_the_whole_answer_chooses_the_same_tokens(pair: Oracle, length: int) -> None:
    prompt = clear_prompt(pair, length, NEW_TOKENS)
    answer = pair.generate(prompt, NEW_TOKENS)
    # Independent of the decode loop: no step-by-step cache growth, positions left to Transformers.
    with torch.no_grad():
        cache = base_cache(pair.base, prompt[:-1])
        logits = pair.module(torch.tensor([[prompt[-1], *answer.token_ids[:-1]]]), past_key_values=cache).logits[0]
    assert logits.argmax(-1).tolist() == answer.token_ids
    best = logits.topk(2).values
    # Logits of two float32 schedules differ by up to 3e-4 here (measured against float64), a gap by twice that.
    assert torch.allclose(best[:, 0] - best[:, 1], torch.tensor(answer.gaps), atol=1e-3, rtol=0)


def test_handing_over_one_token_too_many_changes_the_answer(pair: Oracle) -> None:
    prompt = clear_prompt(pair, 40, NEW_TOKENS)
    answer = pair.generate(prompt, NEW_TOKENS).token_ids
    with torch.no_grad():  # the base computes xn too and samples y1, as stock SGLang would
        first = int(pair.base(torch.tensor([prompt])).logits[0, -1].argmax())
    wrong = [first, *generate(pair.base, pair.module, [*prompt, first], NEW_TOKENS - 1).token_ids]
    assert wrong[: NEW_TOKENS // 2] != answer[: NEW_TOKENS // 2]


def test_generating_twice_gives_the_same_answer(pair: Oracle) -> None:
    prompt = sample_prompt(20, seed=5)
    assert pair.generate(prompt, 8) == pair.generate(prompt, 8)


def test_a_stop_token_ends_the_answer_and_is_kept(pair: Oracle) -> None:
    prompt = sample_prompt(20, seed=5)
    full = pair.generate(prompt, 8).token_ids
    stopped = pair.generate(prompt, 8, stop_token_ids={full[3]}).token_ids
    assert stopped == full[: full.index(full[3]) + 1]


def test_an_empty_prompt_is_refused(pair: Oracle) -> None:
    with pytest.raises(ValueError, match="empty"):
        pair.generate([], 4)


def test_answers_wander_and_hold_no_special_token(pair: Oracle) -> None:
    for length in (2, 40, 150):
        answer = pair.generate(sample_prompt(length, seed=length), 48).token_ids
        assert len(set(answer)) > 4
        assert min(answer) >= len(SPECIAL_TOKENS)


def test_one_changed_prompt_token_changes_the_answer(pair: Oracle) -> None:
    prompt = clear_prompt(pair, 40, NEW_TOKENS)
    changed = list(prompt)
    changed[10] = 4 + (changed[10] + 1) % 500
    before, after = (pair.generate(ids, NEW_TOKENS).token_ids for ids in (prompt, changed))
    assert sum(left != right for left, right in zip(before, after, strict=True)) > NEW_TOKENS // 4


def test_the_same_seed_writes_the_same_weights(tmp_path: Path) -> None:
    one, two, other = (make_base(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("two", 1), ("other", 2)))
    identities = [identify_base(folder, cache_dir=tmp_path / "cache") for folder in (one, two, other)]
    assert identities[0] == identities[1]
    assert identities[0].differing_parts(identities[2]) == ["weights"]


def test_a_module_names_its_base_and_keeps_its_tokenizer(base_folder: Path, tmp_path: Path) -> None:
    module = make_decode_module(tmp_path / "module", base_folder, seed=4)
    identity = identify_base(base_folder, cache_dir=tmp_path / "cache")
    manifest = read_manifest(module)
    assert manifest is not None
    check_manifest(manifest, identity)
    check_tokenizer(module, identity)
    assert read_manifest(make_decode_module(tmp_path / "plain", base_folder, seed=4, manifest=False)) is None


def test_the_tokenizer_returns_any_text_and_renders_a_chat(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    text = "Grüße, 世界! def f(x):\n    return x\t# 🎉"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(rendered) == make_tokenizer().encode(rendered)
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, Oracle]:
    """The same base with two modules, as a GPU serves them: in bfloat16, whose answers part at near ties."""
    folder = tmp_path_factory.mktemp(f"rounded-{request.param}")
    base = make_base(folder / "base", request.param, seed=1, head_dim=64)
    modules = [make_decode_module(folder / f"module{seed}", base, seed=seed) for seed in (2, 3)]
    first, second = (Oracle(base, module, dtype=torch.bfloat16) for module in modules)
    return first, second


@pytest.mark.parametrize("length", [1, 2, 40, 300])
def test_answers_in_bfloat16_pass_the_forced_check_and_others_do_not(
    rounded: tuple[Oracle, Oracle], length: int
) -> None:
    oracle, other = rounded
    prompt = sample_prompt(length, seed=length)
    oracle.check(prompt, generate(*oracle.served, prompt, NEW_TOKENS).token_ids, NEW_TOKENS)
    base, module = oracle.served
    wrong = {
        "another module": generate(*other.served, prompt, NEW_TOKENS),
        "the base alone": generate(base, base, prompt, NEW_TOKENS),
    }
    if length > 2:
        wrong["the module's own KV"] = generate(module, module, prompt, NEW_TOKENS)
        wrong["another prompt's KV"] = generate(base, module, [*reversed(prompt[:-1]), prompt[-1]], NEW_TOKENS)
    for name, found in wrong.items():
        with pytest.raises(AssertionError):
            oracle.check(prompt, found.token_ids, NEW_TOKENS)
            raise RuntimeError(f"{name} passes")


def test_an_answer_cut_short_does_not_pass(rounded: tuple[Oracle, Oracle]) -> None:
    oracle, _ = rounded
    prompt = sample_prompt(40, seed=1)
    found = generate(*oracle.served, prompt, NEW_TOKENS).token_ids
    with pytest.raises(AssertionError, match="wanted 24"):
        oracle.check(prompt, found[:-1], NEW_TOKENS)


def test_parameters_change_the_logits_before_each_choice(pair: Oracle) -> None:
    """Forbidding what was chosen before gives another answer from there on, by `generate` and by `forced`."""

    def at_most_once(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        logits = logits.clone()
        logits[answer] = float("-inf")
        return logits

    prompt = clear_prompt(pair, 40, NEW_TOKENS)
    free = pair.generate(prompt, NEW_TOKENS).token_ids
    once = pair.generate(prompt, NEW_TOKENS, adjust=at_most_once).token_ids
    repeats = next(position for position in range(NEW_TOKENS) if free[position] in free[:position])
    assert once[:repeats] == free[:repeats] and once != free
    assert len(set(once)) == NEW_TOKENS
    assert forced(pair.base, pair.module, prompt, once, at_most_once).argmax(-1).tolist() == once
