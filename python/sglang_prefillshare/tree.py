"""A worker's radix tree as others may see it: which spans of base KV there are, for whom, and who read them since.

`TreeMirror` follows SGLang's tree from the paths of the requests that pass through it, so that describing the tree
costs no walk through it, and nothing per token. A description has sizes and module names, and no token of a prompt.
Plain values: neither SGLang nor torch.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

DESCRIPTION_VERSION: Final = 1

DEFAULT_LIMIT: Final = 500
MAX_LIMIT: Final = 5000
"""Nodes of a description: what is asked for where nothing is said, and what may be."""

MAX_MODULES: Final = 63
"""What a description tells apart: the modules that came first, and the rest together, as `OTHERS`."""

OTHERS: Final = "(others)"
_MAX_NAME: Final = 128


class PathNode(Protocol):
    """A node on the way from the root, as SGLang's `collect_path_info` has it. Offsets are in tokens from the root."""

    @property
    def node_id(self) -> int: ...
    @property
    def parent_id(self) -> int: ...
    @property
    def path_start(self) -> int: ...
    @property
    def path_end(self) -> int: ...
    @property
    def num_children(self) -> int: ...


Path = Sequence[PathNode]


@dataclass(slots=True)
class _Node:
    parent: int
    start: int
    end: int
    key: int | None
    """Stands for its first tokens, which no sibling begins with; None where they are not known."""
    owner: int | None
    """Index of the module that it was first computed for; None where that was before we looked."""
    readers: int
    """A bit for each module that has found it since."""
    touched_s: float
    weight: int = 0
    """Tokens in it and in all below it."""

    @property
    def tokens(self) -> int:
        return self.end - self.start


