"""A trace is replayed as written; a line that does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads.session import Step, Words
from sglang_prefillshare.workloads.trace import load_trace

AGENTS = ("planner", "coder")
WORDS = Words(seed=3, token_ids=(100, 400))
STEP: dict[str, Any] = {"agent": "coder", "answer_tokens": 4, "observation_tokens": 6}
LINE: dict[str, Any] = {"prompt_tokens": 20, "turns": [[STEP]]}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_lengths_ids_names_and_times_are_kept(tmp_path: Path):
    given = {
        "session": "a",
        "arrival_s": 1.5,
        "input_ids": [7, 8, 9],
        "turns": [[{"agent": "planner", "answer_tokens": 2, "observation_ids": [5]}, STEP], [STEP]],
    }
    path = written(tmp_path, given, "", {**LINE, "arrival_s": 2.0, "shared_prefix_tokens": 15})
    first, second = load_trace(path, agents=AGENTS, words=WORDS)
    assert (first.name, first.arrival_s, first.prompt) == ("a", 1.5, (7, 8, 9))
    assert first.turns[0][0] == Step("planner", 2, (5,))
    assert first.prompt_lengths == [3, 6, 16]
    assert (second.name, len(second.prompt), second.prompt_lengths) == ("line-3", 20, [20])
    assert second == load_trace(path, agents=AGENTS, words=WORDS)[1]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path):
    path = written(tmp_path, LINE, LINE)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_trace(path, agents=AGENTS, words=WORDS)) == 2


def test_shared_prefixes_are_the_same_tokens_as_far_as_both_go(tmp_path: Path):
    path = written(tmp_path, {**LINE, "shared_prefix_tokens": 15}, {**LINE, "shared_prefix_tokens": 10}, LINE)
    long, short, none = load_trace(path, agents=AGENTS, words=WORDS)
    assert long.prompt[:10] == short.prompt[:10]
    assert long.prompt[10:] != short.prompt[10:] and long.prompt[:2] != none.prompt[:2]


def test_scale_stretches_lengths_and_not_ids(tmp_path: Path):
    path = written(tmp_path, LINE, {"input_ids": [1, 2, 3], "turns": [[STEP]]})
    filled, given = load_trace(path, agents=AGENTS, words=WORDS, length_scale=2.0)
    assert len(filled.prompt) == 40 and len(given.prompt) == 3
    assert filled.turns[0][0].answer_tokens == 8 and len(given.turns[0][0].observation) == 12


def test_a_limit_reads_no_further(tmp_path: Path):
    assert len(load_trace(written(tmp_path, LINE, "no JSON"), agents=AGENTS, words=WORDS, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Input data was truncated"),
        ("[]", "Expected `object`, got `array`"),
        ({"turns": [[STEP]]}, "prompt_tokens is missing"),
        ({**LINE, "input_ids": [1, 2]}, "both given"),
        ({**LINE, "prompts": 3}, "unknown field `prompts`"),
        ({**LINE, "prompt_tokens": "many"}, "Expected `int | null`, got `str` - at `$.prompt_tokens`"),
        ({**LINE, "prompt_tokens": 1}, "prompt_tokens is 1, wanted 2 or more"),
        ({**LINE, "shared_prefix_tokens": 21, "input_ids": [1, 2], "prompt_tokens": None}, "wanted at most"),
        ({"input_ids": [1, -2], "turns": [[STEP]]}, "negative"),
        ({**LINE, "arrival_s": -1}, "arrival_s is -1"),
        ({**LINE, "turns": []}, "turns is empty"),
        ({**LINE, "turns": [[]]}, "empty turn"),
        ({**LINE, "turns": [[{**STEP, "agent": "writer"}]]}, "turns[0][0].agent is 'writer', wanted one of planner"),
        ({**LINE, "turns": [[{**STEP, "answer_tokens": 0}]]}, "answer_tokens is 0"),
        ({**LINE, "turns": [[{**STEP, "observation_ids": [1]}]]}, "both given"),
        ({**LINE, "session": "line-1"}, "session 'line-1' is there twice, first in line 1"),
    ],
)
def test_a_line_that_does_not_fit_is_named_with_file_and_line(tmp_path: Path, line: Any, complaint: str):
    path = written(tmp_path, LINE, line)
    with pytest.raises(ConfigError) as error:
        load_trace(path, agents=AGENTS, words=WORDS)
    assert str(error.value).startswith(f"{path}:2: ") and complaint in str(error.value)


def test_traces_that_hold_nothing_or_half_the_times_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no sessions"):
        load_trace(written(tmp_path, ""), agents=AGENTS, words=WORDS)
    with pytest.raises(ConfigError, match="arrival_s on 1 of 2 lines"):
        load_trace(written(tmp_path, LINE, {**LINE, "arrival_s": 1}), agents=AGENTS, words=WORDS)
    with pytest.raises(ConfigError, match="cannot read the trace"):
        load_trace(tmp_path / "none.jsonl", agents=AGENTS, words=WORDS)
