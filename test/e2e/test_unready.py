"""Workers that can hand nothing over: real ones, on a machine whose kernel closes their memory to each other."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sglang_prefillshare.deployment import Deployment, PortBlocks, plan_topology
from sglang_prefillshare.process import SupervisedProcess
from test.support.models import Models
from test.support.servers import GRACE, greedy, topology

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
