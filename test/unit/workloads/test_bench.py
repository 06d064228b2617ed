"""What a benchmark runs, in which order; and that its results are whole when it is told to report again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads.config import Benchmark, Models, RandomModel, Sweep, Workload
from sglang_prefillshare.workloads.points import arrivals_of, points_of, sessions_of, turns_of
from sglang_prefillshare.workloads.results import report_again
from sglang_prefillshare.workloads.topologies import running
from test.unit.workloads.test_report import row

SWEEP = (Sweep(arrival_rates=(1.0,), max_sessions=(4,)),)
AGENTS = ("planner", "coder")


def test_repeats_alternate_and_the_topology_that_is_up_goes_on():
    two = ("shared", "isolated")
    assert turns_of(two, 1) == [("shared", [0]), ("isolated", [0])]
    assert turns_of(two, 3) == [("shared", [0]), ("isolated", [0, 1]), ("shared", [1, 2]), ("isolated", [2])]
    assert turns_of(("shared",), 3) == [("shared", [0, 1, 2])]
    three = turns_of(("shared", "isolated", "colocated"), 2)
    assert three == [("shared", [0]), ("isolated", [0]), ("colocated", [0, 1]), ("isolated", [1]), ("shared", [1])]


def test_sessions_depend_on_seed_and_repeat_and_not_on_where_they_run():
    workload = Workload(preset="react", sessions=3, length_scale=0.1, sweeps=SWEEP)
    one, again, other_repeat, other_seed = (
        sessions_of(workload, AGENTS, seed=seed, repeat=repeat, token_ids=(300, 400))
        for seed, repeat in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert one == again and len(one) == 3
    assert one[0].prompt != other_repeat[0].prompt and one[0].prompt != other_seed[0].prompt
    assert one[0].prompt_lengths == other_repeat[0].prompt_lengths


def test_there_are_as_many_sessions_as_the_largest_point_has():
    few, many = (Sweep(arrival_rates=(1.0,), max_sessions=(cap,), sessions=count) for cap, count in ((1, 2), (2, 5)))
    workload = Workload(preset="react", sessions=3, length_scale=0.1, sweeps=(few, many))
    assert len(sessions_of(workload, AGENTS, seed=1, repeat=0, token_ids=(300, 400))) == 5


def test_lengths_can_be_set_one_by_one_before_scaling():
    workload = Workload(
        preset="react", length_scale=0.5, answer_tokens=10, observation_tokens=0, shared_prefix_tokens=40, sweeps=SWEEP
    )
    [first, *_] = sessions_of(workload, AGENTS, seed=1, repeat=0, token_ids=(300, 400))
    assert first.shared_prefix_tokens == 20
    assert {(step.answer_tokens, step.observation) for _, step in first.steps} == {(5, ())}


def test_a_traces_own_arrivals_are_used_when_asked_for(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    step = {"agent": "coder", "answer_tokens": 2}
    lines = [{"prompt_tokens": 4, "arrival_s": at, "turns": [[step]]} for at in (0.0, 0.7)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    workload = Workload(trace=str(path), trace_arrivals=True, sweeps=SWEEP)
    sessions = sessions_of(workload, AGENTS, seed=1, repeat=0, token_ids=(300, 400))
    benchmark = Benchmark(models=Models(agents=AGENTS, random=RandomModel()), workloads=(workload,))
    [point] = points_of(benchmark, workload, repeat=0, token_ids=(300, 400))
    assert point.arrivals_s == (0.0, 0.7) and point.request_rate == "trace"
    path.write_text(json.dumps({"prompt_tokens": 4, "turns": [[step]]}))
    sessions = sessions_of(workload, AGENTS, seed=1, repeat=0, token_ids=(300, 400))
    with pytest.raises(ConfigError, match="has no arrival_s"):
        arrivals_of(workload, sessions, rate=1.0, seed=1, repeat=0)


def test_a_report_can_be_made_again_from_the_rows(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="waits for matplotlib: run `make setup`")
    about = {
        "config": {"models": {"agents": ["planner", "coder"]}, "repeats": 2},
        "environment": {"device": {"name": "a machine", "cpu_count": 2}},
    }
    rows = [
        {**row(topology, repeat, rate=rate, cap=cap, p95=100 * rate * factor, tokens=50 / factor), **about}
        for topology, factor in (("shared", 1.0), ("isolated", 3.0))
        for repeat in (0, 1)
        for rate in (1.0, 2.0)
        for cap in (4, 8)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    summary = json.loads(report_again(tmp_path).read_text())
    assert summary["config"] == about["config"]
    assert [
        point["ratios"]["shared"]["p95_e2e_ratio"]["median"] for point in summary["workloads"]["react"]["points"]
    ] == [3.0] * 4
    for name in ("figure3.png", "figure4.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_a_folder_without_rows_has_nothing_to_report(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read .*results\.jsonl"):
        report_again(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no rows"):
        report_again(tmp_path)


class Servers:
    """Stands in for a deployment; `interrupt_at` says where somebody presses Ctrl-C."""

    def __init__(self, interrupt_at: str) -> None:
        self.interrupt_at = interrupt_at
        self.log: list[str] = []

    def _maybe(self, place: str) -> None:
        self.log.append(place)
        if self.interrupt_at == place:
            os.kill(os.getpid(), signal.SIGINT)

    def __enter__(self) -> Servers:
        try:
            self._maybe("start")
        except BaseException:
            self._maybe("stop")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._maybe("stop")
        self.log.append("stopped")

    def request_stop(self) -> None:
        self.log.append("hurry")


@pytest.mark.parametrize(
    ("interrupt_at", "log"),
    [
        ("start", ["start", "stop"]),
        ("body", ["start", "body", "stop", "stopped"]),
        ("stop", ["start", "body", "stop", "hurry", "stopped"]),
    ],
)
def test_an_interrupt_ends_the_servers_wherever_it_comes(interrupt_at: str, log: list[str]):
    servers: Any = Servers(interrupt_at)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), running(servers):
        servers._maybe("body")
    assert servers.log == log
    assert signal.getsignal(signal.SIGINT) is before
