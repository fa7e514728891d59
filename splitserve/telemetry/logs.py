"""Structured logs: one line per event, its fields beside it, the request id among them wherever there is one.

A thin face on the standard library's logging, so that other libraries' records come out the same way. It is not for
numbers that someone will plot: those are in `metrics`.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TextIO

_OURS = "splitserve"
_FIELDS = "splitserve_fields"
_about: ContextVar[Mapping[str, object]] = ContextVar("about", default=MappingProxyType({}))


@contextmanager
def about(**fields: object) -> Iterator[None]:
    """Every line logged within, also by the tasks and threads begun there, has these fields too."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


class Logger:
    """`Logger("router").info("worker joined", worker="p0")`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{_OURS}.{name}")

    @property
    def debugs(self) -> bool:
        """Whether debug lines are wanted: those that many would be worked out for nothing."""
        return self._logger.isEnabledFor(logging.DEBUG)

    def debug(self, event: str, **fields: object) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._log(logging.WARNING, event, fields)

    def exception(self, event: str, error: BaseException, **fields: object) -> None:
        """With the traceback: for what is our own mistake."""
        self._logger.error(event, extra={_FIELDS: fields}, exc_info=error)

    def _log(self, level: int, event: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={_FIELDS: fields})


def configure(
    *, as_json: bool = False, level: int = logging.INFO, debug: bool = False, stream: TextIO | None = None
) -> None:
    """Sends every record of this process to `stream` (default: stderr), replacing what was there; with `debug` those of
    splitserve's own loggers whatever their level."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonLines() if as_json else KeyValueLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger(_OURS).setLevel(logging.DEBUG if debug else logging.NOTSET)


class JsonLines(logging.Formatter):
    """For programs: one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_entry(self, record), default=str, ensure_ascii=False)


class KeyValueLines(logging.Formatter):
    """For people: time, level, event, then key=value."""

    def format(self, record: logging.LogRecord) -> str:
        entry = _entry(self, record)
        head = f"{entry.pop('time')} {entry.pop('level'):<7} {entry.pop('logger')}: {entry.pop('event')}"
        trace = entry.pop("traceback", None)
        line = " ".join([head, *(f"{key}={_quoted(value)}" for key, value in entry.items())])
        return f"{line}\n{trace}" if trace else line


def _entry(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": record.getMessage(),
        **_about.get(),
        **getattr(record, _FIELDS, {}),
    }
    if record.exc_info:
        entry["traceback"] = formatter.formatException(record.exc_info)
    return entry


def _quoted(value: object) -> str:
    """Text stays as it is unless a space or a line break in it would end the field."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c.isspace() or c in '"=' for c in text) else text
