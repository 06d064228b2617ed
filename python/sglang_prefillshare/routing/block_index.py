"""Which blocks of KV a worker's radix tree holds, as its events say, and how many of them a prompt would find. Pure.

Events name blocks by hashes of tokens, and the router has no tokenizer. So a worker tells with the answer of each
prefill leg the hash of the prompt's last block (`BLOCKS_HEADER`), and the parents that its events name lead from there
to all blocks before it. A new prompt is compared with earlier ones by bytes: as far as it is equal to one of them, so
are its blocks. Hashes depend on base and tokens alone, so one tree of prompts serves all workers of a base.

`event_streams` brings the events; `prefix_index` guesses for workers without.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sglang_prefillshare.routing.prefix_index import BYTES_PER_TOKEN

Space = tuple[str, int]
"""Base and tokens per block: within it a hash means the same everywhere."""

_MAX_AWAITED: Final = 256
_NODE_BYTES: Final = 256
"""What a prompt takes beside its bytes: many short ones are no way to fill the memory."""
_INT64: Final = range(-(2**63), 2**63)


class BoundExceededError(Exception):
    """A worker publishes more blocks than are kept of it."""


class HeldBlocks:
    """The blocks in one worker's tree, each with the block before it.

    A tree gives up leaves only, so whoever holds a block holds all before it.
    """

    def __init__(self, *, capacity: int) -> None:
        self._capacity = capacity
        self._parents: dict[int, int | None] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._parents

    def __len__(self) -> int:
        return len(self._parents)

    def parent(self, block: int) -> int | None:
        return self._parents[block]

    def store(self, parent: int | None, blocks: Sequence[int]) -> None:
        """Blocks that follow one another, the first of them `parent`; None is the tree's root. Raises
        `BoundExceededError`."""
        if len(self._parents) + len(blocks) > self._capacity:
            raise BoundExceededError(f"its tree holds over {self._capacity} blocks")
        self._parents.update(zip(blocks, itertools.chain((parent,), blocks), strict=False))

    def remove(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._parents.pop(block, None)

    def clear(self) -> None:
        self._parents.clear()


class Chain:
    """The blocks of one prompt. Those before `start` are `before`'s, or unknown without one; `blocks` are the rest."""

    __slots__ = ("before", "blocks", "start")

    def __init__(self, before: Chain | None, start: int, blocks: array[int]) -> None:
        self.before = before
        self.start = start
        self.blocks = blocks

    def __len__(self) -> int:
        return self.start + len(self.blocks)

    def __getitem__(self, index: int) -> int | None:
        """The block's hash; None for one that is not known."""
        chain: Chain | None = self
        while chain is not None and index < chain.start:
            chain = chain.before
        return None if chain is None else chain.blocks[index - chain.start]

    def head(self, count: int) -> Chain | None:
        """The first `count` blocks; None where there is none, or where they are unknown. They are a chain of their own
        from then on, which this one goes on from: who keeps them keeps nothing else of it."""
        chain: Chain | None = self
        while chain is not None and count <= chain.start:
            chain = chain.before
        if chain is None or count >= len(chain):
            return chain
        kept = count - chain.start
        found = Chain(chain.before, chain.start, chain.blocks[:kept])
        chain.before, chain.start, chain.blocks = found, count, chain.blocks[kept:]
        return found

    def held_count(self, held: HeldBlocks, limit: int) -> int:
        """How many of the first `limit` blocks are held."""
        end = min(limit, len(self))
        chain: Chain | None = self
        while chain is not None:
            start, blocks = chain.start, chain.blocks
            if end > start:
                if blocks[end - start - 1] in held:
                    return end
                if blocks[0] in held:
                    hi = end - start - 1
                    return start + bisect_left(blocks, True, lo=1, hi=hi, key=lambda block: block not in held)
                end = start
            elif chain.before is None and blocks and blocks[0] in held:
                return end
            chain = chain.before
        return 0


