"""Measures a machine before a benchmark: the products of a model's forward pass, and one worker's start."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import msgspec

from sglang_prefillshare.environment import cpu_has_bfloat16
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads.budget import ROWS, Machine
from sglang_prefillshare.workloads.config import Benchmark, Models
from sglang_prefillshare.workloads.topologies import make_deployment, running

_REPETITIONS: Final = 5


def measure_machine(benchmark: Benchmark, base: Path, *, log_dir: Path) -> Machine:
    """With the shape of the base, and the dtype and flags that the workers will have; about a minute.

    Raises `ConfigError` for a model whose `config.json` does not name a transformer's usual sizes.
    """
    config = read_config(base)
    _check_sizes(config, base)
    dtype = worker_dtype(benchmark, config)
    products = pass_seconds(config, dtype)
    return Machine(dtype, products, start_seconds(benchmark, base, log_dir=log_dir), len(os.sched_getaffinity(0)))


def worker_dtype(benchmark: Benchmark, config: Mapping[str, Any]) -> str:
    """What CPU workers compute in: what they are told, or what SGLang and our platform take by themselves."""
    told = benchmark.workers.flags.get("dtype") or "auto"
    if told != "auto":
        return {"half": "float16", "float": "float32"}.get(str(told), str(told))
    if not cpu_has_bfloat16():
        return "float32"
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return "float16" if stored == "float32" else stored


def weight_shapes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """[in, out] of a layer's weights as SGLang multiplies: with queries, keys and values at once, gate and up too."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    inner = int(config["intermediate_size"])
    return [
        (hidden, (heads + 2 * kv_heads) * head_size),
        (heads * head_size, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
    ]


def pass_seconds(config: Mapping[str, Any], dtype: str) -> dict[int, float]:
    """By number of rows, how long one thread needs for all products of a forward pass, in seconds: medians."""
    import torch

    from sglang_prefillshare.host.cpu import linear

    kind = getattr(torch, dtype)
    weights = [
        SimpleNamespace(weight=torch.rand(out_size, in_size, dtype=kind)) for in_size, out_size in weight_shapes(config)
    ]

    def layer_s(rows: int) -> float:
        inputs = [torch.rand(rows, layer.weight.shape[1], dtype=kind) for layer in weights]
        started = time.perf_counter()
        for layer, x in zip(weights, inputs, strict=True):
            linear.apply(_plain_product, None, layer, x)
        return time.perf_counter() - started

    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    try:
        with torch.inference_mode():
            layer_s(ROWS[-1])  # the first packs the weights
            found = {rows: statistics.median(layer_s(rows) for _ in range(_REPETITIONS)) for rows in ROWS}
    finally:
        torch.set_num_threads(threads)
    return {rows: seconds * int(config["num_hidden_layers"]) for rows, seconds in found.items()}


def _plain_product(_: Any, layer: Any, x: Any, bias: Any) -> Any:
    from torch.nn import functional

    return functional.linear(x, layer.weight, bias)


def start_seconds(benchmark: Benchmark, base: Path, *, log_dir: Path) -> float:
    """How long one ordinary server of a model of this shape takes from its start until it answers."""
    agent = benchmark.models.names[0]
    one = msgspec.structs.replace(
        benchmark, models=Models(base=str(base), agents={agent: str(base)}), topologies=("colocated",)
    )
    deployment = make_deployment(one, "colocated", {"base": base, agent: base}, log_dir=log_dir)
    with running(deployment):
        return deployment.workers[0].waited_s


def read_config(model: Path) -> Mapping[str, Any]:
    """Raises `ConfigError` for a model without a `config.json` that can be read."""
    try:
        config: dict[str, Any] = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {model / 'config.json'}: {error}.") from error
    return config


def _check_sizes(config: Mapping[str, Any], model: Path) -> None:
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    missing = [name for name in names if not isinstance(config.get(name), int)]
    if missing:
        raise ConfigError(
            f"{model / 'config.json'} has no {', '.join(missing)}, so how long it takes cannot be told. "
            "Leave limits.total_s out."
        )
