"""`prefillshare doctor`: is this machine and its SGLang what our roles need? Every seam, the versions, the device."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

from rich.console import Console
from rich.table import Table

import sglang_prefillshare
from sglang_prefillshare.environment import cpu_has_bfloat16, instruction_sets
from sglang_prefillshare.errors import PrefillShareError, SeamError
from sglang_prefillshare.handoff.cuda_memory import CudaAllocations
from sglang_prefillshare.host import seams

_ENTRY_POINTS = (("sglang.srt.plugins", "prefillshare"), ("sglang.srt.platforms", "prefillshare_cpu"))
_PACKAGES = ("torch", "triton", "transformers", "sglang-kernel", "numba", "cuda-python", "nixl")


def main() -> int:
    """Print the report to standard output; 0 if everything a role needs is there, 1 otherwise."""
    console = Console()
    problems = [*_versions(console), *_entry_points(console)]
    if _installed("sglang") != "not installed":
        problems += _seams(console)
    for problem in problems:
        console.print(f"[red]missing[/red]  {problem}", highlight=False, soft_wrap=True)
    console.print("[red]Not ready.[/red]" if problems else "[green]Ready.[/green]")
    return 1 if problems else 0


def _versions(console: Console) -> Iterator[str]:
    table = Table("what", "found", title="Versions", title_justify="left")
    table.add_row("sglang-prefillshare", sglang_prefillshare.__version__)
    found = _installed("sglang")
    table.add_row("sglang", f"{found} (wanted {seams.SGLANG_VERSION})")
    for package in _PACKAGES:
        table.add_row(package, _installed(package))
    table.add_row("python", platform.python_version())
    table.add_row("device", _device())
    table.add_row("handoff on one host", _handoff())
    console.print(table)
    if found != seams.SGLANG_VERSION:
        yield (
            f"sglang is {found}, wanted {seams.SGLANG_VERSION}. In a checkout `make setup` installs it, for a CPU or "
            f"for CUDA; elsewhere: pip install sglang=={seams.SGLANG_VERSION}"
        )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device() -> str:
    try:
        import torch
    except ImportError:
        return f"unknown: torch is not installed ({platform.machine()})"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}, CUDA {torch.version.cuda}"
    cores = len(os.sched_getaffinity(0))
    abilities = ", ".join(instruction_sets()) or "no instruction set that we know"
    dtype = "bfloat16 or float32" if cpu_has_bfloat16() else "float32: it has no bfloat16 of its own"
    return f"CPU, {cores} cores ({platform.machine()}; {abilities}); computes in {dtype}"


def _handoff() -> str:
    """Whether KV pools of this machine can be read by another process, which our own transfer backend needs."""
    try:
        import torch
    except ImportError:
        return "unknown: torch is not installed"
    if not torch.cuda.is_available():
        return "shared memory"
    try:
        CudaAllocations([torch.zeros(1 << 20, dtype=torch.uint8, device="cuda:0").data_ptr()], device=0)
    except PrefillShareError as error:
        return f"nixl only: {error}"
    return "CUDA IPC"


def _entry_points(console: Console) -> Iterator[str]:
    for group, name in _ENTRY_POINTS:
        if not entry_points(group=group, name=name):
            yield f"entry point {name} in {group}: pip install sglang-prefillshare where SGLang is installed"
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and "prefillshare" not in allowed.split(","):
        yield f"SGLANG_PLUGINS={allowed} leaves our plugin out: add prefillshare to it"
    selected = os.environ.get("SGLANG_PLATFORM")
    if selected and selected != "prefillshare_cpu":
        yield f"SGLANG_PLATFORM={selected} makes SGLang skip our plugin, which is in another distribution: unset it"


def _seams(console: Console) -> list[str]:
    console.print("[italic]Seams[/italic] (where we hook SGLang, why, what the hook changes, and when it can go)")
    problems = []
    for process, group in seams.BY_PROCESS.items():
        console.print(f"  {process}")
        for seam in group:
            try:
                seams.check(seam)
                state = "[green]ok[/green]"
            except SeamError as error:
                state = "[red]missing[/red]"
                problems.append(str(error))
            line = f"    {state}  {seam.target.removeprefix('sglang.srt.')} [dim]({seam.kind})[/dim]"
            console.print(line, highlight=False, soft_wrap=True)
            text = f"        {seam.why}; changes: {seam.changes}; retire when: {seam.retire_when}"
            console.print(text, style="dim", highlight=False, soft_wrap=True)
    return problems
