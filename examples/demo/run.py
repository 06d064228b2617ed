"""Three models with different weights answer over one context that a base model, which they share, prefilled once.

    python examples/demo/run.py

Serves SmolLM2-135M-Instruct as the base, and planner, coder and reviewer as its decode modules, which were trained to
read its KV (`models.py`): adapters in one server, or with --disaggregated a worker for the base, one for each module,
and the router. A program in SGLang's frontend language then lets them answer requests about lists, one after
another; a second conversation goes through the `openai` client. Prints what was reused and how many answers are what
the request wants, and lets plain Transformers check every token. Writes report.json and transcript.json to the folder
--out; Ctrl-C ends everything at any time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import click
from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, too, the demo is the package examples.demo

from examples.demo.exercises import Request, draw_request
from examples.demo.models import BASE_NAME
from examples.demo.oracle import NOISE
from examples.demo.program import Call, OnText, Script, Step, is_right, play, rounds_script
from examples.demo.report import (
    CallFigures,
    HandoffFigures,
    computed_without_sharing,
    sessions,
    table,
)
from examples.demo.rounds import SYSTEM, messages_of
from examples.demo.servers import figures_of, handoffs, memory_bytes, prepare, topology
from sglang_prefillshare.deployment import Deployment, DeploymentOptions, State, StopRequestedError, Worker
from sglang_prefillshare.display import Display
from sglang_prefillshare.environment import has_accelerator
from sglang_prefillshare.errors import ConfigError, PrefillShareError

REQUESTS_SEED: Final = "demo"
EXIT_INTERRUPTED: Final = 130
MODULE_STYLES: Final = {"planner": "cyan", "coder": "green", "reviewer": "magenta"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command was told. `dtype` is that of weights and KV; only float32 can be compared token by token."""

    out: Path
    models: Path
    turns: int
    max_new_tokens: int
    dtype: str
    disaggregated: bool
    keep_serving: bool

    @property
    def is_unified(self) -> bool:
        return not self.disaggregated


@click.command(help=__doc__.split("\n\n", 1)[0])
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/demo"), show_default=True)
@click.option(
    "--models", type=click.Path(file_okay=False, path_type=Path), default=Path("out/models"), show_default=True
)
@click.option(
    "--turns", type=click.IntRange(1, 20), default=3, show_default=True, help="Requests, each a round of all agents."
)
@click.option("--max-new-tokens", type=click.IntRange(1, 512), default=48, show_default=True, help="Of each answer.")
@click.option(
    "--dtype",
    type=click.Choice(sorted(NOISE)),
    default=lambda: "bfloat16" if has_accelerator() else "float32",
    show_default="float32, on a GPU bfloat16",
    help="Of weights and KV. float32 is exact enough to compare every token.",
)
@click.option("--disaggregated", is_flag=True, help="A base worker, a worker per module with merged weights, a router.")
@click.option("--keep-serving", is_flag=True, help="Go on serving afterwards, until Ctrl-C.")
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # bars of Transformers; the demo shows its own progress
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here already
    interrupts = Interrupts()
    interrupts.install()
    try:
        context.exit(run(Settings(**options), interrupts, Console(highlight=False)))
    except (KeyboardInterrupt, StopRequestedError):
        click.echo("interrupted; nothing is left running", err=True)
        context.exit(EXIT_INTERRUPTED)
    except PrefillShareError as error:
        click.echo(f"demo: {error}", err=True)
        context.exit(2 if isinstance(error, ConfigError) else 1)


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP: an exception where our own code runs, a request where a deployment starts or ends.

    A deployment counts its processes itself and must not be torn out of that; a second signal makes it hurry.
    """

    def __init__(self) -> None:
        self._deployment: Deployment | None = None
        self._is_ending = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        warnings.simplefilter("ignore")  # the frontend language warns of every stream that breaks off
        if self._deployment is not None:
            self._deployment.request_stop()
        elif not self._is_ending:
            self._is_ending = True
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def told_to(self, deployment: Deployment) -> Iterator[None]:
        self._deployment = deployment
        try:
            yield
        finally:
            self._deployment = None

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Inside `told_to`: for code of our own, an exception again."""
        deployment, self._deployment = self._deployment, None
        try:
            yield
        finally:
            self._deployment = deployment


