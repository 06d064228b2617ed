"""The prefix index against a plain list of what was sent where."""

from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.routing.prefix_index import PrefixIndex, chain_hashes

BLOCK = 4
# A small alphabet and short prompts, so that prefixes are shared often.
prompts = st.binary(max_size=40).map(lambda data: bytes(byte % 2 for byte in data))
operations = st.lists(st.tuples(st.sampled_from(["p0", "p1"]), prompts), max_size=30)


def shared_blocks(a: bytes, b: bytes) -> int:
    count = 0
    while (count + 1) * BLOCK <= min(len(a), len(b)) and a[: (count + 1) * BLOCK] == b[: (count + 1) * BLOCK]:
        count += 1
    return count


@given(prompts, prompts)
def test_chains_share_as_many_hashes_as_their_prompts_share_blocks(a, b):
    left, right = chain_hashes(a, block_bytes=BLOCK), chain_hashes(b, block_bytes=BLOCK)
    assert len(left) == len(a) // BLOCK
    same = 0
    while same < min(len(left), len(right)) and left[same] == right[same]:
        same += 1
    assert same == shared_blocks(a, b)


@given(operations, prompts)
def test_unbounded_it_equals_a_search_through_everything_sent(sent, prompt):
    index = PrefixIndex(capacity_blocks=10_000)
    for worker, data in sent:
        index.insert(worker, chain_hashes(data, block_bytes=BLOCK))
    for worker in ("p0", "p1", "never"):
        expected = max((shared_blocks(prompt, data) for w, data in sent if w == worker), default=0)
        assert index.match(worker, chain_hashes(prompt, block_bytes=BLOCK)) == expected


@given(operations, st.integers(min_value=1, max_value=12), prompts)
def test_bounded_it_equals_a_list_in_order_of_use(sent, capacity, prompt):
    """The reference keeps prefixes (as bytes) in a list, least recently used first, and searches it linearly."""
    index = PrefixIndex(capacity_blocks=capacity)
    reference: list[bytes] = []
    for _, data in sent:
        index.insert("p", chain_hashes(data, block_bytes=BLOCK))
        for length in range(min(len(data) // BLOCK, capacity), 0, -1):
            prefix = data[: length * BLOCK]
            if prefix in reference:
                reference.remove(prefix)
            reference.append(prefix)
        del reference[: max(0, len(reference) - capacity)]
        assert index.block_count("p") == len(reference) <= capacity
        for held in reference:  # closed under prefixes, which is what bisection needs
            assert len(held) == BLOCK or held[:-BLOCK] in reference
    expected = 0
    while prompt[: (expected + 1) * BLOCK] in reference and (expected + 1) * BLOCK <= len(prompt):
        expected += 1
    assert index.match("p", chain_hashes(prompt, block_bytes=BLOCK)) == expected


def test_a_dropped_worker_is_forgotten_and_the_others_are_not():
    index = PrefixIndex(capacity_blocks=100)
    chain = chain_hashes(bytes(40), block_bytes=BLOCK)
    index.insert("p0", chain)
    index.insert("p1", chain[:3])
    index.drop("p0")
    assert (index.match("p0", chain), index.match("p1", chain)) == (0, 3)


def test_reading_does_not_keep_a_prefix_alive():
    index = PrefixIndex(capacity_blocks=2)
    old, new = chain_hashes(b"aaaabbbb", block_bytes=4), chain_hashes(b"ccccdddd", block_bytes=4)
    index.insert("p", old)
    assert index.match("p", old) == 2
    index.insert("p", new)
    assert index.match("p", old) == 0
