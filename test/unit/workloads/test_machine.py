"""What is measured of a machine before a benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads import machine
from sglang_prefillshare.workloads.config import Benchmark, parse_benchmark
from sglang_prefillshare.workloads.machine import measure_machine, pass_seconds, weight_shapes, worker_dtype

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def benchmark_with(args: dict[str, Any]) -> Benchmark:
    text = {
        "models": {"agents": ["a"], "random": {}},
        "workloads": [{"preset": "react", "sweeps": [{"arrival_rates": [1], "max_sessions": [1]}]}],
        "workers": {"args": args},
    }
    return parse_benchmark(json.dumps(text))


def test_a_layers_weights_are_those_that_sglang_multiplies_with():
    assert weight_shapes(CONFIG) == [(64, 128), (64, 64), (64, 256), (128, 64)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_forward_pass_of_more_layers_takes_longer(dtype: str):
    pytest.importorskip("torch")
    pytest.importorskip("psutil")
    few = pass_seconds(CONFIG, dtype)
    many = pass_seconds({**CONFIG, "num_hidden_layers": 200}, dtype)
    assert list(few) == [1, 8, 64] and all(seconds > 0 for seconds in few.values())
    assert many[64] > 5 * few[64]


@pytest.mark.parametrize(
    ("flag", "stored", "has_bfloat16", "taken"),
    [
        (None, "bfloat16", True, "bfloat16"),
        (None, "bfloat16", False, "float32"),
        ("auto", "bfloat16", False, "float32"),
        (None, "float32", True, "float16"),
        ("bfloat16", "float32", False, "bfloat16"),
        ("half", "bfloat16", True, "float16"),
    ],
)
def test_the_dtype_is_the_one_that_workers_will_take(
    flag: str | None, stored: str, has_bfloat16: bool, taken: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "cpu_has_bfloat16", lambda: has_bfloat16)
    args: dict[str, Any] = {} if flag is None else {"dtype": flag}
    assert worker_dtype(benchmark_with(args), {"dtype": stored}) == taken
    assert worker_dtype(benchmark_with(args), {"torch_dtype": stored}) == taken


def test_a_model_of_another_kind_is_refused_by_what_it_lacks(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "d_ff": 128}))
    with pytest.raises(ConfigError, match="has no num_attention_heads, intermediate_size, num_hidden_layers"):
        measure_machine(benchmark_with({}), tmp_path, log_dir=tmp_path)
