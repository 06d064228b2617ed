"""What a worker answers when it is asked for its radix tree, checked: it is shown to people."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from sglang_prefillshare.errors import WorkerError
from sglang_prefillshare.tree import DESCRIPTION_VERSION, MAX_LIMIT, MAX_MODULES

MAX_BODY_BYTES: Final = 4 * 1024 * 1024

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
"""What JavaScript can count."""


class _Node(msgspec.Struct, frozen=True):
    id: _Count
    parent: _Count | None
    tokens: _Count
    computed_for: _Count | None
    read_by: Annotated[list[_Count], msgspec.Meta(max_length=MAX_MODULES)]
    leased: bool
    locked: bool
    idle_s: float


class _Other(msgspec.Struct, frozen=True):
    nodes: _Count
    tokens: _Count
    computed_for: Annotated[list[tuple[_Count | None, _Count]], msgspec.Meta(max_length=MAX_MODULES + 1)]


class Tree(msgspec.Struct, frozen=True):
    """As in `sglang_prefillshare.tree`; a struct, since reading and writing it takes time from requests."""

    version: int
    modules: Annotated[list[Annotated[str, msgspec.Meta(max_length=512)] | None], msgspec.Meta(max_length=MAX_MODULES)]
    nodes: Annotated[list[_Node], msgspec.Meta(max_length=MAX_LIMIT)]
    other: _Other
    pool_tokens: _Count
    free_tokens: _Count
    tree_tokens: _Count
    evictable_tokens: _Count
    unseen_tokens: _Count
    page_size: _Count
    cost_ms: float
    failure: str | None


_DECODER: Final = msgspec.json.Decoder(Tree)


def parse_tree(body: bytes, *, source: str) -> Tree:
    """The answer, without what is not known here. Raises `WorkerError`, which names `source`."""
    try:
        tree = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkerError(f"{source} describes its radix tree in a way that cannot be read: {error}.") from error
    if tree.version != DESCRIPTION_VERSION:
        raise WorkerError(
            f"{source} describes its radix tree in version {tree.version}, and this router reads "
            f"{DESCRIPTION_VERSION}. Run the same sglang-prefillshare version on workers and router."
        )
    named = [node.computed_for for node in tree.nodes if node.computed_for is not None]
    named += [index for node in tree.nodes for index in node.read_by]
    named += [index for index, _ in tree.other.computed_for if index is not None]
    if named and max(named) >= len(tree.modules):
        raise WorkerError(f"{source} describes its radix tree with a module {max(named)} of {len(tree.modules)}.")
    return tree
