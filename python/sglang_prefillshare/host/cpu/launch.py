"""A worker's processes are forked from the one that has imported SGLang already, where no accelerator forbids it.

SGLang spawns them, for CUDA's sake, and each imports the same 6,000 modules again: more than half of the processor time
that a start takes.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any


def check_server_args(self: Any) -> None:
    """SGLang calls this in the process that is started, right after it asked for `spawn` and before any child.

    A fork copies the calling thread only. Another one may hold a lock that its copy would wait for, for ever: then
    nothing is changed, and so where OpenMP has threads of its own.
    """
    is_alone = threading.active_count() == 1 and os.environ.get("OMP_NUM_THREADS") == "1"
    if not is_alone or multiprocessing.get_start_method(allow_none=True) != "spawn":
        return
    from sglang_prefillshare.host.seams import install, platform_seams

    install(platform_seams())  # what a child loads before it looks for plugins, it has found here
    multiprocessing.set_start_method("fork", force=True)
