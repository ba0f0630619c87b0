"""The audit log: what is written can be verified, what was changed is found, and a sick disk stops nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_hicache import audit
from sglang_hicache.audit import AuditLog, verify
from sglang_hicache.errors import UserError

PATIENCE_S = 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


class Begin:
    """Opens the log, as one server after the other does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log: AuditLog | None = None

    def __call__(self) -> AuditLog:
        self.end()
        self._log = AuditLog(str(self._path))
        return self._log

    def end(self) -> None:
        if self._log is not None:
            self._log.close_blocking()
        self._log = None


@pytest.fixture
def begin(path: Path) -> Iterator[Begin]:
    found = Begin(path)
    yield found
    found.end()


def write(log: AuditLog, *names: str) -> str:
    """Entries, on the disk; the head after the last."""
    futures = [log.append({"event": "test", "what": name}) for name in names]
    return [future.result(PATIENCE_S) for future in futures][-1]


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_entries_are_chained_and_verified(path: Path, begin: Begin) -> None:
    log = begin()
    assert verify(str(path), log.head) == []
    head = write(log, "a", "ö\n\x1b[31m")
    assert head == log.head and head.startswith("2-")
    assert verify(str(path)) == verify(str(path), head) == []
    first, second = (json.loads(line) for line in lines(path))
    assert (first["number"], first["what"], second["number"]) == (1, "a", 2)
    assert second["what"] == "ö\n\x1b[31m" and second["previous"] == first["mac"]
    assert first["time"].endswith("Z") and path.read_bytes().isascii() and path.read_bytes().count(b"\n") == 2
    assert log.error == ""


def test_files_are_private(path: Path, begin: Begin) -> None:
    write(begin(), "a")
    key = path.with_name("audit.jsonl.key")
    assert (path.stat().st_mode & 0o777, key.stat().st_mode & 0o777) == (0o600, 0o600)
    assert sorted(item.name for item in path.parent.iterdir()) == ["audit.jsonl", "audit.jsonl.key"]


def test_the_next_server_continues(path: Path, begin: Begin) -> None:
    early = write(begin(), "a", "b")
    late = write(begin(), "c")
    assert late.startswith("3-") and len(lines(path)) == 3
    assert verify(str(path), early) == verify(str(path), late) == []


def edited(content: list[bytes]) -> list[bytes]:
    return [content[0], content[1].replace(b'"what":"b"', b'"what":"x"'), *content[2:]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edited, ["line 2 (entry 2) was changed"]),
        (lambda found: [found[0].replace(b'"}', b'" }'), *found[1:]], ["line 1"]),
        (lambda found: [*found[:1], *found[2:]], ["before line 2: entry 2 is missing"]),
        (lambda found: found[2:], ["before line 1: entries 1 to 2 are missing"]),
        (lambda found: [found[1], found[0], *found[2:]], ["entry 1 is missing", "entry 1 is out of order"]),
        (lambda found: [*found[:2], found[1], *found[2:]], ["line 3: entry 2 is out of order"]),
        (lambda found: [*found[:2], b"# nothing\n", *found[3:]], ["line 3 is no entry"]),
        (lambda found: [*found[:2], b"\n", *found[2:]], ["line 3 is no entry"]),
        (lambda found: [*found[:3], found[3][:-9]], ["line 4 is cut off in the middle"]),
        (lambda found: [*found[:3], found[3][:-1]], ["line 4 is cut off in the middle"]),
    ],
)
def test_damage_is_found(
    path: Path, begin: Begin, damage: Callable[[list[bytes]], list[bytes]], words: list[str]
) -> None:
    write(begin(), "a", "b", "c", "d")
    path.write_bytes(b"".join(damage(lines(path))))
    complaints = verify(str(path))
    assert all(any(word in complaint for complaint in complaints) for word in words), complaints


def test_a_line_of_another_history_is_found(path: Path, begin: Begin) -> None:
    """The same key, the same number, another entry: only the link shows that it was never here."""
    write(begin(), "a")
    copy = path.read_bytes()
    write(begin(), "b", "c")
    real = lines(path)
    begin.end()
    path.write_bytes(copy)
    write(begin(), "x")
    path.write_bytes(b"".join([real[0], lines(path)[1], real[2]]))
    assert verify(str(path)) == ["line 3 (entry 3) does not follow the line before it: one of them was replaced"]


def test_a_tail_that_was_cut_off_is_found_by_a_head_only(path: Path, begin: Begin) -> None:
    head = write(begin(), "a", "b", "c")
    path.write_bytes(b"".join(lines(path)[:1]))
    assert verify(str(path)) == []
    assert verify(str(path), head) == ["the log ends with entry 1: entries 2 to 3 are missing"]
    path.write_bytes(b"")
    assert verify(str(path), head) == ["the log ends with entry 0: entries 1 to 3 are missing"]


