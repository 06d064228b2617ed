"""A prefix that several legs hold counts once, in whatever order they come and go."""

from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.routing.holdings import NOTHING, Hold, Holdings

PATHS = st.lists(st.sampled_from("ab"), max_size=5).map(
    lambda letters: ["".join(letters[: i + 1]) for i in range(len(letters))]
)
"""Chains as block hashes make them: each block names all before it."""
HOLDS = st.builds(Hold, st.lists(PATHS, max_size=2), st.integers(0, 9))


def tokens_of(holds):
    """Counted the long way: each different block once."""
    blocks = {block for hold in holds for chain in hold.chains for block in chain}
    return 4 * len(blocks) + sum(hold.own_tokens for hold in holds)


@given(st.data())
def test_what_is_held_is_the_union(data):
    holdings, held = Holdings(block_tokens=4), []
    for _ in range(data.draw(st.integers(0, 12))):
        if held and data.draw(st.booleans()):
            holdings.give_back(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            hold = data.draw(HOLDS)
            before = holdings.tokens
            needed = holdings.need(hold)
            holdings.take(hold)
            held.append(hold)
            assert holdings.tokens - before <= needed
            if len(hold.chains) == 1:
                assert holdings.tokens - before == needed
        assert holdings.tokens == tokens_of(held)
    for hold in held:
        holdings.give_back(hold)
    assert holdings.tokens == 0


def test_nothing_needs_nothing():
    assert Holdings(block_tokens=64).need(NOTHING) == 0