def chain_to(end: int, count: int, held: HeldBlocks, like: Chain | None) -> Chain | None:
    """The chain of `count` blocks that ends with `end`, which must be held, by the parents that the worker named. What
    it has in common with `like` is shared with it. None where they contradict `count`."""
    found: list[int] = []
    current: int | None = end
    index = count - 1
    while index >= 0:
        if current is None:
            return None
        if like is not None and index < len(like) and like[index] == current:
            head = like.head(index + 1)
            return Chain(head, index + 1, array("q", reversed(found))) if found else head
        if current not in held:  # stored before the router listened
            return Chain(None, index + 1, array("q", reversed(found)))
        if len(found) == len(held):  # a circle
            return None
        found.append(current)
        current = held.parent(current)
        index -= 1
    return Chain(None, 0, array("q", reversed(found))) if current is None else None


@dataclass(slots=True, eq=False)
class _Node:
    """A prompt, or what several have in common: `edge` are its bytes after its parent's, `end` where they end.

    `tokens` is how many tokens the bytes are (a fraction, in proportion, where no prompt ended), `chain` the blocks of
    a prompt that begins with them.
    """

    parent: _Node | None
    edge: bytes
    end: int
    tokens: float
    chain: Chain | None
    children: dict[int, _Node]

    def tokens_at(self, offset: int) -> float:
        """Of the bytes up to `offset` in the edge."""
        before = 0.0 if self.parent is None else self.parent.tokens
        return max(before, before + offset * (self.tokens - before) / len(self.edge))


@dataclass(frozen=True, slots=True)
class _Likeness:
    """A prompt's blocks, as far as they are known: the first `limit` ones of any of `chains`."""

    chains: tuple[Chain, ...]
    limit: int


_UNLIKE: Final = _Likeness((), 0)


