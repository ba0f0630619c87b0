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
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

from sglang_hicache.config import LogConfig

#: Ids that a log call may pass in `extra`: request, op, command, epoch of an attachment, plan number.
ID_FIELDS = ("rid", "op", "command", "epoch", "plan")

REDACTED = "***"

#: Names of settings whose value is nobody's business ("access_key", "password", "api-token", "apikey" ...).
_SECRET_NAME = re.compile(
    r"(^|[_-]|(?<=[a-z\d])(?=[A-Z]))"
    r"(?i:(api|access|account|admin|auth|client|encryption|master|private|secret|session|shared|signing)*"
    r"(key|secret|pass?wor[dt]|passwd|passphrase|passcode|pass|pwd|pw|token|credential|authorization|cookie|signature)s?)"
    r"($|[_-]|(?=[A-Z]))"
)

#: Names of variables keep no order (PGPASSWORD, REDISCLI_AUTH), and one that is hidden for nothing costs little.
_SECRET_VARIABLE = re.compile(r"(?i)pass|pwd|secret|token|key|cred|auth|cookie|signature|connection|dsn")

#: Names under which a number counts tokens ("prefetch_timeout_per_ki_token") and opens nothing.
_COUNTS_TOKENS = re.compile(r"(?i)tokens$|(?<!api)(?<!access)(?<!auth)(?<!secret)(?<!session)[_-]token$")

#: A text that each rank fills in for itself (`storage/placeholders.py`) says where a secret is, and not what it is.
_FILLED_IN = re.compile(r"\$\{[\w.]+\}")

#: User and password of a URL, up to the last @ before its path: a password may hold one.  One with a bare slash makes
#: no URL, and is in the complaint about it; a number behind the colon is a port, and what follows is a path.
_URL_LOGIN = re.compile(r"(?<=://)(?:[^/\s\"']+|[^/:\s\"'\[]*:(?!\d+/)[^\s\"']{1,500})(?=@)")

#: The same without a scheme, as people write it where host:port is asked for.
_BARE_LOGIN = re.compile(
    r"(?<![^\s\"',;=(\[])[^\s\"',;=()\[\]/:@]{0,100}:[^\s\"'/@]{1,500}"
    r"(?=@(?:\[[\w:.]{2,45}\]|[\w.-]{1,260}):\d)"
)

#: Secrets among the parameters of a URL ("?password=...") and the parts of a connection string (";AccountKey=...").
_URL_SECRET = re.compile(
    r"(?i)(?<=[?&;])((?:[\w-]{0,40}[_-])?(?:api|access|account|auth|client|secret|shared)?"
    r"(?:key|secret|password|passwd|pwd|token|credential|signature|sig)=)[^&;\s\"']+"
)

#: A text shorter than this is not searched for in the log: replacing every "a" hides more than the secret.
_SHORTEST_SECRET = 4

#: Learned secrets that are remembered: every attach may bring new ones, and the log must not slow down for ever.
_MOST_SECRETS = 1000

