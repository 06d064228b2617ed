"""Logs as objects: of the router's log, of finished calls, and of `up`."""

from __future__ import annotations

import io
import json
import logging
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from sglang_prefillshare.deployment import State
from sglang_prefillshare.json_display import JsonDisplay
from sglang_prefillshare.json_logs import JsonFormatter


def test_an_event_is_one_line_whatever_its_text_holds() -> None:
    try:
        raise ValueError("bad\nthing")
    except ValueError:
        record = logging.getLogger("a.b").makeRecord(
            "a.b", logging.ERROR, "f", 1, "said %s", ("x\n\u2028y",), sys.exc_info()
        )
    line = JsonFormatter().format(record)
    assert len(line.splitlines()) == 1
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == ("ERROR", "a.b", "said x\n\u2028y")
    assert told["time"].endswith("+00:00") and "ValueError: bad\nthing" in told["exception"]


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_route_writes_its_log_and_each_call_as_lines(log_format: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "sglang_prefillshare.cli",
        "route",
        "--port",
        str(port),
        "--log-format",
        log_format,
    ]
    command += ["--prefill", "http://127.0.0.1:1", "--decode", "coder=http://127.0.0.1:2", "--stop-grace", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        body = json.dumps({"model": "coder", "prompt": "a secret text"}).encode()
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/completions", data=body)
            except urllib.error.HTTPError as error:
                assert error.code == 503
                break
            except OSError:
                time.sleep(0.1)
        process.terminate()
        _, output = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    lines = output.splitlines()
    if log_format == "text":
        assert lines and not any(line.startswith("{") for line in lines)
        return
    told = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in told)
    assert any("router listens on" in line["message"] for line in told)
    (call,) = (line["call"] for line in told if "call" in line)
    assert (call["model"], call["endpoint"], call["outcome"], call["status"]) == (
        "coder", "/v1/completions", "unavailable", 503,
    )  # fmt: skip
    assert "secret text" not in output


class _Worker:
    def __init__(self, name: str) -> None:
        self.name = name
        self.state = State.READY
        self.url = "http://127.0.0.1:5"


def test_up_tells_whose_a_line_is_and_keeps_the_routers_objects() -> None:
    stream = io.StringIO()
    display = JsonDisplay(stream=stream)
    worker: Any = _Worker("coder")
    router: Any = _Worker("router")
    with display:
        display.on_state(worker)
        display.on_line(worker, "INFO: up and\u2028away")
        display.on_line(worker, '{"no": "log line"}')
        display.on_line(router, json.dumps({"time": "t", "level": "INFO", "logger": "l", "message": "m", "call": {}}))
        display.say("stopped")
    told = [json.loads(line) for line in stream.getvalue().split("\n")[:-1]]
    assert [line.get("worker") for line in told] == ["coder", "coder", "coder", "router", None]
    assert [line["message"] for line in told[1:]] == ["INFO: up and\u2028away", '{"no": "log line"}', "m", "stopped"]
    assert told[3]["time"] == "t" and told[3]["call"] == {}
    quiet = io.StringIO()
    few = JsonDisplay(errors_only=True, stream=quiet)
    few.on_line(worker, "INFO: of no use")
    assert quiet.getvalue() == ""
    few.on_line(worker, "2026-01-01 ERROR it broke")
    assert json.loads(quiet.getvalue())["level"] == "ERROR"
