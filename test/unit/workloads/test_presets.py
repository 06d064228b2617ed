"""The presets keep what Kim et al. measured, and their sessions share what they say they share."""

from __future__ import annotations

import statistics
from typing import get_args

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.workloads.presets import MEASURED, PresetName, Shape, make_session, preset_shape
from sglang_prefillshare.workloads.session import Words

AGENTS = ("planner", "coder", "reviewer", "critic")
WORDS = Words(seed=3, token_ids=(100, 400))


@pytest.mark.parametrize("name", get_args(PresetName))
@pytest.mark.parametrize("agents", [AGENTS, AGENTS[:2], AGENTS[:3]])
def test_mean_input_and_answer_are_those_measured(name: PresetName, agents: tuple[str, ...]):
    shape = preset_shape(name, agents)
    session = make_session(shape, workload=name, index=0, words=WORDS)
    assert statistics.fmean(session.prompt_lengths) == pytest.approx(MEASURED[name].input_tokens, rel=0.005)
    assert {step.answer_tokens for _, step in session.steps} == {MEASURED[name].answer_tokens}
    assert session.call_count >= MEASURED[name].calls - len(agents) / 2


@pytest.mark.parametrize("name", get_args(PresetName))
@pytest.mark.parametrize("agents", [AGENTS, AGENTS[:2], AGENTS[:3]])
def test_the_papers_hit_ratio_is_possible_and_no_turn_is_more_than_that_needs(name, agents):
    def best_hit_ratio(turns: int | None) -> float:
        session = make_session(preset_shape(name, agents, turns=turns), workload=name, index=0, words=WORDS)
        return 1 - (session.prompt_lengths[-1] - session.shared_prefix_tokens) / sum(session.prompt_lengths)

    turns = preset_shape(name, agents).turns
    assert best_hit_ratio(None) > 0.889
    fewer = turns - 1
    assert best_hit_ratio(fewer) < 0.889 or abs(fewer * len(agents) - MEASURED[name].calls) > len(agents) / 2


def test_four_agents_have_the_documented_lengths():
    react, reflexion = (preset_shape(name, AGENTS) for name in get_args(PresetName))
    assert (react.turns, react.observation_tokens, react.shared_prefix_tokens) == (3, 105, 776)
    assert (reflexion.turns, reflexion.observation_tokens, reflexion.shared_prefix_tokens) == (3, 187, 798)


def test_every_turn_calls_every_agent_in_order():
    session = make_session(preset_shape("react", AGENTS), workload="react", index=0, words=WORDS)
    assert [tuple(step.agent for step in steps) for steps in session.turns] == [AGENTS] * 3


def test_sessions_share_the_prefix_and_nothing_else():
    shape = preset_shape("react", AGENTS)
    one, other = (make_session(shape, workload="react", index=index, words=WORDS) for index in (0, 1))
    shared = shape.shared_prefix_tokens
    assert one.prompt[:shared] == other.prompt[:shared]
    assert one.prompt[shared:] != other.prompt[shared:]
    observed = [step.observation for session in (one, other) for _, step in session.steps]
    assert len(set(observed)) == len(observed)
    assert one == make_session(shape, workload="react", index=0, words=Words(seed=3, token_ids=(100, 400)))


def test_without_a_shared_prefix_lengths_stay_and_beginnings_differ():
    shared, own = (preset_shape("react", AGENTS, shares_prefix=shares) for shares in (True, False))
    one, other = (make_session(own, workload="react", index=index, words=WORDS) for index in (0, 1))
    assert one.prompt_lengths == make_session(shared, workload="react", index=0, words=WORDS).prompt_lengths
    assert one.shared_prefix_tokens == 0 and one.prompt[:8] != other.prompt[:8]


def test_scaling_keeps_turns_and_never_empties_a_length():
    shape = preset_shape("reflexion", AGENTS).scaled(0.25)
    assert (shape.turns, shape.shared_prefix_tokens, shape.answer_tokens) == (3, 200, 18)
    tiny = preset_shape("reflexion", AGENTS).scaled(0.001)
    assert (tiny.own_prefix_tokens, tiny.answer_tokens) == (1, 1)
    assert preset_shape("react", AGENTS, shares_prefix=False).scaled(0.5).shared_prefix_tokens == 0


@pytest.mark.parametrize("field", ["turns", "answer_tokens", "own_prefix_tokens"])
def test_a_shape_without_a_length_it_needs_is_refused(field: str):
    values = {"turns": 1, "shared_prefix_tokens": 0, "own_prefix_tokens": 2, "answer_tokens": 1}
    with pytest.raises(ConfigError, match=f"{field} is 0, wanted 1 or more"):
        Shape(agents=("a",), observation_tokens=0, **{**values, field: 0})
