"""Sessions: lengths known before any answer, seeded contents, and what a perfect cache would have to compute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.workloads.session import Session, Step, Words, unique_context_tokens

TURNS = ((Step("planner", 5, (1, 2, 3)), Step("coder", 5, (4,))), (Step("planner", 2),))


def test_prompt_lengths_count_answers_and_observations():
    session = Session("s", tuple(range(10)), 4, TURNS)
    assert session.prompt_lengths == [10, 18, 24]
    assert session.call_count == 3 and session.answer_tokens == 12
    assert session.total_tokens == 26
    assert [turn for turn, _ in session.steps] == [0, 0, 1]


def test_words_depend_on_seed_and_name_alone():
    words, again, other = (Words(seed=seed, token_ids=(10, 20)) for seed in (1, 1, 2))
    words.draw("something else", 3)
    assert words.draw("a", 50) == again.draw("a", 50) != other.draw("a", 50)
    assert words.draw("a", 50)[:20] == words.draw("a", 20)
    assert set(words.draw("a", 500)) == set(range(10, 20))


prompts = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=6).map(tuple), st.integers(0, 9)), max_size=8
)


@given(prompts)
def test_unique_tokens_are_the_nodes_of_a_tree_of_the_prompts(drawn: list[tuple[tuple[int, ...], int]]):
    """Counted again with a set of prefixes. What grows beyond a first prompt belongs to its session."""
    sessions = [(Session(f"s{index}", prompt, 0, TURNS), longest) for index, (prompt, longest) in enumerate(drawn)]
    nodes = {prompt[:end] for prompt, longest in drawn for end in range(1, min(longest, len(prompt)) + 1)}
    grown = sum(max(0, longest - len(prompt)) for prompt, longest in drawn)
    assert unique_context_tokens(sessions) == len(nodes) + grown
