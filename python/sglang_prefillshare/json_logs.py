"""Logs for machines: one JSON object a line."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Mapping
from typing import Any


def line_of(fields: Mapping[str, Any]) -> str:
    """One line, whatever the texts hold."""
    return json.dumps(fields, ensure_ascii=True, default=str)


class JsonFormatter(logging.Formatter):
    """`time` (UTC), `level`, `logger`, `message`, and where there are any `exception` and `call`, a finished one."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": iso_time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if hasattr(record, "call"):
            fields["call"] = record.call
        return line_of(fields)


def iso_time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
