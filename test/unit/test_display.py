"""`display.py`: which lines of a worker are shown when the others go to a file."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

from rich.console import Console

from sglang_prefillshare.deployment import State, Worker
from sglang_prefillshare.display import Display
from sglang_prefillshare.plans import WorkerPlan


def shown(line: str, *, state: State, errors_only: bool) -> str:
    plan = WorkerPlan("coder", None, None, "127.0.0.1", 1, None, ("true",), {}, ())
    worker = Worker(plan)
    out = StringIO()
    with Display(errors_only=errors_only, console=Console(file=out)) as display:
        display.on_state(worker)
        worker.state = state
        display.on_line(worker, line)
    return out.getvalue()


def test_with_logs_elsewhere_only_errors_are_shown() -> None:
    for line in ("Traceback (most recent call last):", "[12:00] ERROR: no memory", "ValueError: 3"):
        assert shown(line, state=State.READY, errors_only=True) == f"[coder] {line}\n"
    assert shown("loading weights", state=State.READY, errors_only=True) == ""
    assert shown("loading weights", state=State.READY, errors_only=False) == "[coder] loading weights\n"


def test_the_traceback_of_a_worker_that_is_told_to_stop_is_no_error() -> None:
    line = "Traceback (most recent call last):"
    assert shown(line, state=State.STOPPING, errors_only=True) == ""
    assert shown(line, state=State.STOPPING, errors_only=False) == f"[coder] {line}\n"


def test_what_tritons_bindings_say_at_the_end_is_not_shown() -> None:
    for line in ("nanobind: leaked 518 functions!", ' - leaked type "x"', " - ... skipped remainder"):
        assert shown(line, state=State.STOPPING, errors_only=False) == ""
        assert shown(line, state=State.READY, errors_only=False) == f"[coder] {line}\n"


def test_one_that_is_replaced_and_the_one_that_comes_for_it_are_both_told() -> None:
    out = StringIO()
    plan = WorkerPlan("coder", None, None, "127.0.0.1", 1, None, ("true",), {}, ())
    old, new = Worker(plan), Worker(replace(plan, port=2), is_arriving=True)
    with Display(console=Console(file=out, width=200)) as display:
        for worker, state in ((old, State.READY), (new, State.STARTING), (new, State.READY), (old, State.ENDED)):
            worker.state, worker.launch_count = state, 1
            old.is_leaving = state is State.ENDED
            display.on_state(worker)
        display.on_line(old, "its last words")
        display.on_reload("now as the topology says: replaced coder", is_refused=False)
    lines = out.getvalue().splitlines()
    assert lines[1:3] == ["[coder] starting at http://127.0.0.1:2", "[coder] ready after 0.0 s"]
    assert lines[3:5] == ["[coder] ended", "[coder] its last words"]
    assert lines[5].endswith(" now as the topology says: replaced coder")


def test_a_terminal_that_is_gone_does_not_matter() -> None:
    class Gone(StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def isatty(self) -> bool:
            return True

    plan = WorkerPlan("coder", None, None, "127.0.0.1", 1, None, ("true",), {}, ())
    worker = Worker(plan)
    with Display(console=Console(file=Gone())) as display:
        for worker.state in (State.STARTING, State.READY, State.STOPPING, State.ENDED):
            display.on_state(worker)
        display.say("stopped")
