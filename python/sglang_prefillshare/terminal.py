"""The terminal that we were started from, if there is one."""

from __future__ import annotations

import os


def has_terminal() -> bool:
    """Whether this process has a controlling terminal now. One that was hung up is gone."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
