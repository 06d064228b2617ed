from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity.tokenizer import TokenizerIdentity, tokenizer_identity
from test.support.models import make_tokenizer
from test.unit.identity.tiny import TOKENIZER, edit_json, write_json, write_model


def changed(model: Path, before: TokenizerIdentity) -> set[str]:
    """Which parts of the identity differ now."""
    after = tokenizer_identity(model)
    return {name for name in ("tokenizer", "chat_template") if getattr(before, name) != getattr(after, name)}


def edited_tokenizer(**changes: Any) -> dict[str, Any]:
    return TOKENIZER | changes


REFORMATTED = {
    "indented": edited_tokenizer(),
    "merges as strings": edited_tokenizer(model=TOKENIZER["model"] | {"merges": ["a b"]}),
    "defaults spelled out": edited_tokenizer(
        model=TOKENIZER["model"] | {"dropout": None, "unk_token": None, "byte_fallback": False, "ignore_merges": False}
    ),
    "vocabulary reordered": edited_tokenizer(
        model=TOKENIZER["model"] | {"vocab": dict(reversed(TOKENIZER["model"]["vocab"].items()))}
    ),
    "batch settings": edited_tokenizer(
        truncation={"max_length": 512, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        padding={"strategy": "BatchLongest", "pad_id": 4, "pad_token": "<s>", "direction": "Right"},
    ),
}
ENCODES_OTHERWISE = {
    "another merge": edited_tokenizer(model=TOKENIZER["model"] | {"merges": [["a", "b"], ["b", "c"]]}),
    "swapped ids": edited_tokenizer(model=TOKENIZER["model"] | {"vocab": {"a": 1, "b": 0, "c": 2, "ab": 3}}),
    "normalizer": edited_tokenizer(normalizer={"type": "NFC"}),
    "pre-tokenizer": edited_tokenizer(pre_tokenizer=TOKENIZER["pre_tokenizer"] | {"add_prefix_space": True}),
    "byte fallback": edited_tokenizer(model=TOKENIZER["model"] | {"byte_fallback": True}),
    "added token": edited_tokenizer(
        added_tokens=[*TOKENIZER["added_tokens"], TOKENIZER["added_tokens"][0] | {"id": 5, "content": "<tool>"}]
    ),
    "token flag": edited_tokenizer(added_tokens=[TOKENIZER["added_tokens"][0] | {"lstrip": True}]),
}


@pytest.mark.parametrize("form", REFORMATTED)
def test_reformatting_does_not_count(model: Path, form: str) -> None:
    before = tokenizer_identity(model)
    write_json(model / "tokenizer.json", REFORMATTED[form], indent=4, sort_keys=True, ensure_ascii=False)
    assert changed(model, before) == set()


@pytest.mark.parametrize("change", ENCODES_OTHERWISE)
def test_encoding_otherwise_counts(model: Path, change: str) -> None:
    before = tokenizer_identity(model)
    write_json(model / "tokenizer.json", ENCODES_OTHERWISE[change])
    assert changed(model, before) == {"tokenizer"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"pad_token": "ab", "model_max_length": 9, "padding_side": "left"}, set()),
        ({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": {}, "added_tokens_decoder": {}}, set()),
        ({"eos_token": "c"}, {"tokenizer"}),  # "c" was ordinary text and is now split off as a special token
        ({"eos_token": "<s>"}, set()),  # the same vocabulary, another place to stop
        ({"eos_token": "<s>", "add_eos_token": True}, {"tokenizer"}),
        ({"add_bos_token": True}, {"tokenizer"}),
        ({"add_prefix_space": True}, {"tokenizer"}),
        ({"chat_template": "{{ bos_token }}{{ messages }}!"}, {"chat_template"}),
        ({"chat_template": "{{ bos_token }}{{ messages }}\n"}, set()),  # Jinja drops one line end at the end
        ({"chat_template": [{"name": "default", "template": "{{ bos_token }}{{ messages }}"}]}, set()),
        ({"chat_template": "{{ bos_token }}{{ messages }}\r\n"}, set()),
        ({"chat_template": None}, {"chat_template"}),
        ({"additional_special_tokens": ["<x>"]}, {"tokenizer"}),
        ({"bos_token": {"content": "<s>", "__type": "AddedToken", "lstrip": False}}, set()),
    ],
)  # fmt: skip
def test_only_settings_that_reach_a_prompt_count(model: Path, changes: dict[str, Any], parts: set[str]) -> None:
    edit_json(model / "tokenizer_config.json", pad_token="ab")
    before = tokenizer_identity(model)
    edit_json(model / "tokenizer_config.json", **changes)
    assert changed(model, before) == parts


