"""`prefillshare doctor`: is this machine and its SGLang what roles need? Versions, device, every seam, a handoff."""

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
from sglang_prefillshare.handoff import cuda_memory
from sglang_prefillshare.host import flags, seams, trial

_ENTRY_POINTS = (("sglang.srt.plugins", "prefillshare"), ("sglang.srt.platforms", "prefillshare_cpu"))
_PACKAGES = ("torch", "triton", "transformers", "sglang-kernel", "numba", "cuda-python", "nixl")


def main(*, quick: bool = False, backend: str | None = None) -> int:
    """Print the report to standard output; 0 if everything a role needs is there, 1 otherwise.

    `quick` leaves the handoff out. `backend` is the transfer backend to try it with; None: the one that a worker
    chooses.
    """
    console = Console()
    problems = [*_versions(console), *_entry_points(console)]
    has_sglang = _installed("sglang") != "not installed"
    if has_sglang:
        problems += _seams(console)
    for problem in problems:
        console.print(f"[red]missing[/red]  {problem}", highlight=False, soft_wrap=True)
    is_ready = not problems
    if has_sglang and not quick and is_ready:
        is_ready = _handoff(console, backend or flags.default_backend(None))
    console.print("[green]Ready.[/green]" if is_ready else "[red]Not ready.[/red]")
    return 0 if is_ready else 1


def _versions(console: Console) -> Iterator[str]:
    table = Table("what", "found", title="Versions", title_justify="left")
    table.add_row("sglang-prefillshare", sglang_prefillshare.__version__)
    found = _installed("sglang")
    table.add_row("sglang", f"{found} (wanted {seams.SGLANG_VERSION})")
    for package in _PACKAGES:
        table.add_row(package, _installed(package))
    table.add_row("python", platform.python_version())
    table.add_row("device", _device())
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


def _handoff(console: Console, backend: str) -> bool:
    """Hand pages over between two processes, as workers of this machine would; whether all of them arrived."""
    device = trial.default_device()
    console.print(f"[italic]Handoff[/italic] ({backend}, {device}; between two processes)")
    for note in _gpus_apart():
        console.print(f"  {note}", highlight=False, soft_wrap=True)
    try:
        flags.refuse_allocator(backend, os.environ)
        proof = trial.prove(backend=backend, device=device)
    except PrefillShareError as error:
        console.print("  [red]failed[/red]  ", end="")
        console.print(str(error), highlight=False, soft_wrap=True, markup=False)
        return False
    sizes = ", ".join(map(str, proof.page_sizes))
    console.print(
        f"    [green]ok[/green]  {proof.pages} pages of {sizes} tokens, {proof.byte_count / 2**20:.1f} MiB, all bytes "
        f"equal, in {proof.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return True


def _gpus_apart() -> Iterator[str]:
    """Pairs of GPUs that cannot map each other's memory: no fault, but nothing that workers could share KV over."""
    try:
        import torch

        for device in range(torch.cuda.device_count()):
            reached = cuda_memory.reachable_gpus(device)
            for uuid in (uuid for uuid, is_peer in reached.items() if not is_peer):
                yield (
                    f"GPU {device} and GPU {uuid} are no peers: workers on the two need "
                    "--disaggregation-transfer-backend nixl."
                )
    except PrefillShareError:
        return  # the trial says what is wrong


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
