"""A storage process that encrypts: what reaches the disk, and attaches that are refused for their key file."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache import wire
from tests.processes.storage_world import PAGE_BYTES, Rank, keys

Start = Callable[..., Rank]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "store-key"
    path.touch(0o600)
    path.write_bytes(secrets.token_bytes(32))
    return path


@pytest.fixture
def start(tmp_path: Path, key_file: Path) -> Iterator[Start]:
    """Starts storage processes over one encrypted folder, one after the other."""
    ranks: list[Rank] = []
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)

    def start_one(**more: Any) -> Rank:
        config = {"file_storage_path": str(tmp_path / "store"), "encryption": {"key_file": str(key_file)}} | more
        ranks.append(Rank(run_dir, "file", config, epoch=len(ranks) + 1))
        return ranks[-1]

    yield start_one
    for rank in ranks:
        rank.close()


def _filled(rank: Rank, count: int) -> None:
    rank.opened()
    rank.write(1, count)
    assert rank.end_of(1).pages == count


def _stop(rank: Rank) -> None:
    rank.client.stop()
    assert rank.exit_status() == 0


def test_bytes_on_the_disk_are_not_those_of_the_pages(start: Start, tmp_path: Path) -> None:
    rank = start(negative_ttl_s=5)
    assert rank.opened().info["encryption"] == "aes-256-gcm"
    rank.write(1, 20)
    assert rank.end_of(1).pages == 20
    stored = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*.page"))
    assert len(stored) >= 20 * PAGE_BYTES
    assert not [page for page in range(20) if bytes(rank.pool.page(page)[:32]) in stored]
    rank.read(2, 20)
    assert rank.end_of(2).pages == 20
    assert rank.pool.buffer[128 * PAGE_BYTES : 148 * PAGE_BYTES] == rank.pool.buffer[: 20 * PAGE_BYTES]


def test_another_key_finds_nothing_and_says_so(start: Start, key_file: Path) -> None:
    first = start()
    _filled(first, 5)
    _stop(first)
    key_file.write_bytes(secrets.token_bytes(32))
    second = start()
    second.opened()
    second.read(1, 5)
    assert second.end_of(1) == wire.OpProgress(
        op_id=1, pages=0, settled=True, closed=True, reason="other_key: made with another encryption key, or with none"
    )
    second.send(wire.LookupPages(op_id=2, keys=keys(5)))
    assert second.end_of(2).pages == 0
    second.write(3, 5)
    assert second.end_of(3).pages == 5
    second.read(4, 5)
    assert second.end_of(4).pages == 5
    _stop(second)
    told = [message.stats for message in second.heard if isinstance(message, wire.BackendStats)][-1]
    assert (told["other_key_pages"], told["replaced_pages"], told["negative_hits"]) == (5, 5, 1)
    assert "set_aside_pages" not in told or told["set_aside_pages"] == 0


def test_a_process_that_does_not_encrypt_never_loads_the_library() -> None:
    code = "import sys, sglang_hicache.workers.storage_process; print('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"


@pytest.mark.parametrize(
    ("mode", "content", "complaint"),
    [
        (0o640, b"k" * 32, "has mode 0640; nobody else may read it"),
        (0o600, b"this is not a key but a secret", "holds no key"),
    ],
)
def test_attach_with_a_bad_key_file_is_refused(
    start: Start, key_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], mode: int, content: bytes,
    complaint: str,
) -> None:  # fmt: skip
    key_file.write_bytes(content)
    key_file.chmod(mode)
    rank = start()
    refusal = rank.next_message()
    assert isinstance(refusal, wire.BackendOpenFailed)
    assert complaint in refusal.reason
    assert rank.exit_status() == 1
    said = refusal.reason + capfd.readouterr().err
    assert content.decode() not in said
    assert str(key_file) not in said, "somebody may have given the key in the path's place"
    assert not (tmp_path / "store").exists(), "the backend is not opened before the key is good"
