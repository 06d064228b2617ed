"""`cli.py`: exit statuses, messages, and `up` as a process that gets signals."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

from sglang_prefillshare import __version__, cli
from sglang_prefillshare.identity.fingerprint import identify_base
from sglang_prefillshare.identity.manifest import FILE_NAME, check_manifest, read_manifest
from sglang_prefillshare.routing.config import AdmissionConfig, BreakerConfig, RouterConfig
from test.unit.deploying import FAKE_COMMAND, marked, new_mark, nothing_left, topology_data, wait_until
from test.unit.identity.tiny import edit_json, write_model

CLI = (sys.executable, "-m", "sglang_prefillshare.cli")


class Up:
    """`prefillshare up` of fake workers, running; `has_router` starts our own router before them."""

    def __init__(
        self,
        directory: Path,
        mark: str,
        *flags: str,
        has_router: bool = False,
        popen: Mapping[str, Any] = MappingProxyType({}),
        **topology: Any,
    ) -> None:
        self.ready_file = directory / "ready.json"
        self.path = directory / "topology.yaml"
        self.data = topology_data(directory, mark, **topology)
        self.write(self.data)
        fake = shlex.join(FAKE_COMMAND)
        router = () if has_router else ("--router-command", fake)
        self.process = subprocess.Popen(
            [
                *(*CLI, "up", str(self.path), "--json-ready", str(self.ready_file)),
                *("--worker-command", fake, *router),
                *flags,
            ],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen},
        )

    def write(self, data: dict[str, Any]) -> None:
        self.path.write_text(yaml.safe_dump(data))

    def names(self) -> list[str]:
        """Of the workers that the ready file has now."""
        return [worker["name"] for worker in json.loads(self.ready_file.read_text())["workers"]]

    def wait_ready(self) -> dict[str, Any]:
        assert wait_until(self.ready_file.exists), self.process.stderr
        told: dict[str, Any] = json.loads(self.ready_file.read_text())
        return told

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@pytest.fixture
def mark() -> Iterator[str]:
    mark = new_mark()
    with nothing_left(mark):
        yield mark


@contextlib.contextmanager
def up(directory: Path, mark: str, *flags: str, **changes: Any) -> Iterator[Up]:
    running = Up(directory, mark, *flags, **changes)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        for stream in (running.process.stdout, running.process.stderr):
            if stream is not None:
                stream.close()


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys; from sglang_prefillshare import cli\n"
        "for argv in (['--help'], ['up', '--help'], ['route', '--help'], ['--version']): assert cli.run(argv) == 0\n"
        "heavy = {'torch', 'sglang', 'transformers', 'aiohttp', 'starlette', 'uvicorn', 'rich', 'yaml', 'psutil'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert f"sglang-prefillshare {__version__}" in answer.stdout


@pytest.mark.parametrize("argv", [["up"], ["up", "--no-such-flag", "t.yaml"], ["no-such-command"]])
def test_a_wrong_call_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(argv) == 2
    assert "Error: " in capsys.readouterr().err


def test_a_wrong_setting_exits_2_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("base: {model: m}\ndecode: [{nam: a, model: m}]\n")
    assert cli.run(["up", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prefillshare: {path}:2: decode[0] has an unknown key 'nam'")


def test_a_decode_worker_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["route", "--prefill", "http://a:1", "--decode", "http://b:2"]) == 2
    assert "wanted NAME=URL" in capsys.readouterr().err


def test_what_the_routers_flags_say_reaches_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[RouterConfig] = []
    monkeypatch.setattr("sglang_prefillshare.routing.server.serve", lambda config, *, router: served.append(config))
    workers = ("route", "--prefill", "http://a:1", "--decode", "planner=http://b:2")
    room = ("--queue-size", "7", "--queue-timeout", "3", "--output-share", "0.5", "--no-admission")
    faults = ("--retries", "2", "--breaker-failures", "4", "--breaker-backoff", "1.5")
    assert cli.run([*workers]) == cli.run([*workers, *room, *faults]) == 0
    plain, told = served
    assert (plain.admission, plain.breaker, plain.retries) == (AdmissionConfig(), BreakerConfig(), 1)
    assert told.admission == AdmissionConfig(is_on=False, queue_size=7, queue_timeout_s=3.0, output_share=0.5)
    assert (told.breaker, told.retries) == (BreakerConfig(failures_to_open=4, backoff_s=1.5), 2)
    assert cli.run([*workers, "--queue-size", "-1"]) == 2


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("file:absent.yaml", "cannot read file:absent.yaml: No such file"),
        ("kubernetes:x", "cannot be read from the Kubernetes API yet"),
        ("dns:workers", "a port from 1 to 65535"),
        ("workers.yaml", "wanted file:PATH or dns:NAME:PORT"),
    ],
)
def test_a_source_of_workers_is_checked_before_the_router_starts(
    source: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["route", "--workers", source]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


# ---- identity write ------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A base and a module that fits it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_model(tmp_path / "base"), write_model(tmp_path / "module")


def test_identity_write_names_the_base_of_a_module_that_fits(models: tuple[Path, Path]) -> None:
    base, module = models
    assert cli.run(["identity", "write", str(module), "--base", str(base)]) == 0
    manifest = read_manifest(module)
    assert manifest is not None
    check_manifest(manifest, identify_base(base))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "the tokenizer of"),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, "the chat template of"),
    ],
)
def test_identity_write_refuses_what_a_worker_would_refuse(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], file: str, change: dict[str, Any], said: str
) -> None:
    base, module = models
    edit_json(module / file, **change)
    assert cli.run(["identity", "write", str(module), "--base", str(base)]) == 1
    assert said in capsys.readouterr().err
    assert not (module / FILE_NAME).exists()


def test_identity_write_takes_tokenizer_and_template_as_workers_do(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, module = models
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}!")
    edit_json(module / "tokenizer_config.json", chat_template="{{ messages }}")  # of no account with a common one
    argv = ["identity", "write", str(module), "--base", str(base)]
    assert cli.run([*argv, "--chat-template", str(template)]) == 0
    manifest = read_manifest(module)
    assert manifest is not None
    assert manifest.components == identify_base(base, chat_template=str(template)) != identify_base(base)

    edit_json(module / "tokenizer.json", normalizer={"type": "Lowercase"})
    assert cli.run([*argv, "--tokenizer-path", str(module)]) == 0
    manifest = read_manifest(module)
    assert manifest is not None
    assert manifest.components == identify_base(base, tokenizer_path=module) != identify_base(base)


# ---- up ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_until_it_is_told_to_stop(tmp_path: Path, mark: str, number: signal.Signals) -> None:
    with up(tmp_path, mark) as running:
        told = running.wait_ready()
        assert told["pid"] == running.process.pid
        assert {worker["pid"] for worker in told["workers"]} <= {process.pid for process in marked(mark)}
        running.process.send_signal(number)
        status, out, err = running.finish()
    assert status == 0, err
    assert out == f"router {told['router_url']}\n"
    assert "[coder] loading coder" in err.splitlines()
    assert "[coder] leaving on SIGINT" in err.splitlines()
    assert not running.ready_file.exists()


def test_up_stops_while_it_starts(tmp_path: Path, mark: str) -> None:
    with up(tmp_path, mark, coder={"args": {"fake": "never-ready"}}) as running:
        assert wait_until(lambda: len(marked(mark)) == 4)
        running.process.send_signal(signal.SIGINT)
        status, out, err = running.finish()
    assert (status, out) == (0, ""), err


def test_a_second_interrupt_waits_for_nobody(tmp_path: Path, mark: str) -> None:
    flags = ("--interrupt-grace", "60", "--terminate-grace", "60")
    with up(tmp_path, mark, *flags, coder={"args": {"fake": "ignores-signals"}}) as running:
        running.wait_ready()
        running.process.send_signal(signal.SIGINT)
        assert wait_until(lambda: len(marked(mark)) == 2)  # the one that ignores it, and its supervisor
        running.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        running.finish()
    assert time.monotonic() - began < 5


def test_up_restarts_a_worker_that_died_and_says_so(tmp_path: Path, mark: str) -> None:
    with up(tmp_path, mark) as running:
        told = running.wait_ready()
        pid = told["workers"][1]["pid"]
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: json.loads(running.ready_file.read_text())["workers"][1]["pid"] != pid)
        now = json.loads(running.ready_file.read_text())
        assert {**now["workers"][1], "pid": pid} == told["workers"][1]
        assert (now["workers"][0], now["router"]) == (told["workers"][0], told["router"])
        running.process.send_signal(signal.SIGINT)
        status, out, err = running.finish()
    assert (status, out) == (0, f"router {told['router_url']}\n"), err
    said = re.search(
        r"^\[coder\] \d\d:\d\d:\d\d ended while it served: killed by SIGKILL \(out of memory\?\); "
        r"restart 1 of 3 in 1 s. Last lines:\n  \[coder\] loading coder$",
        err,
        re.MULTILINE,
    )
    assert said, err
    assert re.search(r"^\[coder\] ready again after ", err, re.MULTILINE)


@pytest.mark.parametrize("flags", [(), ("--fail-fast",), ("--log-format", "json")])
def test_up_reads_its_topology_again_on_sighup(tmp_path: Path, mark: str, flags: tuple[str, ...]) -> None:
    with up(tmp_path, mark, *flags, has_router=True, popen={"start_new_session": True}) as running:
        told = running.wait_ready()
        running.write({**running.data, "decode": [*running.data["decode"], {"name": "tester", "model": "model"}]})
        running.process.send_signal(signal.SIGHUP)
        assert wait_until(lambda: running.names() == ["base", "coder", "tester"])
        now = json.loads(running.ready_file.read_text())
        assert (now["workers"][:2], now["router"]) == (told["workers"], told["router"])
        running.path.write_text("base: [")
        running.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        running.write(running.data)
        running.process.send_signal(signal.SIGHUP)
        assert wait_until(lambda: running.names() == ["base", "coder"])
        running.process.send_signal(signal.SIGINT)
        status, out, err = running.finish()
    assert (status, out) == (0, f"router {told['router_url']}\n"), err
    for said in (
        "now as the topology says: added tester; 2 as they were",
        f"the topology was read anew, and nothing changed: {running.path}:1: not valid YAML",
        "now as the topology says: removed tester; 2 as they were",
    ):
        assert said in err


def with_terminal(*, is_nohup: bool) -> tuple[int, int, dict[str, Any]]:
    """A terminal of its own for `up`: its two ends, and what to start it with."""
    ours, theirs = pty.openpty()

    def begin() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        if is_nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    streams = {"stdin": theirs, "stderr": subprocess.PIPE if is_nohup else theirs, "pass_fds": (theirs,)}
    return ours, theirs, {"start_new_session": True, "preexec_fn": begin, **streams}


def test_up_ends_when_its_terminal_goes_away_and_not_because_of_a_sighup_before(tmp_path: Path, mark: str) -> None:
    ours, theirs, popen = with_terminal(is_nohup=False)
    with up(tmp_path, mark, popen=popen) as running:
        os.close(theirs)
        os.set_blocking(ours, False)
        said = bytearray()

        def has_said(text: bytes) -> bool:
            with contextlib.suppress(BlockingIOError):
                said.extend(os.read(ours, 65536))
            return text in said

        assert wait_until(lambda: has_said(b"") and running.ready_file.exists())
        running.process.send_signal(signal.SIGHUP)
        assert wait_until(lambda: has_said(b"asks for what runs")), said
        assert running.process.poll() is None
        os.close(ours)  # the kernel sends SIGHUP
        assert running.process.wait(20) == 0


def test_up_under_nohup_outlives_its_terminal(tmp_path: Path, mark: str) -> None:
    ours, theirs, popen = with_terminal(is_nohup=True)
    with up(tmp_path, mark, popen=popen) as running:
        os.close(theirs)
        running.wait_ready()
        os.close(ours)
        time.sleep(1.0)
        assert running.process.poll() is None and running.ready_file.exists()
        running.process.send_signal(signal.SIGTERM)
        status, _, err = running.finish()
    assert status == 0 and "asks for what runs" in err


def test_under_fail_fast_a_worker_that_dies_ends_everything_with_status_1(tmp_path: Path, mark: str) -> None:
    with up(tmp_path, mark, "--fail-fast", coder={"args": {"fake": "dies-later"}}) as running:
        status, _, err = running.finish()
    assert status == 1
    assert "prefillshare: coder ended while it served: exit status 4" in err
    # Of what it ended, something may have been importing still.
    assert not [line for line in err.splitlines() if "Traceback" in line and not line.startswith("[")]


def test_nothing_outlives_an_up_that_was_killed(tmp_path: Path, mark: str) -> None:
    workers = {"args": {"fake": ["forks", "ignores-signals"]}}
    flags = ("--interrupt-grace", "0.5", "--terminate-grace", "0.3")
    with up(tmp_path, mark, *flags, base=workers, coder=workers) as running:
        running.wait_ready()
        # two workers, two supervisors, three forked by each worker
        assert wait_until(lambda: len(marked(mark)) == 10, timeout_s=2.0)
        running.process.kill()
        running.process.wait()
        assert wait_until(lambda: not marked(mark), timeout_s=5.0)


def test_with_a_log_folder_only_errors_are_shown(tmp_path: Path, mark: str) -> None:
    with up(tmp_path, mark, "--log-dir", str(tmp_path / "logs"), coder={"args": {"fake": "dies-at-start"}}) as running:
        status, _, err = running.finish()
    assert status == 1
    before, _, summary = err.partition("prefillshare: ")
    assert "[coder] ERROR: weights are missing" in before
    assert "loading" not in before
    assert f"Its log is {tmp_path / 'logs' / 'coder.log'}" in summary
    assert "loading coder" in (tmp_path / "logs" / "coder.log").read_text()