class TreeMirror:
    """The nodes of one tree, by SGLang's ids, which are never used twice.

    SGLang splits a node by putting a new one above it, and tells nobody. The mirror learns of it when a path passes
    through: the new one is then what the old one was, which begins with the same page of tokens. `path_to` asks SGLang
    for the path to a node; it is empty where there is none any more.
    """

    def __init__(self, path_to: Callable[[int], Path], *, page_size: int) -> None:
        self._path_to = path_to
        self._page_size = page_size
        self._modules: dict[str | None, int] = {}
        self._names: list[str | None] = []
        self._nodes: dict[int, _Node] = {}
        self._children: dict[int, set[int]] = {}
        self._by_key: dict[tuple[int, int], int] = {}
        self._unkeyed: dict[int, set[int]] = {}
        self._owned: Counter[int | None] = Counter()

    @property
    def tokens(self) -> int:
        """In all nodes that the mirror knows of."""
        return self._owned.total()

    def __len__(self) -> int:
        return len(self._nodes)

    def observe(self, path: Path, tokens: Sequence[int], *, module: str | None, found: int, now_s: float) -> None:
        """A request of `module` has put `path` into the tree, which spells `tokens`, and found the first `found` there.

        Of the tokens a hash of each node's first page is kept.
        """
        index = self._index(module)
        for info in path:
            key = hash(tuple(tokens[info.path_start : info.path_start + self._page_size]))
            if info.node_id not in self._nodes and not (info.num_children and self._learn_of_split(info, key)):
                owner = None if info.path_start < found else index
                self._nodes[info.node_id] = _Node(-1, info.path_start, info.path_start, None, owner, 0, now_s)
            self._place(info, key)
            node = self._nodes[info.node_id]
            node.touched_s = now_s
            if info.path_start < found:
                node.readers |= 1 << index

    def forget(self, node_id: int) -> None:
        """SGLang evicts this leaf."""
        node = self._nodes.pop(node_id, None)
        if node is None:
            return
        self._owned[node.owner] -= node.tokens
        self._unlink(node_id, node)

    def clear(self) -> None:
        """SGLang's tree is empty."""
        for kept in (self._nodes, self._children, self._by_key, self._unkeyed, self._owned):
            kept.clear()

    def describe(self, *, limit: int, leased: Iterable[int], locked: Iterable[int], now_s: float) -> dict[str, Any]:
        """At most `limit` nodes, those with the most tokens at and below them, and the rest summed up; see `readable`.

        `leased` and `locked` are ids of nodes that are on loan to a decode worker, or that a request holds, which then
        hold their ancestors, too.
        """
        on_loan, held = self._with_ancestors(leased), self._with_ancestors(locked)
        shown = self._heaviest(limit)
        rest = self._owned.copy()
        rows = []
        for node_id, node in shown.items():
            flags = (node_id in on_loan) + 2 * (node_id in held)
            parent = node.parent if node.parent in self._nodes else -1
            owner = -1 if node.owner is None else node.owner
            rows.append((node_id, parent, node.tokens, owner, node.readers, flags, round(now_s - node.touched_s, 1)))
            rest[node.owner] -= node.tokens
        return {
            "modules": self._names[:],
            "rows": rows,
            "other_nodes": len(self._nodes) - len(shown),
            "other_tokens": [(-1 if owner is None else owner, tokens) for owner, tokens in rest.items() if tokens],
        }

    # -- following SGLang's tree

    def _index(self, module: str | None) -> int:
        name = module[:_MAX_NAME] if module else None
        found = self._modules.get(name)
        if found is None:
            if len(self._names) >= MAX_MODULES - 1:
                name = OTHERS
            found = self._modules.get(name, len(self._names))
            if found == len(self._names):
                self._modules[name] = found
                self._names.append(name)
        return found

    def _place(self, info: PathNode, key: int | None) -> None:
        """Put a node where SGLang has it now: it is new, or a split has made it shorter and moved it down."""
        node = self._nodes[info.node_id]
        if node.parent != info.parent_id or node.key != key:
            self._unlink(info.node_id, node)
            node.parent, node.key = info.parent_id, key
            self._children.setdefault(node.parent, set()).add(info.node_id)
            if key is None:
                self._unkeyed.setdefault(node.parent, set()).add(info.node_id)
            else:
                self._by_key[node.parent, key] = info.node_id
            self._lift(node.parent, node.weight)
        more = info.path_end - info.path_start - node.tokens
        node.start, node.end = info.path_start, info.path_end
        if more:
            self._owned[node.owner] += more
            self._lift(info.node_id, more)

    def _lift(self, node_id: int, tokens: int) -> None:
        """A node and all above it have so many more below their beginning."""
        while (node := self._nodes.get(node_id)) is not None:
            node.weight += tokens
            node_id = node.parent

    def _learn_of_split(self, upper: PathNode, key: int) -> bool:
        """Give an unknown node what the one has that it was split from, if the mirror has that one in its place."""
        keyed = self._by_key.get((upper.parent_id, key))
        for node_id in (*(() if keyed is None else (keyed,)), *self._unkeyed.get(upper.parent_id, ())):
            was = self._nodes[node_id]
            if was.start != upper.path_start or was.end <= upper.path_end:
                continue
            path = self._path_to(node_id)
            if any(info.node_id == upper.node_id for info in path):
                for info in path:
                    if info.node_id not in self._nodes:
                        start = info.path_start
                        self._nodes[info.node_id] = _Node(-1, start, start, None, was.owner, was.readers, was.touched_s)
                    elif info.parent_id == self._nodes[info.node_id].parent:
                        continue
                    self._place(info, None)
                return True
        return False

    def _unlink(self, node_id: int, node: _Node) -> None:
        self._lift(node.parent, -node.weight)
        for index in (self._children, self._unkeyed):
            if (siblings := index.get(node.parent)) is not None:
                siblings.discard(node_id)
                if not siblings:
                    del index[node.parent]
        if node.key is not None and self._by_key.get((node.parent, node.key)) == node_id:
            del self._by_key[node.parent, node.key]

    # -- describing it

    def _with_ancestors(self, node_ids: Iterable[int]) -> set[int]:
        found: set[int] = set()
        for node_id in node_ids:
            while node_id not in found and (node := self._nodes.get(node_id)) is not None:
                found.add(node_id)
                node_id = node.parent
        return found

    def _heaviest(self, limit: int) -> Mapping[int, _Node]:
        """From the root on, what carries the most tokens first, itself and below it: always a tree."""
        if len(self._nodes) <= limit:
            return self._nodes
        tops = (child for parent, group in self._children.items() if parent not in self._nodes for child in group)
        frontier = [(-self._nodes[node_id].weight, node_id) for node_id in tops]
        heapq.heapify(frontier)
        shown: dict[int, _Node] = {}
        while frontier and len(shown) < limit:
            _, node_id = heapq.heappop(frontier)
            shown[node_id] = self._nodes[node_id]
            for child in self._children.get(node_id, ()):
                heapq.heappush(frontier, (-self._nodes[child].weight, child))
        return shown


def readable(described: Mapping[str, Any]) -> dict[str, Any]:
    """What `TreeMirror.describe` returned, as JSON has it: `computed_for` and `read_by` are indexes into `modules`."""
    return {
        "version": DESCRIPTION_VERSION,
        "modules": described["modules"],
        "nodes": [
            {
                "id": node_id,
                "parent": None if parent < 0 else parent,
                "tokens": tokens,
                "computed_for": None if owner < 0 else owner,
                "read_by": _bits(readers),
                "leased": bool(flags & 1),
                "locked": bool(flags & 2),
                "idle_s": idle_s,
            }
            for node_id, parent, tokens, owner, readers, flags, idle_s in described["rows"]
        ],
        "other": {
            "nodes": described["other_nodes"],
            "tokens": sum(tokens for _, tokens in described["other_tokens"]),
            "computed_for": [[None if owner < 0 else owner, tokens] for owner, tokens in described["other_tokens"]],
        },
    }


def _bits(mask: int) -> list[int]:
    return [place for place in range(mask.bit_length()) if mask >> place & 1]
