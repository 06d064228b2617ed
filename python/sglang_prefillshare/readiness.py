"""Whether a worker or the router answers as one that can serve."""

from __future__ import annotations

import http.client
import json
from typing import Final

from sglang_prefillshare.plans import WorkerPlan
from sglang_prefillshare.protocol import WORKER_INFO_PATH

CANNOT_HAND_OVER: Final = "can hand no KV over: "
"""How the last answer of a worker begins that will never be ready, whatever it is given: it has said why."""

_ANSWER_BYTES: Final = 64 * 1024


def probe(plan: WorkerPlan) -> str:
    """`ready` if every path answers 200, else what the first that does not answered."""
    host = plan.url.removeprefix("http://").rpartition(":")[0].strip("[]")
    headers = {} if plan.api_key is None else {"Authorization": f"Bearer {plan.api_key}"}
    for path in plan.ready_paths:
        # SGLang's /health generates a token and takes a second at least, 20 s when the worker is stuck.
        connection = http.client.HTTPConnection(host, plan.port, timeout=25.0)
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            status, body = response.status, response.read(_ANSWER_BYTES).decode(errors="replace").strip()
        except ConnectionRefusedError:
            return "no answer yet"
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__} at {path}"
        finally:
            connection.close()
        if status != 200:
            return f"status {status} at {path}" + (f": {body[:200]}" if body else "")
        if path == WORKER_INFO_PATH and (reason := _handoff_failure(body)) is not None:
            return CANNOT_HAND_OVER + reason
    return "ready"


def _handoff_failure(description: str) -> str | None:
    try:
        described = json.loads(description)
    except ValueError:
        return None
    reason = described.get("handoff_failure") if isinstance(described, dict) else None
    return None if reason is None else str(reason)
