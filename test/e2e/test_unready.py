"""Workers that can hand nothing over: real ones, on a machine whose kernel closes their memory to each other."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sglang_prefillshare.environment import has_accelerator
from sglang_prefillshare.plans import Commands, WorkerPlan, plan_topology
from sglang_prefillshare.ports import PortBlocks
from sglang_prefillshare.process import SupervisedProcess
from sglang_prefillshare.readiness import CANNOT_HAND_OVER, probe
from test.support.models import sample_prompt
from test.support.servers import GRACE, greedy, topology

if TYPE_CHECKING:
    from test.e2e.conftest import Models

CLOSED_MEMORY = Path(__file__).parents[1] / "support" / "closed_memory"


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    """Status, and the JSON that came with it; (0, None) if nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text else None
    except OSError:
        return 0, None


@pytest.fixture(scope="module")
def closed(models: Models) -> Iterator[list[WorkerPlan]]:
    """A prefill and a decode worker whose memory is closed, both answering."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CLOSED_MEMORY), os.environ.get("PYTHONPATH", "")])}
    ports = PortBlocks()
    plans, _ = plan_topology(
        topology(models.base, {"planner": models.planner}),
        ports=ports,
        commands=Commands(),
        is_cpu_host=not has_accelerator(),
        environ=environ,
    )
    processes = [
        SupervisedProcess(
            plan.name, plan.command, env=plan.env, on_line=lambda _line: None, on_exit=lambda _status: None, grace=GRACE
        )
        for plan in plans
    ]
    try:
        deadline = time.monotonic() + 400.0
        for plan, process in zip(plans, processes, strict=True):
            while (answer := ask(f"{plan.url}/prefill_share"))[0] != 200:
                ended = process.status is not None or time.monotonic() > deadline
                assert not ended, (answer, "\n".join(process.tail(30)))
                time.sleep(0.5)
        yield plans
    finally:
        for process in processes:
            process.stop()
        for process in processes:
            process.wait(GRACE.total_s + 10.0)
        ports.release()


@pytest.mark.parametrize("place", [0, 1], ids=["prefill", "decode"])
def test_a_worker_that_cannot_hand_over_is_not_ready_and_says_why(closed: list[WorkerPlan], place: int) -> None:
    plan = closed[place]
    status, answer = ask(f"{plan.url}/health")
    assert status == 503 and answer["error"]["code"] == 503
    reason = answer["error"]["message"]
    assert "Permission denied" in reason and "--disaggregation-transfer-backend nixl" in reason
    assert ask(f"{plan.url}/prefill_share")[1]["handoff_failure"] == reason
    assert probe(plan) == CANNOT_HAND_OVER + reason  # of which `up` makes an end

    deadline = time.monotonic() + 60.0  # SGLang's warm-up, which hands nothing over, may still be running
    while (answer := ask(f"{plan.url}/generate", greedy(sample_prompt(20), 4)))[0] != 503:
        assert time.monotonic() < deadline, answer
        time.sleep(0.5)
    assert answer[1]["error"]["message"] == reason
