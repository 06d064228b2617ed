"""The block index against a plain model: trees of token ids, searched token by token."""

from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglang_prefillshare.routing.block_index import (
    _NODE_BYTES,
    BlockIndex,
    BoundExceededError,
    Chain,
    Follow,
    HeldBlocks,
    PromptTree,
    Told,
    chain_to,
    parse_told,
)

WORKERS = ("http://p0", "http://p1")


def ids_bytes(ids: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def block_hash(ids: tuple[int, ...]) -> int:
    """Of a block, by all tokens up to its end."""
    return hash(ids)


class PlainTree:
    """A worker's radix tree: the prefixes that it holds, each a whole number of blocks."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.prefixes: set[tuple[int, ...]] = set()

    def insert(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """What precedes the blocks that are new, and these."""
        whole = len(ids) // self.page * self.page
        new = [ids[:end] for end in range(self.page, whole + 1, self.page) if ids[:end] not in self.prefixes]
        self.prefixes.update(new)
        return (new[0][: -self.page] if new else ()), new

    def leaves(self) -> list[tuple[int, ...]]:
        return sorted(p for p in self.prefixes if not any(q[: len(p)] == p and q != p for q in self.prefixes))

    def found(self, prompt: tuple[int, ...]) -> int:
        """What SGLang finds of x1..x(n-1), of which it computes the last in any case."""
        count = 0
        for end in range(self.page, len(prompt) - 1, self.page):
            if prompt[:end] in self.prefixes:
                count = end
        return count


# Few tokens, so that prompts branch often.
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple)


class Index(RuleBasedStateMachine):
    """Workers compute, evict, are flushed and restart; prompts are given whole, as their ids' bytes."""

    @initialize(page=st.sampled_from([1, 2, 3]))
    def begin(self, page: int) -> None:
        self.page = page
        self.index = BlockIndex(capacity_bytes=1_000_000, capacity_blocks=10_000)
        self.trees = {url: PlainTree(page) for url in WORKERS}
        self.follows: dict[str, Follow] = {}
        self.asked: set[tuple[int, ...]] = set()
        for url in WORKERS:
            self.follows[url] = self.index.follow(url, ("base", page))
            self.follows[url].up_to_date()

    @rule(url=st.sampled_from(WORKERS), prompt=prompts, is_told_first=st.booleans())
    def compute(self, url: str, prompt: tuple[int, ...], is_told_first: bool) -> None:
        follow, base_ids = self.follows[url], prompt[:-1]
        parent, new = self.trees[url].insert(base_ids)
        whole = base_ids[: len(base_ids) // self.page * self.page]
        told = [Told(len(base_ids), block_hash(whole)) if whole else None]
        if is_told_first:
            follow.computed([ids_bytes(prompt)], told, now_s=0.0)
        if new:
            follow.held.store(block_hash(parent) if parent else None, [block_hash(ids) for ids in new])
        if is_told_first:
            follow.settle()
        else:
            follow.computed([ids_bytes(prompt)], told, now_s=0.0)
        self.asked.add(prompt)

    @rule(url=st.sampled_from(WORKERS), place=st.integers(0, 20))
    def evict(self, url: str, place: int) -> None:
        if leaves := self.trees[url].leaves():
            leaf = leaves[place % len(leaves)]
            self.trees[url].prefixes.remove(leaf)
            self.follows[url].held.remove([block_hash(leaf)])

    @rule(url=st.sampled_from(WORKERS))
    def restart(self, url: str) -> None:
        self.trees[url] = PlainTree(self.page)
        self.index.drop(url)
        assert self.index.current(url) is None and self.follows[url].is_lost
        self.follows[url].up_to_date()

    @rule(prompt=prompts)
    def ask_anything(self, prompt: tuple[int, ...]) -> None:
        self.expect(prompt)

    @rule(more=prompts, place=st.integers(0, 50))
    def extend_or_cut(self, more: tuple[int, ...], place: int) -> None:
        if self.asked:
            known = sorted(self.asked)[place % len(self.asked)]
            self.expect(known + more)
            self.expect(known[: 1 + place % len(known)])

    @invariant()
    def all_that_was_asked_is_predicted(self) -> None:
        for prompt in getattr(self, "asked", ()):
            self.expect(prompt)

    def expect(self, prompt: tuple[int, ...]) -> None:
        for url, tree in self.trees.items():
            assert self.follows[url].expected_tokens([ids_bytes(prompt)]) == tree.found(prompt), (url, prompt)


Index.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestIndex = Index.TestCase


def chained(index: BlockIndex, prompt: bytes, tokens: int, *, url: str = "http://p0") -> Follow:
    """A worker that has computed a prompt of as many base tokens, a block each."""
    follow = index.follow(url, ("base", 1))
    follow.held.store(None, range(1, tokens + 1))
    follow.computed([prompt], [Told(tokens, tokens)], now_s=0.0)
    follow.up_to_date()
    return follow


def test_of_a_text_that_goes_on_elsewhere_tokens_count_in_proportion():
    index = BlockIndex(capacity_bytes=2000, capacity_blocks=1000)
    follow = chained(index, b"x" * 100, 19)  # 20 tokens of five bytes
    assert follow.expected_tokens([b"x" * 50 + b"y" * 50]) == 10
    assert follow.expected_tokens([b"x" * 100 + b"y" * 50]) == 19
    assert follow.expected_tokens([b"y" * 50]) == 0
    assert follow.expected_tokens([b"x" * 50 + b"y" * 50, b"x" * 100 + b"z"]) == 29


def test_a_part_of_a_prompt_whose_first_blocks_were_stored_before_anybody_listened():
    """Who holds a block holds all before it, whether or not their hashes are known."""
    index = BlockIndex(capacity_bytes=2000, capacity_blocks=1000)
    follow = index.follow("http://p0", ("base", 1))
    follow.held.store(10, range(11, 21))  # the events of 1 to 10 were missed
    follow.computed([ids_bytes(tuple(range(21)))], [Told(20, 20)], now_s=0.0)
    follow.up_to_date()
    assert follow.expected_tokens([ids_bytes((*range(21), 5, 6))]) == 20
    assert follow.expected_tokens([ids_bytes((*range(7), 50, 60))]) == 7
    follow.held.remove(range(11, 21))
    assert follow.expected_tokens([ids_bytes((*range(21), 5, 6))]) == 0


def test_parents_that_contradict_what_was_told_teach_nothing():
    for tokens in (3, 9):  # the chain of block 5 has five blocks
        index = BlockIndex(capacity_bytes=2000, capacity_blocks=1000)
        follow = index.follow("http://p0", ("base", 1))
        follow.held.store(None, range(1, 6))
        follow.computed([bytes(40)], [Told(tokens, 5)], now_s=0.0)
        follow.up_to_date()
        assert follow.expected_tokens([bytes(48)]) == 0
    loop = BlockIndex(capacity_bytes=2000, capacity_blocks=1000).follow("http://p0", ("base", 1))
    loop.held.store(2, [1, 2])  # each the other's parent
    loop.computed([bytes(400)], [Told(10**30, 2)], now_s=0.0)


def test_prompts_are_forgotten_by_use_and_their_common_beginnings_last():
    index = BlockIndex(capacity_bytes=100 + 4 * _NODE_BYTES, capacity_blocks=100)
    follow = index.follow("http://p0", ("base", 1))
    follow.held.store(None, range(1, 11))
    common = b"x" * 40
    for tail in (b"a", b"b", b"c", b"a"):  # 100 bytes in four nodes: 40 in common, 20 of their own
        follow.computed([common + tail * 20], [Told(10, 10)], now_s=0.0)
    follow.computed([b"y" * 10], [Told(10, 10)], now_s=0.0)  # over the bound
    follow.up_to_date()
    known = {tail: follow.expected_tokens([common + tail * 20 + b"!!!!!!!!"]) for tail in (b"a", b"b", b"c")}
    assert known[b"a"] == known[b"c"] == 10 > known[b"b"] > 0, "what it had in common with the others is known"


def test_bounds_hold():
    held = HeldBlocks(capacity=10)
    with pytest.raises(BoundExceededError):
        held.store(None, range(11))
    tree = PromptTree(block_tokens=1, capacity_bytes=5 * _NODE_BYTES)
    chain = Chain(None, 0, array("q", [1]))
    for seed in range(200):
        tree.learn(bytes((seed * 7 + i) % 251 for i in range(seed)), 5, chain)
        assert tree.byte_count <= 5 * _NODE_BYTES
    tree.learn(bytes(4 * _NODE_BYTES + 1), 5, chain)
    assert 0 < tree.byte_count <= 5 * _NODE_BYTES


def kept_blocks(tree: PromptTree) -> int:
    """Of all that the tree's nodes lead to."""
    nodes, chains = [tree._root], {}
    while nodes:
        node = nodes.pop()
        nodes += node.children.values()
        chain = node.chain
        while chain is not None and id(chain) not in chains:
            chains[id(chain)] = chain
            chain = chain.before
    return sum(len(chain.blocks) for chain in chains.values())


def test_of_a_prompt_that_was_forgotten_only_the_blocks_stay_that_others_have():
    """A long one, then a short one that begins like it, again and again: the short ones do not keep the long ones."""
    tree = PromptTree(block_tokens=1, capacity_bytes=20 * (2 * _NODE_BYTES + 100))
    held = HeldBlocks(capacity=1_000_000)
    for number in range(60):
        head = struct.pack("<I", number) * 10
        first, long, short = (number + 1) * 10_000, 5000, 12
        held.store(None, range(first, first + long))
        held.store(first + 9, range(first + long, first + long + 2))
        for prompt, count, last in (
            (head + b"l" * (long - 10), long, first + long - 1),
            (head + b"s" * 8, short, first + long + 1),
        ):
            chain = chain_to(last, count, held, tree.nearest(prompt))
            assert chain is not None and [chain[place] for place in (0, 9, count - 1)] == [first, first + 9, last]
            tree.learn(prompt, count + 1, chain)
        assert kept_blocks(tree) <= 3 * long
    assert kept_blocks(tree) > 100


@pytest.mark.parametrize("text", ["", "5", "x:5", "5:x", "-1:5", "5:5:5", f"5:{2**63}", "5:5,", "5:" + "9" * 5000])
def test_a_header_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError):
        parse_told(text)


def test_a_header_names_a_block_for_each_prompt_that_has_one():
    assert parse_told("31:-5,0:,7:9") == [Told(31, -5), None, Told(7, 9)]
