"""The form of the audit log: lines that are chained under a key, and how a chain is verified.

Used by the process that writes a log (`audit.py`) and, for `verify`, by whoever reads one.  Nothing here writes.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sglang_hicache.errors import UserError

KEY_BYTES = 32
_MAC_NAME = b',"mac":"'
_MAC_END = b'"}'
_MAC = re.compile(r"[0-9a-f]{64}")

#: How the first entry begins, which a crash may have torn.
FIRST = b'{"number":1,'

#: No log has as many entries, and no entry is nearly as long: whoever may write into a log may write anything.
MOST_ENTRIES = 10**12
_LONGEST_LINE_BYTES = 1 << 20

# Without O_NONBLOCK a named pipe in the log's place would hold whoever looks into it.
_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Keys:
    """What the key file of a log holds."""

    mac: bytes
    #: Makes fingerprints of admin keys worthless to whoever has only the log.
    salt: bytes

    def sign(self, content: bytes) -> str:
        """HMAC of something, in hexadecimal digits."""
        return hmac.new(self.mac, content, hashlib.sha256).hexdigest()

    def fits(self, entry: Entry) -> bool:
        """Has nobody changed it who did not have the key?"""
        return hmac.compare_digest(self.sign(entry.content), entry.mac)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line that can be read."""

    number: int
    #: HMAC of the line before.
    previous: str
    mac: str
    #: The line without its HMAC.
    content: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """The newest entry.  As text, it is what `verify` takes as `expect`."""

    number: int
    mac: str

    def __str__(self) -> str:
        return f"{self.number}-{self.mac}"


def chained(keys: Keys, head: Head, entries: list[dict[str, Any]]) -> tuple[list[Head], bytes]:
    """The entries as lines that continue after `head`, and the head after each of them."""
    heads: list[Head] = []
    lines: list[bytes] = []
    for fields in entries:
        numbered = {"number": head.number + 1, **fields, "previous": head.mac}
        # In ASCII, so that nothing in it ends a line or steers a terminal.
        content = json.dumps(numbered, separators=(",", ":"), default=str).encode()
        head = Head(head.number + 1, keys.sign(content))
        heads.append(head)
        lines.append(content[:-1] + _MAC_NAME + head.mac.encode() + _MAC_END + b"\n")
    return heads, b"".join(lines)


def parse_line(line: bytes) -> Entry | None:
    content, _, rest = line.rstrip(b"\n").rpartition(_MAC_NAME)
    mac = rest.removesuffix(_MAC_END).decode("ascii", "replace")
    content += b"}"
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not rest.endswith(_MAC_END) or not _MAC.fullmatch(mac):
        return None
    number, previous = fields.get("number"), fields.get("previous")
    if type(number) is not int or not isinstance(previous, str) or not 0 < number <= MOST_ENTRIES:
        return None
    return Entry(number, previous, mac, content)


def genesis(keys: Keys) -> str:
    """What the first entry follows: a log that begins with another key begins elsewhere."""
    return keys.sign(b"an audit log begins")


def key_path(path: Path) -> Path:
    return path.with_name(path.name + ".key")


def parse_keys(content: bytes) -> Keys:
    try:
        fields = json.loads(content)
        keys = Keys(bytes.fromhex(fields["mac"]), bytes.fromhex(fields["salt"]))
    except (ValueError, KeyError, TypeError):
        keys = None
    if keys is None or len(keys.mac) != KEY_BYTES:
        raise UserError("its key file holds no key")
    return keys


def lines_of(path: str) -> Iterator[bytes]:
    """The lines of a log, each with its end.  OSError.  What is longer than any entry comes in several pieces."""
    with _opened(path) as file:
        while line := file.readline(_LONGEST_LINE_BYTES):
            yield line


def flaw_of_mode(mode: int) -> str:
    """What is wrong with the permissions of a log."""
    return f"can be written by others (mode {stat.S_IMODE(mode):04o})" if mode & 0o022 else ""


def verify(path: str, expect: str | None = None) -> list[str]:
    """What is wrong with a log, in words, in the order of its lines; [] when nothing is.

    `expect` is a head that was told earlier: without it, lines that were cut off at the end are not missed.
    UserError: it is no head, or there is no key.
    """
    head = _parse_head(expect) if expect else None
    try:
        with _opened(key_path(Path(path))) as key_file:
            keys, mode = parse_keys(key_file.read(1024)), stat.S_IMODE(os.fstat(key_file.fileno()).st_mode)
        found = list(_complaints(keys, lines_of(path), head))
        if flaw := flaw_of_mode(os.stat(path).st_mode):
            found.append(f"the log {flaw}")
    except OSError as error:
        return [f"{error.filename} cannot be read: {error.strerror}"]
    if mode & 0o077:
        found.append(f"its key file has mode {mode:04o}: whoever can read it can write any log")
    return found


def _opened(path: str | Path) -> BinaryIO:
    """A plain file.  OSError."""
    descriptor = os.open(path, _READ_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def _complaints(keys: Keys, lines: Iterable[bytes], expect: Head | None) -> Iterator[str]:
    expected, before, is_met = 1, genesis(keys), expect is not None and expect.number == 0
    #: Lines since the last entry that were entries once, or never.
    strange = 0
    for place, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            yield f"line {place} is cut off in the middle" if len(line) < _LONGEST_LINE_BYTES else (
                f"line {place} is longer than any entry; what comes after it was not looked at"
            )
            break
        entry = parse_line(line)
        if entry is None:
            yield f"line {place} is no entry of an audit log"
            strange += 1
            continue
        if not keys.fits(entry):
            yield f"line {place} (entry {entry.number}) was changed: it does not fit its HMAC"
        if entry.number > expected + strange:
            yield f"before line {place}: {_entries(expected, entry.number - 1)} missing"
        elif entry.number < expected:
            yield f"line {place}: entry {entry.number} is out of order"
        elif not strange and entry.previous != before:
            yield f"line {place} (entry {entry.number}) does not follow the line before it: one of them was replaced"
        if expect is not None and entry.number == expect.number:
            is_met = entry.mac == expect.mac
            if not is_met:
                yield f"line {place}: entry {entry.number} is not the one that was expected"
                is_met = True
        expected, before, strange = entry.number + 1, entry.mac, 0
    if expect is not None and not is_met:
        if expect.number >= expected:
            yield f"the log ends with entry {expected - 1}: {_entries(expected, expect.number)} missing"
        else:
            yield f"entry {expect.number}, which was expected, is missing"


def _entries(first: int, last: int) -> str:
    return f"entry {first} is" if first == last else f"entries {first} to {last} are"


def _parse_head(text: str) -> Head:
    number, _, mac = text.strip().partition("-")
    if not number.isdecimal() or not _MAC.fullmatch(mac):
        raise UserError(f"{text!r} is no head of an audit log: a number, a dash, and 64 hexadecimal digits")
    return Head(int(number), mac)
