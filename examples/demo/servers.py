"""The demo's servers: one with the base and three adapters, or a base worker, a worker per module and the router."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil
from rich.console import Console

from examples.demo.models import ADAPTERS, prepare_base, prepare_models
from examples.demo.program import Call
from examples.demo.report import CallFigures, HandoffFigures, figures, handoff_figures, own_figures
from examples.demo.rounds import ROLES
from sglang_prefillshare.config import AdapterModule, ArgValue, DecodeModule, Topology, WorkerSettings
from sglang_prefillshare.errors import PrefillShareError

KV_POOL_TOKENS: Final = 16384
RECORD_TIMEOUT_S: Final = 10.0


def prepare(out: Path, *, is_unified: bool, console: Console | None = None) -> dict[str, Path]:
    """The folders of the base and of each module, made where they are missing: a module of one server is an adapter."""
    if not is_unified:
        return prepare_models(out, console=console)
    return {"base": prepare_base(out, console=console)} | {role: ADAPTERS / role for role in ROLES}


def topology(models: Mapping[str, Path], *, dtype: str, is_unified: bool) -> Topology:
    """Every server at a free port."""
    args: dict[str, ArgValue] = {"dtype": dtype, "max-total-tokens": KV_POOL_TOKENS}
    base = WorkerSettings(str(models["base"]), args=args)
    if is_unified:
        adapters = tuple(AdapterModule(role, str(models[role])) for role in ROLES)
        return Topology(base=base, decode=(), adapters=adapters, is_unified=True)
    return Topology(
        base=base, decode=tuple(DecodeModule(role, WorkerSettings(str(models[role]), args=args)) for role in ROLES)
    )


def figures_of(calls: Sequence[Call], url: str, *, is_unified: bool) -> list[CallFigures]:
    """One server's answers say all; what a router's base found is in the router's records."""
    return own_figures(calls) if is_unified else [figures(call, record(url, call.rid)) for call in calls]


def handoffs(url: str, *, is_unified: bool) -> HandoffFigures:
    """What the decode workers' handoffs moved so far, and what they held already, as the router sums it up."""
    if is_unified:
        return HandoffFigures()
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        return handoff_figures(response.read().decode())


def record(router_url: str, rid: str) -> Mapping[str, Any]:
    """The router's record of one call.

    A client that stops reading at [DONE] is ahead of the router by a moment, and of the base by a little more when
    the answer was short: then the record is waited for.
    """
    deadline = time.monotonic() + RECORD_TIMEOUT_S
    while True:
        with urllib.request.urlopen(f"{router_url}/calls?rid={urllib.parse.quote(rid)}", timeout=30) as response:
            records: list[dict[str, Any]] = json.load(response)["calls"]
        if records:
            return records[-1]
        if time.monotonic() > deadline:
            raise PrefillShareError(f"the router still has no record of call {rid} after {RECORD_TIMEOUT_S:g} s.")
        time.sleep(0.05)


def memory_bytes() -> int:
    """What all processes that the demo started hold, each page that several share counted once (PSS)."""
    held = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            held += process.memory_full_info().pss
    return held
