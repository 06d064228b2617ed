"""For which decode module each KV slot was computed: the count of tokens reused across models, exact by construction.

One integer per slot of the KV pool. A slot is stamped when a prefill is about to compute it; when a later request finds
slots in the radix tree, those with another module's stamp are its cross-model tokens. Nothing is estimated: the slot
that attention reads is the slot that was stamped, also when two requests computed one prefix at once and the tree kept
one copy.
"""

from __future__ import annotations

from typing import Any

import torch


class Provenance:
    """Stamps of one KV pool; int32, 4 bytes per token slot, in host memory."""

    def __init__(self, pool: Any) -> None:
        self._stamps = torch.zeros(pool.size + pool.page_size, dtype=torch.int32)
        self._ids: dict[str, int] = {}

    def module_id(self, module: str | None) -> int:
        """A small integer for a decode module's name; requests without a name share one."""
        return self._ids.setdefault(module or "", len(self._ids) + 1)

    def record(self, slots: torch.Tensor, module: int) -> None:
        self._stamps[slots.to("cpu", torch.int64)] = module

    def count_foreign(self, slots: torch.Tensor, module: int) -> int:
        """How many of `slots` (indices into the pool) were computed for a module other than `module`."""
        stamps = self._stamps[slots.to("cpu", torch.int64)]
        return int(((stamps != module) & (stamps != 0)).sum())