@dataclass(slots=True)
class Outcome:
    """What the demo found out, in the order in which it does."""

    requests: dict[str, list[Request]]
    server_count: int = 1
    start_s: float = 0.0
    memory_bytes: int = 0
    calls: list[Call] = field(default_factory=list)
    figures: list[CallFigures] = field(default_factory=list)
    handoffs: HandoffFigures = field(default_factory=HandoffFigures)
    verdicts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def right(self) -> list[bool]:
        """For every call, whether it said what the request wants."""
        return [is_right(call, self.requests[call.client]) for call in self.calls]

    def report(self, settings: Settings) -> dict[str, Any]:
        by_session = sessions(self.figures)
        return {
            "calls": [
                call.to_json() | {"is_right": is_right} for call, is_right in zip(self.figures, self.right, strict=True)
            ],
            "right": sum(self.right),
            "computed_prompt_tokens": sum(session.computed_prompt_tokens for session in by_session),
            "final_context_tokens": sum(session.final_context_tokens for session in by_session),
            "computed_without_sharing": computed_without_sharing(self.calls),
            "servers": self.server_count,
            "start_s": round(self.start_s, 1),
            "memory_bytes": self.memory_bytes,
            "handoff_moved_bytes": self.handoffs.moved_bytes,
            "handoff_held_bytes": self.handoffs.held_bytes,
            "oracle_checked": len(self.verdicts),
            "oracle_equal": sum(verdict["is_equal"] for verdict in self.verdicts),
            "oracle": self.verdicts,
            "sessions": {
                session.client: {
                    "computed_prompt_tokens": session.computed_prompt_tokens,
                    "final_context_tokens": session.final_context_tokens,
                }
                for session in by_session
            },
            "config": {
                "base": BASE_NAME,
                "dtype": settings.dtype,
                "turns": settings.turns,
                "max_new_tokens": settings.max_new_tokens,
                "requests": {client: [request.text for request in own] for client, own in self.requests.items()},
            },
        }


def run(settings: Settings, interrupts: Interrupts, console: Console) -> int:
    """The whole demo; returns the exit status."""
    began_s = time.monotonic()
    _introduce(console)
    is_unified = settings.is_unified
    models = prepare(settings.models, is_unified=is_unified, console=console)
    outcome = Outcome(requests=draw_requests(settings.turns))
    scripts = [rounds_script(own, max_new_tokens=settings.max_new_tokens) for own in outcome.requests.values()]
    settings.out.mkdir(parents=True, exist_ok=True)
    with _QuietEnding(errors_only=True) as display:
        what = "one server with all of them" if is_unified else "base, planner, coder, reviewer and router"
        display.say(f"Starting {what} (up to a minute on two cores) ...")
        options = DeploymentOptions(log_dir=settings.out / "logs")
        described = topology(models, dtype=settings.dtype, is_unified=is_unified)
        deployment = Deployment(described, options=options, observer=display)
        starting_s = time.monotonic()
        with interrupts.told_to(deployment), deployment:
            outcome.start_s = time.monotonic() - starting_s
            outcome.server_count = len(deployment.workers) + (deployment.router is not None)
            with interrupts.raised():
                try:
                    outcome.calls = _converse(deployment.url, models, scripts, console)
                except Exception:
                    deployment.check()  # a worker that ended is the cause, and says more
                    raise
                finally:
                    console.print()
                outcome.memory_bytes = memory_bytes()
                outcome.handoffs = handoffs(deployment.url, is_unified=is_unified)
                outcome.figures = figures_of(outcome.calls, deployment.url, is_unified=is_unified)
                _show_figures(outcome, settings, console)
            if settings.keep_serving:
                with interrupts.raised():
                    status = _finish(outcome, models, settings, console, began_s)
                _tell_how_to_talk(deployment.url, console, is_unified=is_unified)
                with contextlib.suppress(StopRequestedError):
                    deployment.wait()
                return status
            display.say("Ending the servers ...")
    return _finish(outcome, models, settings, console, began_s)


def draw_requests(turns: int) -> dict[str, list[Request]]:
    """By client. All are of combinations that training never asked."""
    generator = random.Random(REQUESTS_SEED)
    return {client: [draw_request(generator, "test") for _ in range(turns)] for client in ("frontend", "openai")}


def _introduce(console: Console) -> None:
    console.print(Text("PrefillShare: one prefill, several models\n", style="bold"))
    console.print(
        f"The base is {BASE_NAME}. The decode modules planner, coder and reviewer have weights of their own. They "
        "were trained for some minutes to read the base's KV and to answer requests about lists; none of the following "
        "combinations was among those.\n"
    )


def _converse(url: str, models: Mapping[str, Path], scripts: Sequence[Script], console: Console) -> list[Call]:
    console.print(Text("\nLoading SGLang's frontend language ...", style="dim"))
    from transformers import AutoTokenizer

    from examples.demo import chat, frontend

    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    show = _Speech(console)
    first, second = scripts
    console.print("\nIn SGLang's frontend language:", style="bold")
    answers = frontend.run(first, show.text, url=url, tokenize=lambda text: tokenizer(text).input_ids)
    calls = play(first, answers, on_step=show.step)
    console.print("\n\nThrough the openai client, streaming:", style="bold")
    calls += play(second, chat.run(second, show.text, url=url), on_step=show.step)
    return calls


