"""The page's files, and what it is told of the workers."""

from __future__ import annotations

import asyncio
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

import sglang_prefillshare.routing.board as board
from test.unit.routing.routing_harness import described_tree, run, running_system

FOLDER = Path(board.__file__).parent / "ui"
NODES = [{"id": 1, "tokens": 100, "read_by": [1]}, {"id": 2, "parent": 1, "tokens": 50, "computed_for": 1}]


def test_the_page_and_all_it_names_are_served_and_nothing_else() -> None:
    async def scenario() -> None:
        async with running_system() as system:
            page = await system.get("/ui")
            assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
            named = set(re.findall(r'(?:src|href)="(ui/[^"]+)"', page.body.decode()))
            for script in FOLDER.glob("*.js"):
                if ".min." not in script.name:
                    named |= {f"ui/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())}
            assert {"ui/app.js", "ui/tree.js", "ui/style.css", "ui/uPlot.iife.min.js"} <= named
            for path in named:
                answer = await system.get(f"/{path}")
                assert answer.status == 200 and answer.body, path
                assert answer.headers["content-security-policy"].startswith("default-src 'self';")
            async with system.http.get(f"{system.url}/ui/", allow_redirects=False) as response:
                assert (response.status, response.headers["location"]) == (301, "../ui")
            for path in ("/ui/nothing.js", "/ui/THIRD_PARTY.md", "/ui/..%2Fboard.py", "/ui/%2e%2e/board.py"):
                assert (await system.get(path)).status == 404, path

    run(scenario())


def test_the_page_needs_nothing_from_elsewhere_and_has_nothing_inline() -> None:
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)", page) and "<style" not in page
    assert not re.search(r"\s(?:on\w+|style)=", page)
    ours = [*FOLDER.glob("*.css"), *FOLDER.glob("*.html"), *(f for f in FOLDER.glob("*.js") if ".min." not in f.name)]
    for file in ours:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|\beval\b|document\.write", text), file.name


def test_the_vendored_script_is_the_one_that_its_note_names() -> None:
    digest = hashlib.sha256((FOLDER / "uPlot.iife.min.js").read_bytes()).hexdigest()
    note = (FOLDER / "THIRD_PARTY.md").read_text()
    version = re.search(r"\(v([\d.]+)\)", (FOLDER / "uPlot.iife.min.js").read_text()[:200])
    assert version is not None and f"| {version[1]} |" in note and digest in note
    assert "MIT" in (FOLDER / "uPlot.LICENSE").read_text()


def test_the_state_has_the_trees_of_the_workers_and_the_figures() -> None:
    async def scenario() -> None:
        async with running_system() as system:
            system.prefill[0].tree = described_tree(NODES)
            await system.chat("planner", stream=True)
            answer = await system.get("/ui/state")
            assert answer.headers["cache-control"] == "no-store"
            state = answer.json()
            assert state["version"] == 1 and state["router"]["models"] == ["planner", "coder"]
            base, planner, _ = state["workers"]
            assert base["tree"] == described_tree(NODES) and base["problem"] is None
            assert "info" not in base and base["status"] == "ready"
            assert planner["tree"] is None and "run the same" in planner["problem"]
            figures = state["figures"]["modules"]["planner"]
            assert (figures["calls"], figures["hit_ratio"], figures["cross_model_ratio"]) == (1, 0.8, 0.4)
            assert figures["ttft_ms_p50"] > 0

    run(scenario())


def test_who_waits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running_system() as system:
            monkeypatch.setattr(system.router.dispatcher.gate, "counts", lambda: {"coder": 3})
            assert (await system.get("/ui/state")).json()["queue"] == {"coder": 3}

    run(scenario())


def test_however_many_look_the_workers_are_asked_once_and_while_nobody_looks_never() -> None:
    async def scenario() -> None:
        async with running_system() as system:
            worker = system.prefill[0]
            worker.tree = described_tree(NODES)
            assert worker.tree_asked == []
            answers = await asyncio.gather(*(system.get("/ui/state") for _ in range(20)))
            assert len({answer.body for answer in answers}) == 1
            assert worker.tree_asked == ["limit=500"]
            system.router.board._asked_s -= board.FRESH_S
            await system.get("/ui/state")
            assert len(worker.tree_asked) == 2

    run(scenario())


def test_one_worker_that_hangs_lies_or_is_gone_leaves_the_others_shown() -> None:
    async def scenario() -> None:
        async with running_system(prefill=5, decode={"planner": 1}) as system:
            good, slow, huge, broken, liar = system.prefill
            good.tree = liar.tree = huge.tree = described_tree(NODES)
            slow.tree_behave, huge.tree_behave, broken.tree_behave = "hang", "huge", "broken"
            liar.tree = b'{"version": 1, "nodes": "<script>"}'
            await system.decode["planner"][0].stop()
            workers: dict[str, Any] = {w["url"]: w for w in (await system.get("/ui/state")).json()["workers"]}
            assert workers[good.url]["tree"]["nodes"]
            says = {
                name: workers[worker.url]["problem"]
                for name, worker in zip(
                    ("slow", "huge", "broken", "liar", "gone"),
                    (slow, huge, broken, liar, system.decode["planner"][0]),
                    strict=True,
                )
            }
            assert (
                "does not answer" in says["slow"]
                and "bytes" in says["huge"]
                and "503" in says["broken"]
                and "No picture." in says["broken"]
            )
            assert "cannot be read" in says["liar"] and says["gone"]
            assert all(workers[w.url]["tree"] is None for w in (slow, huge, broken, liar))

    run(scenario())


def test_a_client_that_leaves_takes_nobodys_answer_along() -> None:
    async def scenario() -> None:
        async with running_system() as system:
            system.prefill[0].tree_behave = "hang"
            first = asyncio.create_task(system.get("/ui/state"))
            await asyncio.sleep(0.05)
            second = asyncio.create_task(system.get("/ui/state"))
            await asyncio.sleep(0.02)
            first.cancel()
            assert (await second).json()["workers"][0]["problem"]

    run(scenario())
