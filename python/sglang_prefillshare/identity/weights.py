"""Digest of a model's weights, taken over the tensors that SGLang would load and not over how they are stored.

A safetensors model is the set of its tensors (name, dtype, shape, bytes): sharding, file names and order within a
file do not count. Formats that cannot be read without running code, or that SGLang reads as one blob
(`*.bin`, `*.pt`, GGUF), count by the bytes of their files.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3

from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity import remembered
from sglang_prefillshare.identity.canonical import canonical_json, read_json_object

_INDEX: Final = "model.safetensors.index.json"
_NOT_WEIGHTS: Final = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_MAX_HEADER_BYTES: Final = 100_000_000  # the safetensors format's own limit
_MAX_THREADS: Final = 16
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


def weights_digest(model: Path, *, cache_dir: Path | None = None) -> str:
    """Hex digest of the weights of `model` (a folder, or one GGUF file), remembered in `cache_dir` between calls.

    Raises `ConfigError` when there are no weights, `IdentityError` when a file is truncated, malformed, unreadable
    or changes while it is read.
    """
    files = weight_files(model)
    cache_dir = remembered.default_cache_dir() if cache_dir is None else cache_dir
    read_at_ns = remembered.now_ns()
    try:
        stamps = remembered.stamp_files(files)
        known = remembered.recall(stamps, cache_dir)
        if known is not None:
            return known
        digest = _hash_safetensors(files) if files[0].suffix == ".safetensors" else _hash_blobs(files)
        is_unchanged = remembered.stamp_files(files) == stamps
    except OSError as error:
        raise IdentityError(f"cannot read the weights in {model}: {error}. Check the files and permissions.") from error
    if not is_unchanged:
        raise IdentityError(f"the weights in {model} changed while they were read. Start again once they are written.")
    remembered.remember(stamps, digest, cache_dir, read_at_ns=read_at_ns)
    return digest


def weight_files(model: Path) -> list[Path]:
    """The files SGLang would load from `model`, chosen as its loader chooses them."""
    if model.is_file():
        if model.suffix == ".gguf":
            return [model]
        raise ConfigError(f"{model} is a file, wanted a model folder or a .gguf file.")
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf"):
        files = sorted(file for file in model.glob(pattern) if file.name not in _NOT_WEIGHTS)
        if pattern == "*.safetensors":
            files = _listed_safetensors(model, files)
        if files:
            return files
    raise ConfigError(
        f"{model} holds no weights (*.safetensors, *.bin, *.pt or *.gguf). Give the folder of a whole model; "
        "a LoRA adapter alone is merged into its base first."
    )


def _listed_safetensors(folder: Path, files: list[Path]) -> list[Path]:
    """With an index, the files it lists; without one, all but the duplicates SGLang and Transformers pass over."""
    index = folder / _INDEX
    if not index.is_file() or not files:
        names = {file.name for file in files}
        if "model.safetensors" in names:
            names.discard("consolidated.safetensors")
        return [file for file in files if file.name in names and not file.name.startswith("adapter_model")]
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise IdentityError(f"{index} has no weight_map. Download or save the model again.")
    listed = sorted({folder / str(name) for name in weight_map.values()})
    missing = [file.name for file in listed if not file.is_file()]
    if missing:
        raise IdentityError(f"{folder} lacks {', '.join(missing)}, which {_INDEX} lists. Download the model again.")
    return listed


def _hash_safetensors(files: Sequence[Path]) -> str:
    """Digest over the tensors' own digests in the order of their names. Hashing drops the GIL, so threads share it."""
    leaves: dict[str, bytes] = {}
    with ThreadPoolExecutor(min(_MAX_THREADS, _usable_cores())) as pool:
        for file in files:
            for name, leaf in _hash_file(file, pool).items():
                if leaves.setdefault(name, leaf) != leaf:
                    raise IdentityError(
                        f"tensor {name!r} is stored twice with different contents, the second time in {file}. "
                        f"Remove the stale weight files from {file.parent}."
                    )
    if not leaves:
        raise IdentityError(f"{files[0].parent} holds safetensors files without a tensor. Save the model again.")
    total = blake3(b"prefillshare safetensors 1\0")
    for name in sorted(leaves):
        total.update(leaves[name])
    return total.hexdigest()


def _hash_file(file: Path, pool: ThreadPoolExecutor) -> dict[str, bytes]:
    with open(file, "rb") as handle, _mapped(handle.fileno(), os.fstat(handle.fileno()).st_size) as view:
        # Largest first, so that no thread is left alone with the embeddings at the end.
        tensors = sorted(_read_header(file, view), key=lambda tensor: tensor.start - tensor.end)
        digests = pool.map(lambda tensor: _hash_tensor(tensor, view), tensors)
        return {tensor.name: leaf for tensor, leaf in zip(tensors, digests, strict=True)}


def _hash_tensor(tensor: _Tensor, view: memoryview) -> bytes:
    leaf = blake3(canonical_json([tensor.name, tensor.dtype, list(tensor.shape)]) + b"\0")
    with view[tensor.start : tensor.end] as data:
        leaf.update(data)
    return leaf.digest()


def _hash_blobs(files: Sequence[Path]) -> str:
    digests = sorted(blake3(max_threads=blake3.AUTO).update_mmap(file).digest() for file in files)
    total = blake3(b"prefillshare blobs 1\0")
    for digest in digests:
        total.update(digest)
    return total.hexdigest()


@contextmanager
def _mapped(descriptor: int, size: int) -> Iterator[memoryview]:
    """A read-only view of a whole file; an empty file, which cannot be mapped, is an empty view."""
    if not size:
        yield memoryview(b"")
        return
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as pages, memoryview(pages) as view:
        yield view


def _read_header(file: Path, view: memoryview) -> list[_Tensor]:
    """The tensors of one safetensors file: 8 bytes of header length, a JSON header, then the data.

    Every range is checked against the file's size before it is read, since touching a mapped page past the end
    of a truncated file ends the process.
    """
    try:
        header_bytes = int.from_bytes(view[:8], "little")
        if len(view) < 8 or header_bytes > min(_MAX_HEADER_BYTES, len(view) - 8):
            raise ValueError(f"a header of {header_bytes} bytes does not fit in {len(view)} bytes")
        header = json.loads(bytes(view[8 : 8 + header_bytes]))
        data_start = 8 + header_bytes
        tensors = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = (data_start + int(offset) for offset in entry["data_offsets"])
            tensor = _Tensor(name, str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), start, end)
            if not data_start <= start <= end <= len(view):
                raise ValueError(f"tensor {name!r} ends at byte {end}, the file has {len(view)}")
            bits = _BITS.get(tensor.dtype)
            if bits is not None and math.prod(tensor.shape) * bits != (end - start) * 8:
                raise ValueError(f"tensor {name!r} has {end - start} bytes, its shape and dtype need another number")
            tensors.append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IdentityError(
            f"{file} is not a whole safetensors file ({error}). Download or save the model again."
        ) from error
    return tensors


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