def test_another_log_in_its_place_is_found_by_a_head(path: Path, begin: Begin) -> None:
    head = write(begin(), "a")
    for file in (path, path.with_name("audit.jsonl.key")):
        file.unlink()
    write(begin(), "b", "c")
    assert verify(str(path)) == []
    assert verify(str(path), head) == ["line 1: entry 1 is not the one that was expected"]


def test_what_cannot_be_verified(path: Path, begin: Begin) -> None:
    with pytest.raises(UserError, match="is no head"):
        verify(str(path), "17")
    assert "cannot be read" in verify(str(path))[0]
    write(begin(), "a")
    key = path.with_name("audit.jsonl.key")
    key.chmod(0o644)
    assert verify(str(path)) == ["its key file has mode 0644: whoever can read it can write any log"]
    key.write_text("{}")
    with pytest.raises(UserError, match="holds no key"):
        verify(str(path))


def test_what_is_no_log_is_not_read_for_ever(path: Path, begin: Begin) -> None:
    write(begin(), "a")
    begin.end()
    with path.open("ab") as file:
        file.write(b"x" * (3 << 20))
    assert verify(str(path)) == ["line 2 is longer than any entry; what comes after it was not looked at"]
    path.unlink()
    os.mkfifo(path)
    assert verify(str(path)) == [f"{path} cannot be read: it is no regular file"]
    key = path.with_name("audit.jsonl.key")
    key.unlink()
    os.mkfifo(key)
    assert verify(str(path)) == [f"{key} cannot be read: it is no regular file"]


def test_a_log_that_others_can_write_is_told(path: Path, begin: Begin) -> None:
    write(begin(), "a")
    begin.end()
    path.chmod(0o662)
    assert verify(str(path)) == ["the log can be written by others (mode 0662)"]
    assert "can be written by others (mode 0662)" in begin().error


# ------------------------------------------------------------------------------------------- what a start finds


def test_a_line_that_a_crash_has_torn_is_taken_out_and_told(
    path: Path, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    write(begin(), "a", "b")
    begin.end()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"number":3,"ti')
    log = begin()
    assert path.read_bytes() == whole
    assert "15 bytes were taken out" in log.error and "15 bytes were taken out" in caplog.text
    assert verify(str(path), write(log, "c")) == []
    assert begin().error == "", "told once: it is whole again"


def test_a_first_line_that_a_crash_has_torn(path: Path, begin: Begin) -> None:
    begin()
    begin.end()
    path.write_bytes(b'{"number":1,"ti')
    assert verify(str(path), write(begin(), "a")) == []


@pytest.mark.parametrize("content", [b"root:x:0:0\n", b'{"number":1}\n', b"\x00" * 3000, b"torn", b"\n"])
def test_another_file_is_not_touched(path: Path, begin: Begin, content: bytes) -> None:
    begin()
    begin.end()
    path.write_bytes(content)
    with pytest.raises(UserError, match="no audit log; move it away"):
        begin()
    assert path.read_bytes() == content


def test_a_changed_end_is_told_at_once(path: Path, begin: Begin) -> None:
    write(begin(), "a", "b")
    begin.end()
    path.write_bytes(b"".join(edited(lines(path))) + b"rubbish\n")
    log = begin()
    assert "does not fit its HMAC" in log.error and "1 lines at its end" in log.error
    write(log, "c")
    assert len(verify(str(path))) == 2


@pytest.mark.parametrize("number", ["9" * 4300, "999999999999", "1000000000000", "-1", "0", "true", "1e3", "NaN"])
def test_a_number_that_no_entry_has_is_nothing_to_go_on_from(path: Path, begin: Begin, number: str) -> None:
    write(begin(), "a")
    begin.end()
    with path.open("a") as file:
        file.write(f'{{"number":{number},"previous":"x","mac":"{"a" * 64}"}}\n')
    log = begin()
    assert "1 lines at its end" in log.error
    assert write(log, "b").startswith("2-") and write(log, "c").startswith("3-")
    assert verify(str(path))


def test_what_ends_a_start(path: Path, begin: Begin, tmp_path: Path) -> None:
    write(begin(), "a")
    with pytest.raises(UserError, match="another process"):
        AuditLog(str(path))
    begin.end()
    key = path.with_name("audit.jsonl.key")
    key.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        begin()
    key.unlink()
    with pytest.raises(UserError, match=r"key file .* is missing"):
        begin()
    for wrong in (tmp_path, tmp_path / "missing" / "audit.jsonl"):
        with pytest.raises(UserError, match="cannot be opened"):
            AuditLog(str(wrong))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no regular file"):
        AuditLog(str(tmp_path / "pipe"))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UserError, match="cannot be opened"):
        AuditLog(str(tmp_path / "link"))


