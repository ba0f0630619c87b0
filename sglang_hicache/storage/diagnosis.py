"""What is wrong with a store, in a word that has a page in `docs/runbooks/`, and in an operator's words.

Used by the storage process, where a backend's library throws whatever it likes, and by the rank for a process that
never got to say anything.  An error is known by what is behind it (the number of a system call, a class of the
library), then by what it says; the text that comes out holds the text that went in, because somebody will search for
it.  Pure.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

import msgspec

from sglang_hicache.errors import HiCacheError, StorageError, UserError
from sglang_hicache.storage.settings import BackendSettings

#: Why a store cannot be used, and what helps.
ADVICE = {
    "wrong_host": "check the host name or address in the extra config, and that this machine can reach it",
    "refused": "nothing answers there, or it does not want us: check the port, and that the store runs",
    "timeout": "the store is not reachable or too slow: check the network, a firewall, and the load of the store",
    "no_permission": "let the user of this server read and write there, and nobody else write",
    "no_space": "make room, or allow the store more; until then pages can be read, and none is written",
    "tls": "check the certificate, its authority and the host name in it, and whether the store speaks TLS at all",
    "wrong_password": "check user and password, or the access key, in the extra config",
    "wrong_key": "give the encryption key that the pages were made with, or another folder or prefix for this one",
    "foreign_format": "something else uses this place: give the store a folder, database or prefix of its own",
    "clock": "set the clocks of this machine and of the store",
    "read_only": "let this server write there, or mount the file system for writing",
    "not_found": "check the path or name in the extra config; what is in front of the last part of a path must exist",
    "missing_library": "install the library named above into the environment of this server, on every node",
    "bad_config": "correct the extra config",
    "contract": "the store does not keep what it is given, or answers what it may not: do not use it",
    "other": "look into the log of the storage process, and of the store",
}

#: How a process or an attachment came to its end; said by whoever saw it.
ENDS = (
    "hung", "killed", "crashed", "cancelled", "tripped_errors", "tripped_slow", "drain_timeout", "unreaped",
)  # fmt: skip

#: Why operations of a store that is attached stop short, beside codes above (`errors.STOP_CODES` has all).
STOPS = ("io", "corrupt", "defect", "miss", "other_key")

#: Every code that a `last_error` or a dry run may begin with.
CODES = (*ADVICE, *ENDS, *STOPS)

_BY_ERRNO = {
    **dict.fromkeys((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EHOSTDOWN), "wrong_host"),
    **dict.fromkeys((errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE), "refused"),
    errno.ETIMEDOUT: "timeout",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "no_permission"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "no_space"),
    errno.EROFS: "read_only",
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "not_found"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "bad_config"),
}

#: By name of a class or of one above it: the libraries themselves are not here.
_BY_CLASS = {
    "gaierror": "wrong_host",
    "SSLError": "tls",
    "TimeoutError": "timeout",
    "ModuleNotFoundError": "missing_library",
    "ImportError": "missing_library",
    "AuthenticationError": "wrong_password",
    "ReadOnlyError": "read_only",
}

#: What stores and our own checks say, where nothing better is known.  The first that is found counts.
_BY_WORDS = tuple((re.compile(words, re.IGNORECASE), code) for words, code in (
    (r"RequestTimeTooSkewed|clock skew|certificate is not yet valid", "clock"),
    (r"WRONGPASS|NOAUTH|InvalidAccessKeyId|SignatureDoesNotMatch|(invalid|wrong) password", "wrong_password"),
    (r"\bother_key\b|made with another encryption key", "wrong_key"),
    (r"foreign header|header of another page|another format", "foreign_format"),
    (r"\bREADONLY\b|read only replica|read-only file system", "read_only"),
    (r"\bno_space\b|no space left|quota exceeded", "no_space"),
    (r"permission denied|AccessDenied|\bNOPERM\b|has no permissions", "no_permission"),
    (r"certificate|\btls\b|\bssl\b", "tls"),
    (r"timed out", "timeout"),
    (r"connection refused", "refused"),
    (r"NoSuchBucket|no such file", "not_found"),
    (r"set mode to cluster", "bad_config"),
    (r"\b(contract|corrupt|miss)\b|self-test: the backend (found|does not|still|deletes|read back)", "contract"),
))  # fmt: skip

_ERRNO = re.compile(r"\[Errno (\d+)\]")


class Diagnosis(msgspec.Struct, frozen=True):
    """Why a store cannot be used."""

    #: One of `CODES`.
    code: str
    #: What was tried, what was answered, and what to do.
    text: str

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


def diagnose(error: BaseException, backend: str, settings: BackendSettings | None = None) -> Diagnosis:
    """What is behind an error that kept a store from being used.  `settings`: as far as they could be read."""
    code = _code_of(error)
    said = str(error) if isinstance(error, HiCacheError) else f"{type(error).__name__}: {error}"
    place = settings.place() if settings is not None else ""
    where = f" at {place}" if place and place not in said else ""
    tried = said if isinstance(error, UserError) else f"{said} ({backend} store{where})"
    return Diagnosis(code, f"{tried}; {ADVICE[code]}")


def _code_of(error: BaseException) -> str:
    """What lies deepest knows best: the error that a library met, and not what it made of it."""
    if isinstance(error, UserError):
        return "bad_config"
    if isinstance(error, StorageError) and error.code:
        return error.code
    chain = list(_chain(error))
    for link in reversed(chain):
        found = _known(link)
        if found:
            return found
    text = " <- ".join(map(str, chain))
    for words, code in _BY_WORDS:
        if words.search(text):
            return code
    return "other"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what was behind it."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _known(error: BaseException) -> str:
    """By class or number; "" if neither says anything."""
    text = str(error)
    if any(words.search(text) for words, code in _BY_WORDS if code == "clock"):
        return "clock"  # a certificate of tomorrow is an error of TLS, and of somebody's clock
    for found in type(error).__mro__:
        if found.__name__ in _BY_CLASS:
            return _BY_CLASS[found.__name__]
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return _BY_ERRNO[error.errno]
    if isinstance(error, StorageError) and error.reason in ("no_space", "contract"):
        return error.reason
    told = _ERRNO.search(text)
    return _BY_ERRNO.get(int(told[1]), "") if told else ""
