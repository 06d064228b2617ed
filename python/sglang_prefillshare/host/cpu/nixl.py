"""NIXL on a CPU host: the KV pool is host memory, and the thread that waits for peers does not spin."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Final

PROGRESS_INTERVAL_US: Final = 5_000
"""How long NIXL's progress thread sleeps unless a peer wakes it, which peers do. NIXL's Python API asks for 0: the
thread then spins, and takes a core of the machine for each server, busy or not."""

_IS_PATCHED: Final = "_prefill_share_waits"


def declare_host_memory(self: Any, args: Any, *_rest: Any, **_more: Any) -> None:
    """Hook before the constructor that every backend's manager begins with; NIXL reads the field right after it."""
    args.kv_data_mem_kinds = ["DRAM"] * len(args.kv_data_ptrs)
    if ".nixl." in type(self).__module__:
        let_progress_thread_sleep()


def let_progress_thread_sleep() -> None:
    """Agents that are made from now on sleep between two looks."""
    if importlib.util.find_spec("nixl") is None:
        return  # SGLang says how to install it
    from nixl._api import nixl_agent

    bindings: Any = sys.modules[nixl_agent.__module__].nixlBind  # of the CUDA version that was found
    if getattr(bindings, _IS_PATCHED, False):
        return

    class SleepingAgentConfig(bindings.nixlAgentConfig):  # type: ignore[misc, unused-ignore]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, PROGRESS_INTERVAL_US if name == "pthrDelay" and value == 0 else value)

    bindings.nixlAgentConfig = SleepingAgentConfig
    setattr(bindings, _IS_PATCHED, True)
