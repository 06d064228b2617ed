from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_prefillshare import __version__
from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity.fingerprint import BaseIdentity
from sglang_prefillshare.identity.manifest import (
    FILE_NAME,
    Manifest,
    check_manifest,
    read_manifest,
    write_manifest,
)
from sglang_prefillshare.protocol import BOUNDARY_RULE
from test.unit.identity.tiny import edit_json

BASE = BaseIdentity("1" * 64, "2" * 64, "3" * 64, "4" * 64)
MANIFEST = Manifest.for_base("my/base", BASE)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, MANIFEST)
    assert path == tmp_path / FILE_NAME
    assert read_manifest(tmp_path) == MANIFEST
    assert json.loads(path.read_text())["created_by"] == f"sglang-prefillshare {__version__}"


def test_absent_is_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def test_a_module_trained_on_this_base_passes() -> None:
    check_manifest(MANIFEST, BASE)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("weights", "weights"),
        ("config", "config.json"),
        ("tokenizer", "tokenizer"),
        ("chat_template", "chat template"),
    ],
)
def test_another_base_is_refused_and_the_part_named(part: str, words: str) -> None:
    other = dataclasses.replace(BASE, **{part: "0" * 64})
    with pytest.raises(IdentityError) as caught:
        check_manifest(MANIFEST, other, module="planner")
    message = str(caught.value)
    assert message.startswith("planner was trained on base 'my/base'")
    assert MANIFEST.base_fingerprint in message and other.model_fingerprint in message
    assert f"the base's {words} changed" in message
    assert message.count("changed") == 1
    assert "Serve the base it was trained on" in message


def test_another_boundary_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, dataclasses.replace(MANIFEST, boundary="base:x1..xn;decode:y1.."))
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    with pytest.raises(IdentityError, match=r"trained with boundary 'base:x1\.\.xn;decode:y1\.\.'"):
        check_manifest(manifest, BASE)
    assert MANIFEST.boundary == BOUNDARY_RULE


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"format": 2}, "format is 2, this version reads 1"),
        ({"format": "1"}, "format is '1'"),
        ({"format": True}, "format is True"),
        ({"base": None}, "base is None, wanted a string"),
        ({"boundary": 3}, "boundary is 3, wanted a string"),
        ({"created_by": ""}, "created_by is ''"),
        ({"components": []}, "components is list, wanted an object"),
        ({"components": {"weights": "1"}}, r"components\.config is missing"),
        ({"base_fingerprint": "psb1-" + "0" * 32}, "base_fingerprint is psb1-0+, its components give"),
    ],
)
def test_a_malformed_manifest_is_refused_by_key(tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    path = write_manifest(tmp_path, MANIFEST)
    edit_json(path, **changes)
    with pytest.raises(IdentityError, match=names):
        read_manifest(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80))
def test_any_other_content_is_refused_and_never_crashes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(IdentityError):
        read_manifest(tmp_path)


def test_keys_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    edit_json(write_manifest(tmp_path, MANIFEST), trained_steps=100)
    assert read_manifest(tmp_path) == MANIFEST


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(tmp_path, MANIFEST)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match="No space left"):
        write_manifest(tmp_path, dataclasses.replace(MANIFEST, base="other"))
    monkeypatch.undo()
    assert read_manifest(tmp_path) == MANIFEST
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_a_folder_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        write_manifest(tmp_path / "absent", MANIFEST)