class _QuietEnding(Display):
    """SGLang's processes end on a signal with tracebacks, which tell of no error. They are in the logs."""

    def on_line(self, worker: Worker, line: str) -> None:
        if worker.state is not State.STOPPING:
            super().on_line(worker, line)


class _Speech:
    """Shows the answers as they arrive."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.text: OnText = functools.partial(console.print, end="", markup=False, soft_wrap=True)

    def step(self, step: Step) -> None:
        asked, _, _ = step.message.rpartition("\n")
        if asked:
            self._console.print(f"\n\n{asked}", end="", markup=False)
        name = Text(f"\n[{step.model}, turn {step.turn}] ", style=MODULE_STYLES.get(step.model, ""))
        self._console.print(name, end="")


def _show_figures(outcome: Outcome, settings: Settings, console: Console) -> None:
    report = outcome.report(settings)
    console.print()
    console.print(table(outcome.figures))
    computed, alone = report["computed_prompt_tokens"], report["computed_without_sharing"]
    console.print(
        f"\nThe base prefilled {computed:,} tokens, once for all three models. Without sharing, each with a cache "
        f"of its own, the models would have prefilled {alone:,}: {alone / max(computed, 1):.1f} times as many."
    )
    for session in sessions(outcome.figures):
        console.print(
            f"  {session.client}: {session.computed_prompt_tokens:,} prefilled, for a context of "
            f"{session.final_context_tokens:,} tokens at the last call"
        )
    console.print(f"{report['right']} of {len(outcome.calls)} answers are what the request wants.")
    if settings.is_unified:
        console.print("All read the base's KV where it lies: nothing was handed over.")
    else:
        moved, held = (size / 1e6 for size in (outcome.handoffs.moved_bytes, outcome.handoffs.held_bytes))
        console.print(
            f"Of the KV that they read, the decode workers fetched {moved:,.0f} MB and held {held:,.0f} MB already."
        )
    count = "one server" if outcome.server_count == 1 else f"{outcome.server_count} servers"
    console.print(f"Started {count} in {outcome.start_s:.0f} s, which hold {outcome.memory_bytes / 1e9:.1f} GB.\n")


def _finish(outcome: Outcome, models: Mapping[str, Path], settings: Settings, console: Console, began_s: float) -> int:
    """Let the oracle check every call, and write the report; the exit status says whether a difference is real."""
    transcript = settings.out / "transcript.json"
    _write(
        transcript,
        {
            "models": {name: str(path.resolve()) for name, path in models.items()},
            "calls": [call.to_json() for call in outcome.calls],
        },
    )
    try:
        for verdict in _ask_oracle(transcript):
            outcome.verdicts.append(verdict)
            _show_verdict(outcome.calls[len(outcome.verdicts) - 1], verdict, console)
            console.print(
                f"\rTransformers has checked {len(outcome.verdicts)} of {len(outcome.calls)} answers ...",
                end="" if console.is_terminal else "\n",
                style="dim",
            )
    finally:
        _write(settings.out / "report.json", outcome.report(settings))
    equal = sum(verdict["is_equal"] for verdict in outcome.verdicts)
    console.print(
        f"\r{equal} of {len(outcome.verdicts)} answers equal, token for token, what plain Transformers computes.   "
    )
    console.print(
        f"Report: {settings.out / 'report.json'}   ({time.monotonic() - began_s:.0f} s in all)", soft_wrap=True
    )
    return int(any(verdict["largest_gap"] > NOISE[settings.dtype] for verdict in outcome.verdicts))


def _ask_oracle(transcript: Path) -> Iterator[dict[str, Any]]:
    script = Path(__file__).with_name("oracle.py")
    # Nothing else computes now, so that it may have every core.
    env = {**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    process = subprocess.Popen(
        [sys.executable, str(script), str(transcript)], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
        if process.wait() != 0:
            raise PrefillShareError(f"the oracle failed. Run it again: python {script} {transcript}")
    finally:
        process.kill()
        process.wait()


def _show_verdict(call: Call, verdict: Mapping[str, Any], console: Console) -> None:
    if not verdict["is_equal"]:
        console.print(
            f"\n{call.model} ({call.client}, turn {call.turn}) differs from token {verdict['first_difference']} on; "
            f"Transformers likes its own choice better by {verdict['largest_gap']:.2g}."
        )


def _write(path: Path, value: Any) -> None:
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def _tell_how_to_talk(url: str, console: Console, *, is_unified: bool) -> None:
    messages = messages_of(draw_requests(1)["openai"][0], code="", until="planner")
    body = json.dumps({"model": "planner", "messages": [{"role": "system", "content": SYSTEM}, *messages]})
    calls = "" if is_unified else f"{url}/calls tells what each call reused. "
    console.print(
        f"\nServing at {url}, models planner, coder and reviewer. For example:\n\n"
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n\n"
        f"  {calls}Ctrl-C ends it.\n",
        soft_wrap=True,
        markup=False,
    )


if __name__ == "__main__":
    main()
