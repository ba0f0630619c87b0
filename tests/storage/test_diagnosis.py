"""Codes and words for operators: whatever a backend or a library throws says what was tried and what helps."""

from __future__ import annotations

import errno
import socket
import ssl

import pytest

from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.storage.diagnosis import ADVICE, CODES, ENDS, STOPS, Diagnosis, diagnose
from sglang_hicache.storage.settings import FileSettings


class AuthenticationError(Exception):
    """As libraries of network stores call theirs."""


def system(number: int, path: str | None = None) -> OSError:
    return OSError(number, "said the system", path)


def behind(front: Exception, cause: Exception) -> Exception:
    front.__cause__ = cause
    return front


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(-2, "Name or service not known"), "other"),
        (behind(StorageError("cannot connect"), socket.gaierror(-2, "unknown")), "wrong_host"),
        (system(errno.EHOSTUNREACH), "wrong_host"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "no"), "refused"),
        (TimeoutError("late"), "timeout"),
        (StorageError("the store timed out"), "timeout"),
        (system(errno.EACCES, "/x"), "no_permission"),
        (system(errno.ENOSPC), "no_space"),
        (StorageError("no room", "no_space"), "no_space"),
        (StorageError("could not write a page: no_space: the store may hold 1 MiB"), "no_space"),
        (behind(StorageError("cannot connect"), ssl.SSLError(1, "handshake failure")), "tls"),
        (ssl.SSLCertVerificationError("certificate is not yet valid"), "clock"),
        (StorageError("RequestTimeTooSkewed: 901 s"), "clock"),
        (AuthenticationError("no"), "wrong_password"),
        (StorageError("WRONGPASS invalid username-password pair"), "wrong_password"),
        (StorageError("could not read back a page: other_key: made with another encryption key"), "wrong_key"),
        (StorageError("could not read back a page: corrupt: foreign header"), "foreign_format"),
        (system(errno.EROFS), "read_only"),
        (StorageError("could not write: io: cannot write page x: [Errno 30] Read-only file system: '/x'"), "read_only"),
        (StorageError("READONLY You can't write against a read only replica."), "read_only"),
        (system(errno.ENOENT, "/x"), "not_found"),
        (ModuleNotFoundError("No module named 'redis'"), "missing_library"),
        (UserError("unknown extra config 'x'"), "bad_config"),
        (StorageError("answered None", "contract"), "contract"),
        (StorageError("self-test: the backend deletes nothing", "refused"), "contract"),
        (StorageError("self-test: the backend could not write (io: sabotaged write)", "refused"), "other"),
        (StorageError("it lies in /tmp, which everybody can write", "refused", "no_permission"), "no_permission"),
        (RuntimeError("what?"), "other"),
    ],
)
def test_code(error: Exception, code: str) -> None:
    found = diagnose(error, "redis")
    assert found.code == code, found
    assert str(error) in found.text, "somebody will search for what the system said"
    assert found.text.endswith(ADVICE[code])
    assert str(found) == f"{code}: {found.text}"


def test_an_error_of_a_library_says_its_kind_and_the_place() -> None:
    found = diagnose(TimeoutError("late"), "file", FileSettings(file_storage_path="/mnt/nfs"))
    assert found.text.startswith("TimeoutError: late (file store at /mnt/nfs); ")


def test_chains_that_bite_their_own_tail_end() -> None:
    first, second = StorageError("a"), StorageError("b")
    first.__cause__, second.__cause__ = second, first
    assert diagnose(first, "file").code == "other"


def test_every_code_is_a_word_that_a_file_may_have_as_its_name() -> None:
    assert all(code.replace("_", "").isalpha() and code.islower() for code in CODES)
    assert len(set(CODES)) == len(CODES) == len(ADVICE) + len(ENDS) + len(STOPS)
    assert Diagnosis("hung", "x").code in ENDS
