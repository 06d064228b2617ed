"""The picture of a radix tree, against a tree that splits and evicts as SGLang's does, and keeps a ledger by token."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.tree import MAX_MODULES, OTHERS, Path, TreeMirror, readable


class Info(NamedTuple):
    node_id: int
    parent_id: int
    path_start: int
    path_end: int
    num_children: int


class Node:
    def __init__(self, node_id: int, parent: Node | None, key: list[int], marks: list[tuple[str, set[str]]]) -> None:
        self.node_id, self.parent, self.key, self.marks = node_id, parent, key, marks
        self.children: dict[int, Node] = {}


class Tree:
    """SGLang's radix tree in small: a split puts a new node above the old one. Each token has its owner and readers."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self.root = Node(next(self._ids), None, [], [])
        self.nodes = {0: self.root}

    def match(self, tokens: Sequence[int]) -> tuple[Node, int]:
        """The deepest node that holds a prefix, and how much; splits where the prefix ends within one."""
        node, found = self.root, 0
        while found < len(tokens) and (child := node.children.get(tokens[found])) is not None:
            same = 0
            while same < len(child.key) and found + same < len(tokens) and child.key[same] == tokens[found + same]:
                same += 1
            node, found = self._split(child, same) if same < len(child.key) else child, found + same
            if same == 0:
                break
        return node, found

    def _split(self, node: Node, at: int) -> Node:
        upper = Node(next(self._ids), node.parent, node.key[:at], node.marks[:at])
        assert node.parent is not None
        node.parent.children[upper.key[0]] = upper
        node.parent, node.key, node.marks = upper, node.key[at:], node.marks[at:]
        upper.children[node.key[0]] = node
        self.nodes[upper.node_id] = upper
        return upper

    def run(self, tokens: Sequence[int], module: str) -> tuple[int, int]:
        """A request's whole life: (its last node, what it found)."""
        node, found = self.match(tokens)
        reader: Node | None = node
        while reader is not None:
            for _, readers in reader.marks:
                readers.add(module)
            reader = reader.parent
        if found < len(tokens):
            key = list(tokens[found:])
            child = Node(next(self._ids), node, key, [(module, set()) for _ in key])
            node.children[key[0]] = self.nodes[child.node_id] = node = child
        return node.node_id, found

    def leaves(self) -> list[Node]:
        return [node for node in self.nodes.values() if not node.children and node.parent is not None]

    def evict(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.key[0]], self.nodes[node.node_id]

    def path_to(self, node_id: int) -> Path:
        return self._path(self.nodes[node_id]) if node_id in self.nodes else ()

    def _path(self, node: Node) -> list[Info]:
        if node.parent is None:
            return []
        above = self._path(node.parent)
        start = above[-1].path_end if above else 0
        return [*above, Info(node.node_id, node.parent.node_id, start, start + len(node.key), len(node.children))]


class Both:
    """A tree and its mirror, told what a scheduler is told."""

    def __init__(self) -> None:
        self.tree = Tree()
        self.mirror = TreeMirror(self.tree.path_to, page_size=1)
        self.now_s = 0.0

    def run(self, tokens: Sequence[int], module: str) -> int:
        self.now_s += 1
        last, found = self.tree.run(tokens, module)
        self.mirror.observe(self.tree.path_to(last), tokens, module=module, found=found, now_s=self.now_s)
        return last

    def evict(self, node_id: int) -> None:
        self.tree.evict(self.tree.nodes[node_id])
        self.mirror.forget(node_id)

    def describe(self, limit: int = 500, leased: Sequence[int] = (), locked: Sequence[int] = ()) -> Described:
        return Described(readable(self.mirror.describe(limit=limit, leased=leased, locked=locked, now_s=self.now_s)))


class Described:
    def __init__(self, data: dict) -> None:  # type: ignore[type-arg]
        self.data = data
        self.nodes = {node["id"]: node for node in data["nodes"]}
        self.modules = data["modules"]

    def of(self, node_id: int) -> tuple[int, str | None, list[str]]:
        node = self.nodes[node_id]
        owner = None if node["computed_for"] is None else self.modules[node["computed_for"]]
        return node["tokens"], owner, [self.modules[index] for index in node["read_by"]]


def test_a_prefix_that_two_modules_share_is_a_node_of_its_own() -> None:
    both = Both()
    planner = both.run(range(100), "planner")
    coder = both.run([*range(60), *range(200, 240)], "coder")
    described = both.describe()
    shared = described.nodes[planner]["parent"]
    assert described.of(shared) == (60, "planner", ["coder"])
    assert described.of(planner) == (40, "planner", [])
    assert described.of(coder) == (40, "coder", [])
    assert described.nodes[coder]["parent"] == shared and described.nodes[shared]["parent"] is None
    assert both.mirror.tokens == 140


def test_who_comes_again_has_read_its_own() -> None:
    both = Both()
    node = both.run(range(10), "planner")
    assert both.describe().of(node) == (10, "planner", [])
    both.run(range(10), "planner")
    assert both.describe().of(node) == (10, "planner", ["planner"])


def test_two_that_computed_one_prefix_at_once_leave_it_to_the_first() -> None:
    both = Both()
    node = both.run(range(10), "planner")
    both.mirror.observe(both.tree.path_to(node), range(10), module="coder", found=0, now_s=2.0)
    assert both.describe().of(node) == (10, "planner", [])


