"""The demo's program on tiny models: what was prefilled, what was reused and whose it was, and every token."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from examples.demo.oracle import Oracle
from examples.demo.program import Call, Script, Step, play
from examples.demo.report import CallFigures, computed_without_sharing, figures, sessions
from examples.demo.servers import record
from sglang_prefillshare.deployment import Deployment
from test.e2e.conftest import Models
from test.support import oracle as reference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TURNS = 4
MODELS = ("planner", "coder", "twin")
DOCUMENT = (Path(__file__).parents[2] / "LICENSE").read_text()[1000:5500]


@dataclass(frozen=True, slots=True)
class Demo:
    """Both clients' calls, one client after the other."""

    calls: list[Call]
    figures: list[CallFigures]


@pytest.fixture(scope="module")
def demo(deployment: Deployment, models: Models) -> Demo:
    from examples.demo import chat, frontend

    url = deployment.router_url
    with urllib.request.urlopen(urllib.request.Request(f"{url}/flush_cache", method="POST"), timeout=30) as response:
        assert response.status == 200
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    spoken: list[str] = []
    steps: list[Step] = []

    def script(problem: str) -> Script:
        steps = [
            Step(turn, model, f"{problem} You are the {model}. What do you say?")
            for turn in range(1, TURNS + 1)
            for model in MODELS
        ]
        return Script(DOCUMENT, tuple(steps), max_new_tokens=8)

    first, second = script("Which are the first three primes?"), script("Which city is the capital of France?")
    answers = frontend.run(first, spoken.append, url=url, tokenize=lambda text: tokenizer(text).input_ids)
    calls = play(first, answers, on_step=steps.append)
    calls += play(second, chat.run(second, spoken.append, url=url), on_step=steps.append)
    assert [(step.turn, step.model) for step in steps] == [(call.turn, call.model) for call in calls]
    assert "".join(spoken) == "".join(call.answer for call in calls)
    return Demo(calls, [figures(call, record(url, call.rid)) for call in calls])


def first_computed(calls: list[Call]) -> Iterator[tuple[int, int]]:
    """For each call, how many of its prompt's tokens a cache of every earlier prompt holds, and how many of those a
    call of another model put there. A trie of whole prefixes, built here from nothing but token ids."""
    trie: dict[int, Any] = {}
    for call in calls:
        node, cached, foreign = trie, 0, 0
        for token in call.prompt_ids[:-1]:
            owner, below = node.setdefault(token, (None, {}))
            if owner is None:
                node[token] = (call.model, below)
            else:
                cached += 1
                foreign += owner != call.model
            node = below
        yield cached, foreign


def test_the_context_is_prefilled_once_for_all_agents(demo: Demo) -> None:
    assert len(demo.calls) == 2 * TURNS * len(MODELS)
    # Here the chat template writes a first token that the frontend language does not, so each session starts anew.
    both = sessions(demo.figures)
    assert [session.client for session in both] == ["frontend", "openai"]
    for session in both:
        assert session.final_context_tokens >= 1500
        assert session.computed_prompt_tokens <= 1.02 * session.final_context_tokens, session
    assert computed_without_sharing(demo.calls) > 2.5 * sum(session.computed_prompt_tokens for session in both)


def test_reuse_is_counted_exactly_and_by_whose_prompt_it_was(demo: Demo) -> None:
    found = [(call.cached_tokens, call.cross_model_cached_tokens) for call in demo.figures]
    assert found == list(first_computed(demo.calls))
    assert found[0] == (0, 0)
    assert all(cross > 0 for _, cross in found[1 : TURNS * len(MODELS)])


def test_times_are_measured(demo: Demo) -> None:
    assert all(0 < call.ttft_ms < call.e2e_ms for call in demo.figures)


def test_every_token_equals_the_oracle(demo: Demo, models: Models) -> None:
    oracle = Oracle(models.base, {model: getattr(models, model) for model in MODELS})
    verdicts = [oracle.check(call.to_json()) for call in demo.calls]
    assert [verdict.is_equal for verdict in verdicts] == [True] * len(demo.calls)
    errors = [verdict.log_prob_error for verdict in verdicts if verdict.log_prob_error is not None]
    assert len(errors) == TURNS * len(MODELS) and max(errors) < 1e-3

    # The demo's oracle is itself right, and can say no.
    call = demo.calls[-2]
    generated = reference.Oracle(models.base, models.coder).generate(call.prompt_ids, len(call.answer_ids))
    assert list(call.answer_ids) == generated.token_ids
    wrong = {**call.to_json(), "answer_ids": [*call.answer_ids[:5], call.answer_ids[5] + 1, *call.answer_ids[6:]]}
    assert oracle.check(wrong).first_difference == 5
    assert not oracle.check({**call.to_json(), "model": "planner"}).is_equal
