"""The demo's pure parts: its requests, its script and its figures."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest

from examples.demo.exercises import comparison, draw_request, wrong_code
from examples.demo.models import ADAPTERS, BASE_NAME
from examples.demo.oracle import common_prefix
from examples.demo.program import Call, is_right, rounds_script
from examples.demo.report import (
    HandoffFigures,
    SessionFigures,
    computed_without_sharing,
    figures,
    handoff_figures,
    own_figures,
    sessions,
)
from examples.demo.rounds import ROLES, Role, examples, messages_of
from sglang_prefillshare.errors import PrefillShareError
from sglang_prefillshare.identity.manifest import read_manifest


def call(model: str, prompt: range, answer: range = range(0), client: str = "frontend") -> Call:
    return Call(client, 1, model, "rid", tuple(prompt), tuple(answer), "text")


def record(**changes: Any) -> dict[str, Any]:
    fields = {"model": "coder", "prefill_tokens": 9, "cached_tokens": 4, "cross_model_cached_tokens": 3}
    return {**fields, "ttft_ms": 10.0, "e2e_ms": 20.0, **changes}


def test_every_request_is_one_round_of_all_agents_and_told_to_the_first() -> None:
    requests = [draw_request(random.Random(seed), "test") for seed in (1, 2)]
    steps = rounds_script(requests, max_new_tokens=8).steps
    assert [step.model for step in steps] == ["planner", "coder", "reviewer"] * 2
    assert [step.turn for step in steps] == [1, 1, 1, 2, 2, 2]
    assert [requests[step.turn - 1].text in step.message for step in steps] == [True, False, False] * 2


def test_a_reviewer_says_what_should_stand_there_and_the_conversation_keeps_a_verdict() -> None:
    request = draw_request(random.Random(3), "test")
    script = rounds_script([request], max_new_tokens=8)
    said = {"planner": request.plan, "coder": f" {request.code}\n", "reviewer": request.code}
    calls = [dataclasses.replace(call(model, range(3)), answer=answer) for model, answer in said.items()]
    assert all(is_right(each, [request]) for each in calls)
    for step, each in zip(script.steps[:2], calls, strict=False):
        assert script.kept(step, each.answer, calls) == each.answer
    assert script.kept(script.steps[2], request.code, calls[:2]) == "right"
    calls[1] = dataclasses.replace(calls[1], answer="sum(ws)")
    assert not is_right(calls[1], [request]) and is_right(calls[2], [request])
    assert script.kept(script.steps[2], request.code, calls[:2]) == f"wrong: {request.code}"


def test_training_and_the_demo_keep_the_same_words_of_a_round() -> None:
    request = draw_request(random.Random(4), "train")
    for code in (request.code, "sum(ws)"):
        script = rounds_script([request], max_new_tokens=8)
        said = {"planner": request.plan, "coder": code, "reviewer": request.code}
        calls = [dataclasses.replace(call(step.model, range(3)), answer=said[step.model]) for step in script.steps]
        kept = [script.kept(step, said[step.model], calls) for step in script.steps]
        trained = messages_of(request, code=code)
        assert [message["content"] for message in trained if message["role"] == "assistant"] == kept
        assert [message["content"] for message in trained if message["role"] == "user"] == [
            step.message for step in script.steps
        ]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("set(x for x in xs)", "set(xs)"),
        ('" ".join([w for w in ws])', '" ".join(ws)'),
        ("sum(x**2 for x in xs if x > -1 and x != 0)", "sum(x * x for x in xs if x > 0)"),
        ("max([*xs])", "max(xs)"),  # both raise for an empty list
    ],
)
def test_code_in_other_words_computes_the_same(answer: str, code: str) -> None:
    exec(comparison(answer, code), {})


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("list(xs)", "set(xs)"),
        ("(x for x in xs)", "[x for x in xs]"),
        ("max(x for x in xs if x > 7)", "max(x for x in xs if x > 6)"),
        ("min(x for x in xs if x < 1)", "min(x for x in xs if x < 0)"),
        ('[w for w in ws if w[0] == "h"]', 'sorted(w for w in ws if w[0] == "h")'),
        ('len([w for w in ws if "q" in w])', 'len([w for w in ws if w[-1] == "q"])'),
        ("[w for w in ws if len(w) > 7]", "[w for w in ws if len(w) > 8]"),
        ("max(xs, default=0)", "max(xs)"),
        ("sum(xs", "sum(xs)"),
        ("", "sum(xs)"),
    ],
)
def test_code_that_computes_something_else_is_told_apart(answer: str, code: str) -> None:
    with pytest.raises(AssertionError):
        exec(comparison(answer, code), {})


@pytest.mark.parametrize("role", ROLES)
def test_what_is_tested_was_never_trained(role: Role) -> None:
    trained = {message["content"] for each in examples(role, "train", count=300, seed=0) for message in each["prompt"]}
    asked = {
        [message["content"] for message in each["prompt"] if message["content"].endswith("name the steps.")][-1]
        for each in examples(role, "test", count=200, seed=0)
    }
    assert len(asked) == 200 and not asked & trained


def test_the_code_of_every_request_runs_and_gives_what_its_plan_says() -> None:
    names: dict[str, Any] = {"xs": [4, -3, 8, 7, 7, 0], "ws": ["apple", "NOUN", "tree", "rat"]}
    by_hand = {
        "xs | keep even | square | sum": 16 + 64,
        "xs | keep negative | double | list": [-6],
        "xs | sort": [-3, 0, 4, 7, 7, 8],
        "ws | keep capitals | length | list": [4],
        "ws | first letter | join": "a N t r",
    }
    found: dict[str, Any] = {}
    generator = random.Random(5)
    for index in range(6000):
        request = draw_request(generator, "train" if index % 2 else "test")
        try:
            value = eval(request.code, {}, names)
        except ValueError as error:  # the largest of nothing
            assert "empty" in str(error) or "no items" in str(error), request.code
            continue
        if request.plan in by_hand:
            found[request.plan] = value
        assert wrong_code(request, generator) != request.code
    assert found == by_hand


@pytest.mark.parametrize("role", ROLES)
def test_an_adapter_names_its_base_and_no_path_of_the_machine_that_made_it(role: Role) -> None:
    config = json.loads((ADAPTERS / role / "adapter_config.json").read_text())
    manifest = read_manifest(ADAPTERS / role)
    assert manifest is not None and config["base_model_name_or_path"] == manifest.base == BASE_NAME


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


def test_of_one_server_the_found_tokens_belong_to_the_call_that_first_had_them() -> None:
    timed = {"ttft_ms": 1.0, "e2e_ms": 2.0}
    calls = [
        dataclasses.replace(call("planner", range(10)), cached_tokens=0, **timed),
        dataclasses.replace(call("coder", range(20)), cached_tokens=9, **timed),  # 9 of planner
        dataclasses.replace(call("coder", range(20)), cached_tokens=19, **timed),  # 9 of planner, 10 its own
        dataclasses.replace(call("planner", range(30)), cached_tokens=12, **timed),  # of 19 only 12 were still there
        dataclasses.replace(call("planner", range(5, 9)), cached_tokens=0, **timed),
    ]
    assert [each.cross_model_cached_tokens for each in own_figures(calls)] == [0, 9, 9, 3, 0]
    assert [each.computed_tokens for each in own_figures(calls)] == [9, 10, 0, 17, 3]


def test_an_answer_that_does_not_say_what_was_found_is_refused() -> None:
    with pytest.raises(PrefillShareError, match="does not say what it found"):
        own_figures([call("planner", range(10))])


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