def test_a_split_of_a_split_is_followed() -> None:
    both = Both()
    first = both.run(range(90), "a")
    both.run([*range(60), 1000], "b")
    both.run([*range(30), 2000], "c")
    described = both.describe()
    middle = described.nodes[first]["parent"]
    top = described.nodes[middle]["parent"]
    assert [described.of(node) for node in (top, middle, first)] == [
        (30, "a", ["b", "c"]),
        (30, "a", ["b"]),
        (30, "a", []),
    ]


def test_what_a_split_left_that_nobody_told_of_is_nobodys() -> None:
    """A request matched half of a node and never came to run; then the other half went."""
    both = Both()
    node = both.run(range(10), "planner")
    both.tree.match([*range(5), 99])
    both.evict(node)
    assert both.mirror.tokens == 0
    last = both.run(range(5), "coder")
    assert both.describe().of(last) == (5, None, ["coder"])


def test_leases_and_locks_reach_up_to_the_root() -> None:
    both = Both()
    left = both.run([*range(10), 1], "a")
    right = both.run([*range(10), 2], "b")
    nodes = both.describe(leased=[left], locked=[left, right]).nodes
    shared = nodes[left]["parent"]
    assert {n: (nodes[n]["leased"], nodes[n]["locked"]) for n in (shared, left, right)} == {
        shared: (True, True),
        left: (True, True),
        right: (False, True),
    }


def test_a_description_is_bounded_and_the_rest_is_summed_up() -> None:
    both = Both()
    system = both.run(range(5), "planner")
    sizes = {both.run([*range(5), 1000 * i, *range(i)], "coder" if i % 2 else "twin"): i + 1 for i in range(1, 21)}
    described = both.describe(limit=4)
    largest = sorted(sizes, key=sizes.__getitem__)[-3:]
    assert set(described.nodes) == {system, *largest}, "the largest, and what they hang on"
    other = described.data["other"]
    rest = [node for node in sizes if node not in largest]
    assert (other["nodes"], other["tokens"]) == (17, sum(sizes[node] for node in rest))
    assert {described.modules[owner]: tokens for owner, tokens in other["computed_for"]} == {
        "coder": sum(size for node in rest if (size := sizes[node]) % 2 == 0),
        "twin": sum(size for node in rest if (size := sizes[node]) % 2),
    }
    assert both.describe(limit=21).data["other"] == {"nodes": 0, "tokens": 0, "computed_for": []}


def test_of_a_chain_that_does_not_fit_the_beginning_is_shown() -> None:
    both = Both()
    tokens: list[int] = []
    chain = []
    for turn in range(10):
        tokens = [*tokens, *range(100 * turn, 100 * turn + 20 + turn)]
        chain.append(both.run(tokens, "planner"))
    both.run([7777], "coder")
    described = both.describe(limit=3)
    assert list(described.nodes) == chain[:3]
    assert [described.nodes[node]["parent"] for node in chain[:3]] == [None, *chain[:2]]
    assert described.data["other"]["nodes"] == 8


def test_names_are_bounded_in_number_and_length() -> None:
    both = Both()
    for number in range(200):
        both.run([number], f"{number}-" + "x" * 1000)
    described = both.describe()
    assert len(described.modules) == MAX_MODULES and described.modules[-1] == OTHERS
    assert max(map(len, described.modules)) == 128
    assert max(node["computed_for"] for node in described.data["nodes"]) == MAX_MODULES - 1


def test_an_empty_tree_is_described_and_a_flush_empties_it() -> None:
    both = Both()
    both.run(range(10), "planner")
    both.mirror.clear()
    described = both.describe()
    assert described.data["nodes"] == [] and described.data["other"]["tokens"] == 0 == both.mirror.tokens


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 2), min_size=1, max_size=8)),
        st.tuples(st.just("evict"), st.integers(0, 100)),
    ),
    max_size=40,
)


@given(STEPS)
def test_the_mirror_is_the_tree(steps: list) -> None:  # type: ignore[type-arg]
    """Every node, with the owner and the readers that the ledger has of each of its tokens."""
    both = Both()
    for what, argument in steps:
        if what != "evict":
            both.run(argument, what)
        elif leaves := both.tree.leaves():
            both.evict(leaves[argument % len(leaves)].node_id)
    described = both.describe()
    wanted = {
        node.node_id: (len(node.key), sorted({owner for owner, _ in node.marks}), sorted(node.marks[0][1]))
        for node in both.tree.nodes.values()
        if node.parent is not None
    }
    found = {
        node_id: (tokens, [owner], sorted(readers))
        for node_id in described.nodes
        for tokens, owner, readers in [described.of(node_id)]
    }
    assert found == wanted
    below = Counter({node_id: tokens for node_id, (tokens, _, _) in wanted.items()})
    for node_id, (tokens, _, _) in wanted.items():
        above = both.tree.nodes[node_id].parent
        while above is not None and above.parent is not None:
            below[above.node_id] += tokens
            above = above.parent
    assert list(both.describe(limit=1).nodes) in [[n] for n in wanted if below[n] == max(below.values())] or not wanted
    assert both.mirror.tokens == sum(len(node.key) for node in both.tree.nodes.values())
