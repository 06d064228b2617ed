"""A benchmark's file: defaults, and errors with file, line and key."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads.config import load_benchmark, parse_benchmark

GOOD = """\
models:
  agents: [planner, coder]
  random: {layers: 2}
workloads:
  - preset: react
    sweeps:
      - {arrival_rates: [1, 2], max_sessions: [4]}
      - {arrival_rates: [.inf, 2], max_sessions: [4, 8], sessions: 40}
"""


def test_points_are_each_rate_with_each_cap_once():
    benchmark = parse_benchmark(GOOD)
    workload = benchmark.workloads[0]
    assert workload.points == [(1.0, 4, 16), (2.0, 4, 16), (math.inf, 4, 40), (math.inf, 8, 40), (2.0, 8, 40)]
    assert benchmark.topologies == ("shared", "isolated") and benchmark.repeats == 3
    assert workload.label == "react" and benchmark.models.names == ("planner", "coder")
    assert benchmark.to_json()["models"]["random"]["layers"] == 2


def test_the_command_line_replaces_keys_and_is_checked_like_them():
    changed = parse_benchmark(GOOD, out="elsewhere", repeats=None, topologies=("colocated",), length_scale=0.5)
    assert (changed.out, changed.repeats, changed.topologies) == ("elsewhere", 3, ("colocated",))
    assert changed.workloads[0].length_scale == 0.5
    with pytest.raises(ConfigError, match="repeats is 0, wanted 1 or more"):
        parse_benchmark(GOOD, repeats=0)
    with pytest.raises(ConfigError, match="length_scale is -1"):
        parse_benchmark(GOOD, length_scale=-1)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("preset: react", "preset: cot", "b.yaml:5: workloads[0].preset is 'cot', wanted react or reflexion"),
        ("preset: react", "presets: react", "b.yaml:5: unknown key workloads[0].presets. Did you mean preset?"),
        (
            "    sweeps:",
            "    sessions: few\n    sweeps:",
            "b.yaml:6: workloads[0].sessions is 'few', wanted a whole num",
        ),
        ("    sweeps:", "    sessions: 0\n    sweeps:", "b.yaml:6: workloads[0]: sessions is 0, wanted 1 or more"),
        ("[1, 2]", "[1, 0]", "b.yaml:7: workloads[0].sweeps[0]: arrival_rates is [1.0, 0.0], wanted numbers above 0"),
        (
            "[4, 8], sessions: 40",
            "[4], sessions: 0",
            "b.yaml:8: workloads[0].sweeps[1]: sessions is 0, wanted 1 or more",
        ),
        ("{layers: 2}", "{layers: 2, heads: 3}", "b.yaml:3: models.random: heads is 3, wanted a divisor"),
        ("  random: {layers: 2}\n", "", "b.yaml:2: models: agents is to be {NAME: MODEL}"),
        ("  random: {layers: 2}\n", "  random: {}\n  base: x\n", "random is given with models of your own"),
        ("[planner, coder]", "[planner, planner]", "b.yaml:2: models: agents is ('planner', 'planner'), wanted each"),
        ("models:", "seed: 1\nseed: 2\nmodels:", "b.yaml:2: seed is given twice, first in line 1"),
        ("preset: react", "trace: none.jsonl", "trace is 'none.jsonl', wanted a JSONL file"),
        ("preset: react", "preset: react\n    trace: x", "preset or trace is to be given"),
        ("models:", "limits: {point_s: 0}\nmodels:", "b.yaml:1: limits: point_s is 0.0, wanted a number of seconds"),
        ("models:", "workers: {isolated: {}}\nmodels:", "b.yaml:1: unknown key workers.isolated. Did you mean"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_key(old: str, new: str, complaint: str):
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        parse_benchmark(GOOD.replace(old, new, 1), source="b.yaml")
    assert complaint in str(error.value), str(error.value)


def test_a_trace_and_models_are_found_beside_the_file(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text("{}")
    for name in ("base", "planner"):
        (tmp_path / name).mkdir()
    path = tmp_path / "b.yaml"
    path.write_text(
        "models: {base: ./base, agents: {planner: ./planner}}\n"
        "workloads: [{trace: t.jsonl, sweeps: [{arrival_rates: [1], max_sessions: [1]}]}]\n"
    )
    benchmark = load_benchmark(path)
    assert benchmark.workloads[0].trace == str(tmp_path / "t.jsonl") and benchmark.workloads[0].label == "t"
    assert benchmark.models.base == str(tmp_path / "base") and benchmark.models.names == ("planner",)
    with pytest.raises(ConfigError, match="cannot read the benchmark"):
        load_benchmark(tmp_path / "none.yaml")
