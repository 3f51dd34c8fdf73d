"""What this service says about itself: JSON log lines, each a sentence with an action and its context."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

#: The packages whose modules log; each module's logger bears its name.
PACKAGES = ("serve_app", "deployments", "benchmarks")

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then whatever `extra` carried."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # Ray puts fields of its own on every record, under private names.
        line |= {k: v for k, v in vars(record).items() if k not in _PLAIN and not k.startswith("_")}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: int = logging.INFO) -> None:
    """Send this service's log lines to standard error as JSON. Calling it again changes nothing."""
    for package in PACKAGES:
        top = logging.getLogger(package)
        if not top.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(JsonFormatter())
            top.addHandler(handler)
            top.setLevel(level)
