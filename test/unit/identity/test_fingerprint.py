from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity.fingerprint import BaseIdentity, check_tokenizer, identify_base
from test.unit.identity.tiny import CONFIG, edit_json, write_json, write_model

IDENTITY = BaseIdentity("1" * 64, "2" * 64, "3" * 64, "4" * 64)


def test_moving_and_renaming_does_not_count(model: Path, tmp_path: Path) -> None:
    before = identify_base(model)
    moved = tmp_path / "elsewhere" / "another-name"
    shutil.copytree(model, moved)
    (moved / "model.safetensors").rename(moved / "weights.safetensors")
    assert identify_base(moved) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "elsewhere", "transformers_version": "9"},
        {"torch_dtype": "bfloat16", "dtype": "bfloat16", "use_cache": False},
        {"rope_theta": 10000, "eos_token_id": [1, 2], "attention_dropout": 0.1},
        {"initializer_range": 1, "id2label": {"0": "LABEL_0"}, "temperature": 0.5},
    ],
)
def test_config_keys_that_cannot_change_kv_do_not_count(model: Path, changes: dict[str, Any]) -> None:
    before = identify_base(model)
    edit_json(model / "config.json", **changes)
    assert identify_base(model) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10001.0},
        {"num_attention_heads": 2},
        {"rms_norm_eps": 1e-5},
        {"sliding_window": 4096},
        {"quantization_config": {"quant_method": "fp8"}},
        {"a_key_nobody_knows": True},
    ],
)
def test_any_other_config_key_counts(model: Path, changes: dict[str, Any]) -> None:
    before = identify_base(model)
    edit_json(model / "config.json", **changes)
    assert identify_base(model).differing_parts(before) == ["config"]


def test_nested_configs_follow_the_same_rule(model: Path) -> None:
    write_json(model / "config.json", {"model_type": "vlm", "text_config": CONFIG})
    before = identify_base(model)
    write_json(
        model / "config.json", {"text_config": CONFIG | {"torch_dtype": "float16"}, "model_type": "vlm"}, indent=1
    )
    assert identify_base(model) == before
    write_json(model / "config.json", {"model_type": "vlm", "text_config": CONFIG | {"rope_theta": 5}})
    assert identify_base(model).differing_parts(before) == ["config"]


def test_each_part_changes_the_fingerprint() -> None:
    variants = [dataclasses.replace(IDENTITY, **{field.name: "5" * 64}) for field in dataclasses.fields(IDENTITY)]
    swapped = dataclasses.replace(IDENTITY, weights=IDENTITY.config, config=IDENTITY.weights)
    assert len({one.model_fingerprint for one in [IDENTITY, swapped, *variants]}) == 6


def test_fingerprints_carry_their_version_and_stay_what_they_are() -> None:
    # A constant from the first release: every manifest in the field depends on it.
    assert IDENTITY.model_fingerprint == "psb1-4132876fe980ae0b9b8abd82681b5638"
    assert re.fullmatch(r"psk1-[0-9a-f]{32}", IDENTITY.runtime_fingerprint("bfloat16"))


def test_the_kv_dtype_is_part_of_the_runtime_fingerprint() -> None:
    wide, narrow = IDENTITY.runtime_fingerprint("bfloat16"), IDENTITY.runtime_fingerprint("fp8_e4m3")
    assert wide != narrow
    assert IDENTITY.runtime_fingerprint("torch.bfloat16") == IDENTITY.runtime_fingerprint("bf16") == wide
    with pytest.raises(ConfigError, match="wanted a resolved one"):
        IDENTITY.runtime_fingerprint("auto")


def test_a_separate_tokenizer_folder_is_used(model: Path, tmp_path: Path) -> None:
    before = identify_base(model)
    other = write_model(tmp_path / "tokenizer")
    edit_json(other / "tokenizer_config.json", chat_template="{{ messages }}")
    assert identify_base(model, tokenizer_path=other).differing_parts(before) == ["chat_template"]


@pytest.mark.parametrize(
    ("name", "message"), [("config.json", "has no config.json"), ("model.safetensors", "holds no weights")]
)
def test_half_a_model_is_refused(model: Path, name: str, message: str) -> None:
    (model / name).unlink()
    with pytest.raises(ConfigError, match=message):
        identify_base(model)


def test_an_unreadable_file_is_refused_by_name(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/proc/self/mem")  # nobody can read its first page, nor can root
    with pytest.raises(IdentityError, match=r"cannot read .*config\.json"):
        identify_base(model)


def test_a_folder_in_a_files_place_is_refused_by_name(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    with pytest.raises(IdentityError, match="cannot read the weights"):
        identify_base(model)


def test_a_hub_id_is_looked_up_locally_first(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def snapshot(name: str, *, revision: str | None, local_files_only: bool = False, **_: Any) -> str:
        asked.append(local_files_only)
        if local_files_only and len(asked) == 3:
            raise LocalEntryNotFoundError("not here")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    local = identify_base("owner/name")
    assert (local, asked) == (identify_base(model), [True])
    asked[:] = [True, True]
    assert identify_base("owner/name") == local
    assert asked == [True, True, True, False]


def test_a_hub_that_cannot_be_reached_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ConfigError, match="not in the local hub cache"):
        identify_base("owner/name")
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        identify_base("/no/such/folder")


def test_a_module_with_the_bases_tokenizer_passes(model: Path, tmp_path: Path) -> None:
    base = identify_base(model)
    module = write_model(tmp_path / "module")
    assert check_tokenizer(module, base).tokenizer == base.tokenizer


def test_a_module_with_another_tokenizer_or_template_is_refused(model: Path, tmp_path: Path) -> None:
    base = identify_base(model)
    module = write_model(tmp_path / "module")
    edit_json(module / "tokenizer_config.json", chat_template="{{ messages }}")
    with pytest.raises(IdentityError, match=r"the chat template of .*module.* differs from the base's"):
        check_tokenizer(module, base)
    edit_json(module / "tokenizer_config.json", add_bos_token=True)
    with pytest.raises(IdentityError, match=r"the tokenizer of .*module.* differs .*--tokenizer-path"):
        check_tokenizer(module, base)


def test_importing_identity_is_light() -> None:
    code = (
        "import sys, sglang_prefillshare.identity.manifest, sglang_prefillshare.identity.fingerprint;"
        "print(sorted({'torch', 'transformers', 'sglang', 'numpy', 'huggingface_hub'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