#: What could end a line of the log, or steer the terminal that shows it.
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def redacted(value: Any, name: str = "") -> Any:
    """A copy of a JSON-like value in which everything under a secret's name, and logins in URLs, are replaced.

    Booleans stay whatever they are called, and so do numbers of tokens: `prefetch_timeout_per_ki_token` is no secret.
    """
    if isinstance(value, Mapping):
        return {key: redacted(item, _inherited(name, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item, name) for item in value]
    if _is_secret(value, name):
        return REDACTED
    return without_logins(value) if isinstance(value, str) else value


def secrets_in(value: Any, name: str = "") -> list[str]:
    """What `redacted` would replace because of its name, as it would stand in a text."""
    if isinstance(value, Mapping):
        return [secret for key, item in value.items() for secret in secrets_in(item, _inherited(name, str(key)))]
    if isinstance(value, (list, tuple)):
        return [secret for item in value for secret in secrets_in(item, name)]
    return [str(value)] if _is_secret(value, name) else []


def without_logins(text: str) -> str:
    """A text without the secrets that show by their form: in URLs and connection strings."""
    return _URL_SECRET.sub(rf"\g<1>{REDACTED}", _BARE_LOGIN.sub(REDACTED, _URL_LOGIN.sub(REDACTED, text)))


def _inherited(parent: str, name: str) -> str:
    """Below a secret's name everything is secret: {"credentials": {"user": ..., "pin": ...}}."""
    return parent if _SECRET_NAME.search(parent) else name


def _is_secret(value: Any, name: str) -> bool:
    if value is None or value == "" or isinstance(value, bool) or not _SECRET_NAME.search(name):
        return False
    if isinstance(value, str) and _FILLED_IN.fullmatch(value):
        return False
    return isinstance(value, str) or not _COUNTS_TOKENS.search(name)


class Redaction:
    """Takes secrets out of finished texts, wherever they came from (an exception, a library's message)."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        #: Those that no attach may crowd out, and the latest of those that it brings.
        self._own: dict[str, None] = {}
        self._secrets: dict[str, None] = {}
        self._known: re.Pattern[str] | None = None
        self._lock = threading.Lock()
        self.learn(secrets)

    def learn(self, secrets: Iterable[str], *, for_ever: bool = False) -> None:
        """From now on these are taken out as well.  Any thread; the oldest of very many are forgotten."""
        with self._lock:
            self._learn(secrets, for_ever)

    def _learn(self, secrets: Iterable[str], for_ever: bool) -> None:
        known = self._own if for_ever else self._own | self._secrets
        fresh = [text for text in secrets if len(text) >= _SHORTEST_SECRET and text not in known]
        if not fresh:
            return
        if for_ever:
            self._own |= dict.fromkeys(fresh)
        else:
            self._secrets = dict.fromkeys([*self._secrets, *fresh][-_MOST_SECRETS:])
        forms = {form for text in self._own | self._secrets for form in _written_forms(text)}
        longest_first = sorted(forms, key=len, reverse=True)
        # A number is replaced where it stands alone, not inside every time stamp.
        patterns = [rf"(?<!\d){text}(?!\d)" if text.isdecimal() else re.escape(text) for text in longest_first]
        self._known = re.compile("|".join(patterns))

    def __call__(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        return without_logins(text)


def _written_forms(text: str) -> set[str]:
    """How a text may stand in a message: plain, in a repr, in JSON, in a URL."""
    return {text, repr(text)[1:-1], json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], quote(text, "")}


#: The secrets of this process: those of its configuration, and of every config that was attached later.
_of_this_process = Redaction()


def learn_secrets(extra_config_json: str | None) -> None:
    """Call it where an extra config enters a process: from then on neither log nor answer shows its secrets."""
    try:
        config = json.loads(extra_config_json or "{}")
    except (ValueError, RecursionError):
        return  # whoever uses it refuses it
    _of_this_process.learn(secrets_in(config))


def learn_variables(environment: Mapping[str, str]) -> None:
    """The same for variables that have found their way into a config."""
    _of_this_process.learn(text for name, text in environment.items() if _SECRET_VARIABLE.search(name))


def without_secrets(text: str) -> str:
    """The text as it may leave this process."""
    return _of_this_process(text)


def report_uncaught() -> None:
    """Errors that end a thread or the process go to the log as well, and so past the redaction.  Process edges only."""

    def of_process(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            logging.getLogger(__name__).critical("an error ends this process", exc_info=error)

    def of_thread(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "?"
        logging.getLogger(__name__).critical("an error ends the thread %s", name, exc_info=args.exc_value)

    sys.excepthook = of_process
    threading.excepthook = of_thread


def _one_line(text: str) -> str:
    """Control characters become visible: a request id with a newline must not forge a line."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


class _Formatter(logging.Formatter, ABC):
    """Common to both forms: who speaks, the ids, and the redaction of everything that a caller chose."""

    def __init__(self, speaker: str, redact: Redaction) -> None:
        super().__init__()
        self._speaker = speaker
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        ids = {name: self._id(vars(record)[name]) for name in ID_FIELDS if name in vars(record)}
        trace = self._redact(self.formatException(record.exc_info)) if record.exc_info else ""
        return self.line(record, self._redact(record.getMessage()), trace, ids)

    def _id(self, value: Any) -> Any:
        return self._redact(value) if isinstance(value, str) else value

    @abstractmethod
    def line(self, record: logging.LogRecord, message: str, trace: str, ids: dict[str, Any]) -> str:
        """The text of one record, all of its parts redacted."""


class TextFormatter(_Formatter):
    """`12:34:56.789 INFO [scheduler rank 1] message rid=7`; the lines of a traceback are indented."""

    def line(self, record: logging.LogRecord, message: str, trace: str, ids: dict[str, Any]) -> str:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        tail = "".join(f" {name}={_one_line(str(value))}" for name, value in ids.items())
        head = f"{clock}.{int(record.msecs):03d} {record.levelname} [{self._speaker}] {_one_line(message)}{tail}"
        return "\n  ".join([head, *map(_one_line, trace.splitlines())])


class JsonFormatter(_Formatter):
    """One JSON object per line, in ASCII."""

    def line(self, record: logging.LogRecord, message: str, trace: str, ids: dict[str, Any]) -> str:
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._speaker,
            "logger": record.name,
            "message": f"{message}\n{trace}" if trace else message,
            **ids,
        }
        return json.dumps(entry, default=str)


def start_logging(speaker: str, config: LogConfig, secrets: Iterable[str] = ()) -> None:
    """Send this process's log to stderr; `speaker` is its role and rank, as `ps` shows them."""
    _of_this_process.learn(secrets, for_ever=True)
    formatter_class = JsonFormatter if config.format == "json" else TextFormatter
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter_class(speaker, _of_this_process))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(config.level.upper())


#: Names among a backend's stats that say how much there is now, and may fall; all others only grow.
LEVELS = frozenset({
    "away", "away_stores", "foreign_files", "free_bytes",
    "hidden_pages", "max_bytes", "other_namespace_pages", "used_bytes", "used_pages",
})  # fmt: skip

#: What stands before the names of one store inside another.
INSIDE = re.compile(r"(tier|copy)([0-9]+)_")


def is_level(name: str) -> bool:
    """Is it one of them, also of a store inside another?"""
    return INSIDE.sub("", name, count=1) in LEVELS


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


class SharedCounters(Counters):
    """Counters that several threads change and read."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            super().add(name, amount)

    def set(self, name: str, value: int) -> None:
        with self._lock:
            super().set(name, value)

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return super().snapshot()