def test_fingerprints_are_those_of_this_log(path: Path, tmp_path: Path, begin: Begin) -> None:
    log = begin()
    mark = log.fingerprint(b"admin-key")
    assert len(mark) == 8 and mark == log.fingerprint(b"admin-key") != log.fingerprint(b"other-key")
    assert begin().fingerprint(b"admin-key") == mark
    other = AuditLog(str(tmp_path / "other.jsonl"))
    assert other.fingerprint(b"admin-key") != mark, "a fingerprint that is the same everywhere can be looked up"
    other.close_blocking()


# ------------------------------------------------------------------------------------------------ a sick disk


class Disk:
    """Stands between the log and the kernel: full after so many bytes, until it is emptied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self._write = os.write
        monkeypatch.setattr(audit.os, "write", self.write)
        monkeypatch.setattr(audit, "RETRY_S", 0.01)

    def write(self, descriptor: int, content: bytes) -> int:
        if self.room is None:
            return self._write(descriptor, content)
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self._write(descriptor, content[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_loses_nothing_and_stops_nobody(
    path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, disk = begin(), Disk(monkeypatch)
    write(log, "a")
    disk.room = 50
    futures = [log.append({"what": name}) for name in "bc"]
    while "No space left" not in log.error or "2 entries wait" not in log.error:
        assert not futures[0].done()
    assert "No space left" in caplog.text
    disk.room = None
    assert verify(str(path), futures[1].result(PATIENCE_S)) == []
    assert [json.loads(line)["what"] for line in lines(path)] == ["a", "b", "c"]
    assert log.error == ""


def test_more_than_memory_takes_is_counted(
    path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, disk = begin(), Disk(monkeypatch)
    monkeypatch.setattr(audit, "MOST_WAITING", 2)
    disk.room = 0
    kept = [log.append({"what": name}) for name in "ab"]
    for name in "cd":
        with pytest.raises(OSError, match="takes no more"):
            log.append({"what": name}).result(PATIENCE_S)
    disk.room = None
    for future in kept:
        future.result(PATIENCE_S)
    begin()
    assert [json.loads(line)["what"] for line in lines(path)] == ["a", "b", "2 entries found no room in memory"]
    assert verify(str(path)) == []


def test_a_disk_that_is_full_to_the_end_is_told(
    path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, disk = begin(), Disk(monkeypatch)
    disk.room = 10
    log.append({"what": "a"})
    begin.end()
    assert "1 entries are lost" in caplog.text
    assert path.read_bytes() == b""


@pytest.mark.parametrize("how", ["removed", "moved", "replaced", "emptied", "shortened", "extended"])
def test_a_log_that_somebody_changes_is_told_and_goes_on(
    path: Path, begin: Begin, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    log = begin()
    write(log, "a", "b")
    match how:
        case "removed":
            path.unlink()
        case "moved":
            path.rename(path.with_name("audit.1"))
        case "replaced":
            path.with_name("new").write_bytes(b"no newline")
            path.with_name("new").rename(path)
        case "emptied":
            os.truncate(path, 0)
        case "shortened":
            os.truncate(path, path.stat().st_size - 9)
        case "extended":
            path.write_bytes(path.read_bytes() + b"x")
    write(log, "c", "d")
    assert log.error and log.error in caplog.text
    assert [json.loads(line)["what"] for line in lines(path)[-2:]] == ["c", "d"]
    assert verify(str(path))
    assert begin().error == ""


def test_a_log_that_cannot_come_back_is_told_once(
    path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = begin()
    write(log, "a")
    path.unlink()
    path.mkdir()
    tries, opened = threading.Semaphore(0), audit._open_blocking

    def opened_again(path: Path) -> int:
        tries.release()
        return opened(path)

    monkeypatch.setattr(audit, "_open_blocking", opened_again)
    monkeypatch.setattr(audit, "RETRY_S", 0.01)
    waiting = log.append({"event": "test", "what": "b"})
    assert all(tries.acquire(timeout=PATIENCE_S) for _ in range(20))
    assert log.error.count("was removed or replaced") == caplog.text.count("was removed or replaced") == 1
    path.rmdir()
    assert waiting.result(PATIENCE_S).startswith("2-")


def test_damage_has_an_end(path: Path, begin: Begin) -> None:
    log = begin()
    for number in range(100):
        with path.open("a") as file:
            file.write("x" * number + "\n")
        write(log, "a")
    assert 1000 < len(log.error) < 3000


def test_a_process_that_is_killed_leaves_a_log_that_continues(path: Path, begin: Begin) -> None:
    """1. A process writes without end and is killed in the middle. 2. The next one continues; the log is whole."""
    script = (
        "import sys; from sglang_hicache.audit import AuditLog; log = AuditLog(sys.argv[1])\n"
        "while True: log.append({'what': 'x' * 5000}).result(); print('.', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert verify(str(path), write(begin(), "next")) == []
    assert len(lines(path)) >= 4
