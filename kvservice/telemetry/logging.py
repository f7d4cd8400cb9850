"""How log records are written: for people on a terminal, as JSON lines otherwise.

An event is a constant string; what varies goes in `extra`:

    logger.info("call_refused", extra={"reason": error.reason})

What holds for all that follows in a task, such as tenant and session, is bound once with `bind_log_fields`.

Knows nothing of the events. Nobody logs token text, documents or keys.
"""

from __future__ import annotations

import json as jsonlib
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


_BOUND: ContextVar[MappingProxyType[str, str]] = ContextVar("_BOUND", default=MappingProxyType({}))


def bind_log_fields(**fields: str) -> None:
    """Adds fields to every record of the current task from here on, and of the tasks that it starts."""
    _BOUND.set(MappingProxyType({**_BOUND.get(), **fields}))


def _add_bound_fields(record: logging.LogRecord) -> bool:
    for name, value in _BOUND.get().items():
        # What the call itself says goes first.
        vars(record).setdefault(name, value)
    return True


def event_fields(record: logging.LogRecord) -> dict[str, object]:
    """What the caller gave in `extra`. Libraries, Ray among them, put notes of their own into every record."""
    return {
        name: value for name, value in vars(record).items() if name not in _OWN_ATTRIBUTES and not name.startswith("_")
    }


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line; a field that JSON can't hold is written with `str`."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
            **event_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return jsonlib.dumps(line, default=str, ensure_ascii=False)


class HumanFormatter(logging.Formatter):
    """Time, level, event and `name=value` fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line; a traceback follows on lines of its own."""
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = "".join(f" {name}={value}" for name, value in event_fields(record).items())
        line = f"{clock} {record.levelname:<7} {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure_logging(level: str = "INFO", *, json: bool = False) -> None:
    """Sends the service's records to standard error; other libraries' from WARNING up.

    Called once, by the command that runs. A second call replaces the first.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_bound_fields)
    handler.setFormatter(JsonFormatter() if json else HumanFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, JsonFormatter | HumanFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("kvservice").setLevel(level)