def test_a_special_token_that_the_template_prints_counts_for_the_template(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", eos_token="<s>", chat_template="{{ messages }}{{ eos_token }}")
    before = tokenizer_identity(model)
    edit_json(model / "tokenizer_config.json", eos_token=None)
    assert changed(model, before) == {"chat_template"}


def test_the_template_file_wins_over_the_config_as_in_transformers(model: Path) -> None:
    before = tokenizer_identity(model)
    (model / "chat_template.jinja").write_text("{{ bos_token }}{{ messages }}\n")
    assert changed(model, before) == set()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert changed(model, before) == {"chat_template"}


def test_an_explicit_template_equal_to_the_models_own_is_the_same(model: Path, tmp_path: Path) -> None:
    own = tokenizer_identity(model)
    file = tmp_path / "mine.jinja"
    file.write_bytes(b"{{ bos_token }}{{ messages }}\r\n")
    assert tokenizer_identity(model, chat_template=str(file)) == own
    file.write_text("{{ bos_token }} {{ messages }}")
    other = tokenizer_identity(model, chat_template=str(file))
    assert (other.tokenizer == own.tokenizer, other.chat_template == own.chat_template) == (True, False)
    named = {tokenizer_identity(model, chat_template=name).chat_template for name in ("chatml", "llama-2")}
    assert len(named) == 2


@pytest.mark.parametrize("missing", ["no/such/template", "mine.jinja", "mine.json"])
def test_a_template_that_does_not_exist_is_refused(model: Path, missing: str) -> None:
    with pytest.raises(ConfigError, match=r"chat template .* does not exist"):
        tokenizer_identity(model, chat_template=missing)


def test_a_folder_without_a_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        tokenizer_identity(model)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"added_tokens": [{"id": 1}]}'),
        ("tokenizer.json", '{"added_tokens": 7}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", '{"additional_special_tokens": 1}'),
        ("tokenizer_config.json", "\ufffe"),
    ],
)
def test_malformed_files_are_refused_by_name(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content)
    with pytest.raises(IdentityError, match=r"tokenizer"):
        tokenizer_identity(model)


def test_vocabulary_files_count_without_tokenizer_json(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    write_json(model / "vocab.json", {"a": 0, "b": 1})
    (model / "merges.txt").write_text("#version: 0.2\na b\n")
    before = tokenizer_identity(model)
    write_json(model / "vocab.json", {"b": 1, "a": 0}, indent=2)
    assert changed(model, before) == set()
    (model / "merges.txt").write_text("#version: 0.2\nb a\n")
    assert changed(model, before) == {"tokenizer"}


def test_saving_with_transformers_does_not_count(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "first")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "first")
    loaded("some text", truncation=True, max_length=4, padding="max_length")  # leaves its mark in tokenizer.json
    loaded.save_pretrained(tmp_path / "second")
    assert tokenizer_identity(tmp_path / "first") == tokenizer_identity(tmp_path / "second")
    loaded.add_tokens(["<plan>"])
    loaded.save_pretrained(tmp_path / "grown")
    assert tokenizer_identity(tmp_path / "grown").tokenizer != tokenizer_identity(tmp_path / "first").tokenizer


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(normalizer=json_values, indent=st.sampled_from([None, 0, 3]), ascii_only=st.booleans())
def test_any_settings_survive_reformatting(
    tmp_path: Path, normalizer: Any, indent: int | None, ascii_only: bool
) -> None:
    model = write_model(tmp_path / "model")
    write_json(model / "tokenizer.json", edited_tokenizer(normalizer=normalizer))
    before = tokenizer_identity(model)
    text = json.dumps(edited_tokenizer(normalizer=normalizer), indent=indent, sort_keys=True, ensure_ascii=ascii_only)
    (model / "tokenizer.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert changed(model, before) == set()