class PromptTree:
    """Earlier prompts of a space by their bytes, least recently used forgotten first: `capacity_bytes` of them, each
    with `_NODE_BYTES` more. Their blocks take up to 8 bytes for each token beside that."""

    def __init__(self, *, block_tokens: int, capacity_bytes: int) -> None:
        self._block_tokens = block_tokens
        self._capacity_bytes = capacity_bytes
        self._bytes = 0
        self._root = _Node(None, b"", 0, 0.0, None, {})
        self._leaves: OrderedDict[int, _Node] = OrderedDict()
        self._last: tuple[bytes, _Likeness] | None = None

    @property
    def byte_count(self) -> int:
        return self._bytes

    def likeness(self, prompt: bytes) -> _Likeness:
        """What is known of a prompt's blocks, by the one that it has the longest beginning in common with."""
        if self._last is not None and self._last[0] is prompt:
            return self._last[1]
        found = self._likeness(prompt)
        self._last = prompt, found
        return found

    def _likeness(self, prompt: bytes) -> _Likeness:
        node, child, common = self._descend(prompt)
        known = node.end + common
        if known == 0:
            return _UNLIKE
        if child is not None:
            tokens, candidates = child.tokens_at(common), [child.chain]
        else:
            # Whatever goes on from here has the block that the node's last token completes.
            longer = next(iter(node.children.values()), node)
            tokens, candidates = node.tokens, [longer.chain, node.chain]
        rest = len(prompt) - known
        whole = tokens + (max(1, rest / BYTES_PER_TOKEN) if rest else 0)
        # Of x1..x(n-1), SGLang computes the last one in any case.
        limit = int(min(tokens, whole - 2) + 1e-6) // self._block_tokens
        return _Likeness(tuple(chain for chain in candidates if chain is not None), max(0, limit))

    def nearest(self, prompt: bytes) -> Chain | None:
        """The chain of an earlier prompt that has the longest beginning in common with this one."""
        found = self._likeness(prompt)
        return found.chains[0] if found.chains else None

    def learn(self, prompt: bytes, tokens: int, chain: Chain) -> None:
        """A prompt of `tokens` tokens has these blocks."""
        if not prompt or len(prompt) + _NODE_BYTES > self._capacity_bytes:
            return
        self._last = None
        node, child, common = self._descend(prompt)
        if child is not None:
            node = self._split(child, common)
        if node.end < len(prompt):
            leaf = _Node(node, prompt[node.end :], len(prompt), tokens, chain, {})
            node.children[leaf.edge[0]] = leaf
            self._bytes += len(leaf.edge) + _NODE_BYTES
            self._leaves.pop(id(node), None)
            node = leaf
        node.tokens = tokens
        _exchange(node.chain, chain, node)
        if not node.children:
            self._leaves[id(node)] = node
            self._leaves.move_to_end(id(node))
        while self._bytes > self._capacity_bytes:
            self._forget_oldest()

    def _descend(self, prompt: bytes) -> tuple[_Node, _Node | None, int]:
        """The last node whose bytes the prompt begins with, and the child into whose edge it goes on, so many bytes."""
        node = self._root
        while node.end < len(prompt):
            child = node.children.get(prompt[node.end])
            if child is None:
                break
            if not prompt.startswith(child.edge, node.end):
                return node, child, _common_bytes(child.edge, prompt, node.end)
            node = child
        return node, None, 0

    def _split(self, child: _Node, offset: int) -> _Node:
        """Make a node of the first `offset` bytes of the child's edge."""
        parent = child.parent
        assert parent is not None
        middle = _Node(
            parent, child.edge[:offset], parent.end + offset, child.tokens_at(offset), child.chain, {}
        )  # fmt: skip
        parent.children[middle.edge[0]] = middle
        child.parent, child.edge = middle, child.edge[offset:]
        middle.children[child.edge[0]] = child
        self._bytes += _NODE_BYTES
        return middle

    def _forget_oldest(self) -> None:
        _, leaf = self._leaves.popitem(last=False)
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.edge[0]]
        leaf.parent = None
        self._bytes -= len(leaf.edge) + _NODE_BYTES
        other = next(iter(parent.children.values()), None)
        kept = (
            other.chain
            if other is not None
            else leaf.chain and leaf.chain.head(int(parent.tokens) // self._block_tokens)
        )
        _exchange(leaf.chain, kept, parent)
        if not parent.children and parent is not self._root:  # as old as what went on from it
            self._leaves[id(parent)] = parent
            self._leaves.move_to_end(id(parent), last=False)


def _exchange(chain: Chain | None, other: Chain | None, node: _Node | None) -> None:
    """From `node` upwards, where `chain` is the example of what goes on from there."""
    while node is not None and node.chain is chain:
        node.chain = other
        node = node.parent


def _common_bytes(edge: bytes, prompt: bytes, start: int) -> int:
    """How many leading bytes `edge` has in common with what follows `start` in `prompt`."""
    # [0, low) equal, [high, …) not
    low, high = 0, min(len(edge), len(prompt) - start)
    while low < high:
        middle = (low + high + 1) // 2
        if edge[low:middle] == prompt[start + low : start + middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker said of a prompt that it has computed: its tokens, and its last complete block."""

    tokens: int
    block: int


def parse_told(text: str) -> list[Told | None]:
    """`BLOCKS_HEADER`: an item for each prompt, None where no block is named. Raises `ValueError`."""
    found: list[Told | None] = []
    for item in text.split(","):
        tokens, colon, block = item.partition(":")
        if not colon or not (tokens.isascii() and tokens.isdigit()) or len(item) > 40:
            raise ValueError(f"{item[:60]!r} is not TOKENS:HASH")
        if block and int(block) not in _INT64:
            raise ValueError(f"{block!r} is no hash of 64 bits")
        found.append(Told(int(tokens), int(block)) if block else None)
    return found


@dataclass(slots=True)
class _Awaited:
    """A prompt whose last block the worker named before its event came."""

    prompt: bytes
    told: Told
    since_s: float


class Follow:
    """One worker as the index knows it. `is_current` says that its blocks are those in its tree: they count."""

    def __init__(self, space: Space, prompts: PromptTree, held: HeldBlocks) -> None:
        self.space = space
        self.held = held
        self.is_current = False
        self.is_lost = False
        """It was forgotten since it was last brought up to date: whoever follows it begins anew."""
        self.problem: str | None = "its events have not come yet"
        self._prompts = prompts
        self._awaited: deque[_Awaited] = deque(maxlen=_MAX_AWAITED)

    def expected_tokens(self, prompts: Sequence[bytes]) -> int:
        """How many tokens of the prompts the worker's tree would be found to hold."""
        return sum(map(self._expected_blocks, prompts)) * self.space[1]

    def _expected_blocks(self, prompt: bytes) -> int:
        known = self._prompts.likeness(prompt)
        return max((chain.held_count(self.held, known.limit) for chain in known.chains), default=0)

    def computed(self, prompts: Sequence[bytes], told: Sequence[Told | None], *, now_s: float) -> None:
        """The worker has computed these prompts."""
        if len(prompts) != len(told):
            return
        for prompt, each in zip(prompts, told, strict=True):
            if each is not None and not self._learn(prompt, each):
                self._awaited.append(_Awaited(prompt, each, now_s))

    def settle(self) -> None:
        """After events: the blocks that were named before may have come."""
        for _ in range(len(self._awaited)):
            waiting = self._awaited.popleft()
            if not self._learn(waiting.prompt, waiting.told):
                self._awaited.append(waiting)

    def oldest_awaited_s(self) -> float | None:
        """Since when a block that was named does not come."""
        return self._awaited[0].since_s if self._awaited else None

    def up_to_date(self) -> None:
        """All that the worker has published is known."""
        self.settle()
        self._awaited.clear()  # what did not come was given up before it could be seen
        self.is_current, self.problem = True, None

    def fell_behind(self, problem: str) -> None:
        self.is_current, self.problem = False, problem

    def forget(self) -> None:
        """The worker lost its cache, or may have."""
        self.held.clear()
        self._awaited.clear()
        self.is_lost = True
        self.fell_behind("it was lost, and its events have not come again yet")

    def _learn(self, prompt: bytes, told: Told) -> bool:
        if told.block not in self.held:
            return False
        count = told.tokens // self.space[1]
        chain = chain_to(told.block, count, self.held, self._prompts.nearest(prompt))
        if chain is not None:
            self._prompts.learn(prompt, told.tokens + 1, chain)  # the base had to hold x1..x(n-1)
        return True


class BlockIndex:
    """The workers that are followed, and the prompts of their bases.

    `capacity_bytes` bounds the prompts that are kept of a base, `capacity_blocks` the blocks of a worker.
    """

    def __init__(self, *, capacity_bytes: int, capacity_blocks: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._capacity_blocks = capacity_blocks
        self._prompts: dict[Space, PromptTree] = {}
        self._follows: dict[str, Follow] = {}

    def follow(self, worker: str, space: Space) -> Follow:
        """Begin to know a worker, from nothing."""
        prompts = self._prompts.get(space)
        if prompts is None:
            prompts = self._prompts[space] = PromptTree(block_tokens=space[1], capacity_bytes=self._capacity_bytes)
        found = self._follows[worker] = Follow(space, prompts, HeldBlocks(capacity=self._capacity_blocks))
        return found

    def known(self, worker: str) -> Follow | None:
        """A worker that is followed, whether or not its blocks count now."""
        return self._follows.get(worker)

    def current(self, worker: str) -> Follow | None:
        """A worker whose blocks count."""
        found = self._follows.get(worker)
        return found if found is not None and found.is_current else None

    def drop(self, worker: str) -> None:
        """A worker may have lost its cache."""
        if (found := self._follows.get(worker)) is not None:
            found.forget()

    def flushed(self, worker: str) -> None:
        """A worker said that its tree is empty, a moment before its events do."""
        if (found := self._follows.get(worker)) is not None:
            found.held.clear()

    def leave(self, worker: str) -> None:
        """A worker is followed no more."""
        self._follows.pop(worker, None)
        spaces: Collection[Space] = {follow.space for follow in self._follows.values()}
        self._prompts = {space: tree for space, tree in self._prompts.items() if space in spaces}
