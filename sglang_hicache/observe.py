"""How a process tells what it does: the log, and counters.

Used by every process.  `start_logging` is called once, by the process edge; the rest of the code uses plain `logging`
and passes ids as `extra={"rid": ..., "op": ...}`, so that both forms of the log carry them as fields.
`Counters` belong to the one object (and thread) that made them.  Nothing here reads a clock for a decision.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from sglang_hicache.config import LogConfig

#: Ids that a log call may pass in `extra`: request, op, command, epoch of an attachment, plan number.
ID_FIELDS = ("rid", "op", "command", "epoch", "plan")

REDACTED = "***"

#: Names of settings whose text is nobody's business ("access_key", "password", "api-token", "apikey", "secretKey" ...).
_SECRET_NAME = re.compile(
    r"(^|[_-]|(?<=[a-z\d])(?=[A-Z]))"
    r"(?i:(api|access|auth|private|secret)?(key|secret|password|passwd|pwd|token|credential)s?)"
    r"($|[_-]|(?=[A-Z]))"
)

#: User and password of a URL.
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s\"']+(?=@)")

#: A text shorter than this is not searched for in the log: replacing every "a" hides more than the secret.
_SHORTEST_SECRET = 4


def redacted(value: Any, name: str = "") -> Any:
    """A copy of a JSON-like value in which texts under a secret's name, and logins in URLs, are replaced.

    Numbers and booleans stay whatever they are called: `prefetch_timeout_per_ki_token` is no secret.
    """
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return REDACTED if _SECRET_NAME.search(name) else _URL_LOGIN.sub(REDACTED, value)


def secrets_in(value: Any, name: str = "") -> list[str]:
    """The texts that `redacted` would replace because of their name."""
    if isinstance(value, Mapping):
        return [secret for key, item in value.items() for secret in secrets_in(item, str(key))]
    if isinstance(value, (list, tuple)):
        return [secret for item in value for secret in secrets_in(item, name)]
    return [value] if isinstance(value, str) and value and _SECRET_NAME.search(name) else []


class Redaction:
    """Takes secrets out of finished log lines, wherever they came from (an exception, a library's message)."""

    def __init__(self, secrets: Iterable[str]) -> None:
        texts = sorted({text for text in secrets if len(text) >= _SHORTEST_SECRET}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, texts))) if texts else None

    def __call__(self, line: str) -> str:
        if self._known is not None:
            line = self._known.sub(REDACTED, line)
        return _URL_LOGIN.sub(REDACTED, line)


class _Formatter(logging.Formatter):
    """Common to both forms: who speaks, the ids, and the redaction of the finished line."""

    def __init__(self, speaker: str, redact: Redaction) -> None:
        super().__init__()
        self._speaker = speaker
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        ids = {name: vars(record)[name] for name in ID_FIELDS if name in vars(record)}
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        return self._redact(self.line(record, message, ids))

    def line(self, record: logging.LogRecord, message: str, ids: dict[str, Any]) -> str:
        raise NotImplementedError


class TextFormatter(_Formatter):
    """`12:34:56.789 INFO [scheduler rank 1] message rid=7`."""

    def line(self, record: logging.LogRecord, message: str, ids: dict[str, Any]) -> str:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        tail = "".join(f" {name}={value}" for name, value in ids.items())
        return f"{clock}.{int(record.msecs):03d} {record.levelname} [{self._speaker}] {message}{tail}"


class JsonFormatter(_Formatter):
    """One JSON object per line."""

    def line(self, record: logging.LogRecord, message: str, ids: dict[str, Any]) -> str:
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._speaker,
            "logger": record.name,
            "message": message,
            **ids,
        }
        return json.dumps(entry, ensure_ascii=False, default=str)


def start_logging(speaker: str, config: LogConfig, secrets: Iterable[str] = ()) -> None:
    """Send this process's log to stderr; `speaker` is its role and rank, as `ps` shows them."""
    formatter_class = JsonFormatter if config.format == "json" else TextFormatter
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter_class(speaker, Redaction(secrets)))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(config.level.upper())


class Counters:
    """Named numbers that only one thread changes."""

    def __init__(self) -> None:
        self._values: dict[str, int] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Count something that happened."""
        self._values[name] = self._values.get(name, 0) + amount

    def set(self, name: str, value: int) -> None:
        """Say how much of something there is now."""
        self._values[name] = value

    def get(self, name: str) -> int:
        """The value, 0 before the first change."""
        return self._values.get(name, 0)

    def snapshot(self) -> dict[str, int]:
        """A copy, in order of names."""
        return dict(sorted(self._values.items()))
