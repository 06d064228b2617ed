"""NIXL on a CPU host: say that the KV pool is host memory, before NIXL registers it."""

from __future__ import annotations

from typing import Any


def declare_host_memory(self: Any, args: Any, *_rest: Any, **_more: Any) -> None:
    """Hook before the constructor that every backend's manager begins with; NIXL reads the field right after it."""
    args.kv_data_mem_kinds = ["DRAM"] * len(args.kv_data_ptrs)
