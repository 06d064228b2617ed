from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity.weights import weights_digest
from test.unit.identity.tiny import tensors


def shard(folder: Path, assignment: list[int]) -> Path:
    """Write `tensors()` with tensor i in shard `assignment[i]`, and the index that lists them."""
    folder.mkdir()
    shards: dict[int, dict[str, np.ndarray]] = {}
    for (name, tensor), number in zip(tensors().items(), assignment, strict=True):
        shards.setdefault(number, {})[name] = tensor
    weight_map = {}
    for number, part in shards.items():
        save_file(part, folder / f"part-{number}.safetensors", metadata={"format": "pt", "shard": str(number)})
        weight_map.update(dict.fromkeys(part, f"part-{number}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(assignment=st.lists(st.integers(0, 4), min_size=5, max_size=5))
def test_sharding_does_not_count(model: Path, tmp_path: Path, assignment: list[int]) -> None:
    folder = tmp_path / "sharded"
    shutil.rmtree(folder, ignore_errors=True)
    assert weights_digest(shard(folder, assignment)) == weights_digest(model)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_of_any_tensor_counts(model: Path, data: st.DataObject) -> None:
    before = weights_digest(model)
    file = model / "model.safetensors"
    whole = bytearray(file.read_bytes())
    data_start = 8 + int.from_bytes(whole[:8], "little")
    position = data.draw(st.integers(data_start, len(whole) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    whole[position] ^= bit
    file.write_bytes(whole)
    try:
        assert weights_digest(model) != before
    finally:
        whole[position] ^= bit
        file.write_bytes(whole)
    assert weights_digest(model) == before


def rewrite(folder: Path, change: str) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    value_name = "model.layers.0.self_attn.v_proj.weight"
    if change == "name":
        weights[name + "_x"] = weights.pop(name)  # keeps its place among the sorted names
    elif change == "dtype":
        weights[name] = weights[name].view(np.int32)
    elif change == "shape":
        weights[name] = weights[name].reshape(8, 4)
    elif change == "swapped":
        weights[name], weights[value_name] = weights[value_name], weights[name]
    elif change == "missing":
        del weights[name]
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "swapped", "missing"])
def test_what_a_tensor_is_counts_as_much_as_its_bytes(model: Path, change: str) -> None:
    before = weights_digest(model)
    rewrite(model, change)
    assert weights_digest(model) != before


def test_saving_the_same_tensors_again_does_not_count(model: Path) -> None:
    before = weights_digest(model)
    rewrite(model, "nothing")
    assert weights_digest(model) == before


def test_files_outside_the_index_do_not_count(tmp_path: Path) -> None:
    folder = shard(tmp_path / "sharded", [0, 0, 1, 1, 1])
    before = weights_digest(folder)
    save_file({"stale": np.zeros(3)}, folder / "consolidated.safetensors")
    assert weights_digest(folder) == before


def test_a_shard_that_the_index_lists_must_be_there(tmp_path: Path) -> None:
    folder = shard(tmp_path / "sharded", [0, 0, 1, 1, 1])
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(IdentityError, match=r"lacks part-1\.safetensors"):
        weights_digest(folder)


def test_a_tensor_stored_twice_with_different_contents_is_refused(model: Path) -> None:
    save_file({"model.norm.weight": np.zeros(8, dtype=np.float32)}, model / "stale.safetensors")
    with pytest.raises(IdentityError, match=r"'model\.norm\.weight' is stored twice"):
        weights_digest(model)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file_is_refused(model: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(IdentityError, match=r"model\.safetensors is not a whole safetensors file"):
        weights_digest(model)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.one_of(st.binary(max_size=64), st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "t", "__metadata__"]), inner, max_size=3),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_a_malformed_header_is_refused_and_never_crashes(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(IdentityError):
        weights_digest(tmp_path)


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "training_args.bin").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="holds no weights"):
        weights_digest(model)


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00001.bin", "model.gguf"])
def test_other_formats_count_by_their_bytes(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"first" * 100)
    first = weights_digest(model)
    (model / name).rename(model / f"renamed.{name.rsplit('.')[-1]}")
    assert weights_digest(model) == first
    (model / name).write_bytes(b"other" * 100)
    assert weights_digest(model) != first


def test_a_gguf_file_can_be_named_itself(tmp_path: Path) -> None:
    (tmp_path / "one.gguf").write_bytes(b"one")
    (tmp_path / "two.gguf").write_bytes(b"two")
    assert weights_digest(tmp_path / "one.gguf") != weights_digest(tmp_path / "two.gguf")
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ConfigError, match="wanted a model folder or a"):
        weights_digest(tmp_path / "model.onnx")
