from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.errors import IdentityError
from sglang_prefillshare.identity import remembered, weights
from sglang_prefillshare.identity.weights import weights_digest


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write a file and read it at once; only the test of that rule needs it."""
    monkeypatch.setattr(remembered, "SETTLED_NS", 0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Every weight file whose content is read."""
    read: list[Path] = []
    original = weights._hash_file

    def counting(file: Path, pool: Any) -> dict[str, bytes]:
        read.append(file)
        return original(file, pool)

    monkeypatch.setattr(weights, "_hash_file", counting)
    yield read


def entry(cache_home: Path) -> Path:
    [file] = (cache_home / "prefillshare").iterdir()
    return file


def flip_last_byte(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    with open(file, "r+b") as handle:  # in place: the inode stays
        handle.write(whole)


def test_a_second_start_does_not_read_the_weights(model: Path, reads: list[Path]) -> None:
    first = weights_digest(model)
    assert len(reads) == 1
    assert weights_digest(model) == first
    assert len(reads) == 1


def test_the_same_files_reached_through_links_are_remembered(model: Path, tmp_path: Path, reads: list[Path]) -> None:
    weights_digest(model)
    snapshot = tmp_path / "snapshot"  # as the hub cache lays it out
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(model / "model.safetensors")
    weights_digest(snapshot)
    assert len(reads) == 1


def test_changed_content_of_equal_size_is_seen_even_with_its_mtime_set_back(model: Path) -> None:
    file = model / "model.safetensors"
    before, stat = weights_digest(model), file.stat()
    flip_last_byte(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = file.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    assert weights_digest(model) != before


def test_a_replaced_file_is_read_again(model: Path, reads: list[Path]) -> None:
    before = weights_digest(model)
    copy = model / "copy.tmp"
    copy.write_bytes((model / "model.safetensors").read_bytes())
    copy.replace(model / "model.safetensors")
    assert weights_digest(model) == before
    assert len(reads) == 2


def test_a_file_written_a_moment_ago_is_not_remembered(
    model: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "SETTLED_NS", 3_600_000_000_000)
    weights_digest(model)
    weights_digest(model)
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"format": "psw1"}', "digest", "mtime_ns"])
def test_a_damaged_entry_is_ignored_and_replaced(model: Path, reads: list[Path], cache_home: Path, damage: str) -> None:
    right = weights_digest(model)
    content = json.loads(entry(cache_home).read_text())
    if damage == "digest":
        content["digest"] = "0" * 64
    elif damage == "mtime_ns":
        content["files"][0]["mtime_ns"] += 1
    entry(cache_home).write_text(json.dumps(content) if damage in ("digest", "mtime_ns") else damage)
    assert weights_digest(model) == right
    assert len(reads) == 2
    assert weights_digest(model) == right
    assert len(reads) == 2


def test_an_unwritable_cache_is_ignored(model: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    assert weights_digest(model, cache_dir=blocked) == weights_digest(model, cache_dir=tmp_path / "fine")


def test_weights_that_change_while_they_are_read_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = weights._hash_tensor
    file = model / "model.safetensors"

    def hash_and_touch(tensor: Any, view: memoryview) -> bytes:
        os.utime(file, ns=(1, 1))
        return original(tensor, view)

    monkeypatch.setattr(weights, "_hash_tensor", hash_and_touch)
    with pytest.raises(IdentityError, match="changed while they were read"):
        weights_digest(model)


def digest_in_child(folder: Path, results: Any) -> None:
    remembered.SETTLED_NS = 0
    results.put(weights_digest(folder))


def test_processes_starting_together_agree_and_leave_one_whole_entry(model: Path, cache_home: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=digest_in_child, args=(model, results)) for _ in range(4)]
    for child in children:
        child.start()
    digests = {results.get(timeout=30) for _ in children}
    for child in children:
        child.join(timeout=30)
    assert digests == {weights_digest(model)}
    assert json.loads(entry(cache_home).read_text())["digest"] in digests
