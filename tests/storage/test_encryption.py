"""Encrypted pages: what the store sees, what it cannot do to them, and which key files are taken."""

from __future__ import annotations

import base64
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import PageResult, StorageBackend
from sglang_hicache.storage.checked import BatchResult, CheckedStore, Shared
from sglang_hicache.storage.encryption import AesGcm, open_cipher_blocking
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage, Verdict, parse_header
from sglang_hicache.storage.settings import EncryptionSettings
from tests.storage import pages
from tests.storage.conftest import Open

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
TENANT = b"\x11" * 32
SIZE = 48

#: What the first version that encrypts has stored: key id, nonce and tag, payload.
KEY_ID = "f0fad690"
NONCE_AND_TAG = "e280ed53fd3e69601624e845b048472939e59765da6f95f2fffd8d69"
CIPHERTEXT = "60d35afa8820d7a51ea5d0e093e31b1509206874b5d4b4e6108b1b053e40e4eef6f017c315d5614787cc50e4413a28cc"


def _sealed(cipher: AesGcm | None, number: int = 7, content: int = 1) -> bytearray:
    """A stored page."""
    payload, parent = pages.content(content, SIZE), pages.key(number - 1)
    page = OutgoingPage(pages.layout(size=SIZE), pages.key(number), payload, parent, 3, TENANT)
    if cipher:
        page.encrypt(cipher, memoryview(bytearray(SIZE)))
    return bytearray(page.header() + page.payload)


def _judge(stored: bytes, cipher: AesGcm | None, number: int = 7) -> tuple[Verdict, bytes]:
    page = IncomingPage(pages.layout(size=SIZE), pages.key(number), memoryview(bytearray(stored[HEADER_BYTES:])))
    page.header[:] = stored[:HEADER_BYTES]
    return page.judge(cipher), bytes(page.payload)


def _with_checksum(stored: bytearray) -> bytearray:
    """The page after somebody who knows the format, but not the key, has put things right."""
    stored[240:256] = xxhash.xxh3_128_digest(bytes(stored[HEADER_BYTES:] + stored[:240]))
    return stored


class TestPage:
    def test_comes_back_and_shows_nothing_on_the_way(self) -> None:
        cipher, clear = AesGcm(KEY), bytes(pages.content(1, SIZE))
        stored = _sealed(cipher)
        assert stored[HEADER_BYTES:] != clear
        assert _judge(stored, cipher) == (Verdict.GOOD, clear)
        header = parse_header(bytes(stored))
        assert header is not None
        assert header.key_id == cipher.key_id != 0

    def test_host_page_is_not_touched_by_its_encryption(self) -> None:
        payload = pages.content(1, SIZE)
        page = OutgoingPage(pages.layout(size=SIZE), pages.key(7), payload.toreadonly(), b"", 0)
        page.encrypt(AesGcm(KEY), memoryview(bytearray(SIZE)))
        assert payload == pages.content(1, SIZE) != page.payload

    @pytest.mark.parametrize(("written", "read"), [(KEY, OTHER), (KEY, None), (None, KEY)])
    def test_of_another_key_is_told_apart_from_damage(self, written: bytes | None, read: bytes | None) -> None:
        stored = _sealed(AesGcm(written) if written else None)
        cipher = AesGcm(read) if read else None
        assert _judge(stored, cipher)[0] is Verdict.OTHER_KEY
        stored[-1] ^= 1
        assert _judge(stored, cipher)[0] is Verdict.CHECKSUM

    def test_no_bit_can_be_changed_even_with_a_new_checksum(self) -> None:
        cipher = AesGcm(KEY)
        good = _sealed(cipher)
        for bit in range(8 * len(good)):
            damaged = bytearray(good)
            damaged[bit // 8] ^= 1 << bit % 8
            if bit // 8 < 240 or bit // 8 >= HEADER_BYTES:
                _with_checksum(damaged)
            assert _judge(damaged, cipher)[0] is not Verdict.GOOD, f"bit {bit} is not covered"

    @pytest.mark.parametrize(
        ("field", "start", "end"),
        [("parent", 80, 112), ("depth", 112, 116), ("tenant", 200, 212), ("nonce", 212, 224), ("tag", 224, 240)],
    )
    def test_fm33_a_field_taken_from_another_page_of_the_same_key_is_refused(
        self, field: str, start: int, end: int
    ) -> None:
        """Whoever can write to the store moves a tenant's page to another tenant, or to another place in a chain."""
        cipher = AesGcm(KEY)
        stored = _sealed(cipher)
        other = OutgoingPage(
            pages.layout(size=SIZE), pages.key(7), pages.content(2, SIZE), pages.key(2), 4, b"\x22" * 32
        )
        other.encrypt(cipher, memoryview(bytearray(SIZE)))
        stored[start:end] = other.header()[start:end]
        assert _judge(_with_checksum(stored), cipher)[0] is Verdict.FORGED, field

    def test_bytes_under_the_name_of_another_page_of_the_same_key_are_refused(self) -> None:
        cipher = AesGcm(KEY)
        mine, other = _sealed(cipher, 7), _sealed(cipher, 8, content=2)
        mixed = _with_checksum(mine[:HEADER_BYTES] + other[HEADER_BYTES:])
        assert _judge(mixed, cipher)[0] is Verdict.FORGED
        renamed = bytearray(other)
        renamed[48:80] = mine[48:80]
        assert _judge(_with_checksum(renamed), cipher)[0] is Verdict.FORGED

    def test_no_nonce_comes_twice(self) -> None:
        """The same page ten thousand times, by two threads as in a storage process: once is enough to lose the key."""
        cipher = AesGcm(KEY)
        nonces: list[bytes] = []

        def seal() -> None:
            payload, into = pages.content(1, SIZE), memoryview(bytearray(SIZE))
            nonces.extend(cipher.encrypt(payload, b"", into)[0] for _ in range(5000))

        threads = [threading.Thread(target=seal) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(nonces)) == len(nonces) == 10_000
        assert {len(nonce) for nonce in nonces} == {12}

    def test_format_is_what_earlier_versions_wrote(self) -> None:
        """Stored pages outlive a version of this program: this page was written by the first one that encrypts."""
        stored = bytearray(_sealed(None))
        stored[124:128] = bytes.fromhex(KEY_ID)
        stored[212:240] = bytes.fromhex(NONCE_AND_TAG)
        stored[HEADER_BYTES:] = bytes.fromhex(CIPHERTEXT)
        assert _judge(_with_checksum(stored), AesGcm(KEY)) == (Verdict.GOOD, bytes(pages.content(1, SIZE)))


class TestStore:
    @pytest.fixture(params=["memory", "file"])
    def backend(self, request: pytest.FixtureRequest, open_backend: Open, root: Path) -> StorageBackend:
        config = {"file_storage_path": str(root)} if request.param == "file" else {}
        return open_backend(request.param, config)

    def test_pages_go_out_and_come_back(self, backend: StorageBackend) -> None:
        store = _store(backend, KEY)
        store.self_test_blocking(0)
        for first, count in ((1, 2), (3, 5), (8, 1)):
            assert _write(store, count, first) == BatchResult(count)
        targets = pages.empty(8)
        assert store.read_blocking(pages.keys(8), targets) == BatchResult(8)
        assert targets == [pages.content(number) for number in range(1, 9)]

    @pytest.mark.parametrize(("before", "now"), [(KEY, OTHER), (KEY, None), (None, KEY)])
    def test_other_key_is_a_miss_that_heals(
        self, backend: StorageBackend, before: bytes | None, now: bytes | None
    ) -> None:
        _write(_store(backend, before), 3)
        store = _store(backend, now)
        assert store.lookup_blocking(pages.keys(3)) == 3
        result = store.read_blocking(pages.keys(3), pages.empty(3))
        assert result == BatchResult(0, reason="other_key: made with another encryption key, or with none")
        assert store.counters.get("other_key_pages") == 3
        assert store.counters.get("set_aside_pages") == store.counters.get("corrupt_pages") == 0
        # Nobody asks for these again before they are replaced, and nothing of the other's was lost until then.
        assert store.lookup_blocking(pages.keys(3)) == 0
        assert _store(backend, before).read_blocking(pages.keys(3), pages.empty(3)).pages == 3
        assert _write(store, 3) == BatchResult(3)
        assert store.counters.get("replaced_pages") == 3
        assert store.lookup_blocking(pages.keys(3)) == 3
        targets = pages.empty(3)
        assert store.read_blocking(pages.keys(3), targets) == BatchResult(3)
        assert targets == [pages.content(number) for number in (1, 2, 3)]

    def test_pages_of_one_batch_are_stored_apart(self, backend: StorageBackend) -> None:
        """A backend that fails in the middle writes the rest of the batch once more, from the same buffer."""
        store = _store(backend, KEY)
        write, calls = backend.write_blocking, []

        def failing_once(batch: list[OutgoingPage]) -> object:
            calls.append(len(batch))
            return [*write(batch[:2]), StorageError("reset")] if len(calls) == 1 else write(batch)

        backend.write_blocking = failing_once  # type: ignore[method-assign]
        assert _write(store, 5) == BatchResult(5)
        assert calls == [5, 3]
        targets = pages.empty(5)
        assert store.read_blocking(pages.keys(5), targets) == BatchResult(5)
        assert targets == [pages.content(number) for number in range(1, 6)]

    def test_forged_page_is_set_aside(self, open_backend: Open, root: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        store = _store(backend, KEY)
        _write(store, 1)
        path = pages.page_files(root)[0]
        forged = bytearray(path.read_bytes())
        forged[200] ^= 1
        path.write_bytes(_with_checksum(forged))
        assert store.read_blocking(pages.keys(1), pages.empty(1)).reason == "corrupt: authentication tag"
        assert store.counters.get("set_aside_pages") == 1
        assert store.lookup_blocking(pages.keys(1)) == 0


def _store(backend: StorageBackend, key: bytes | None) -> CheckedStore:
    return CheckedStore(backend, pages.layout(), Shared(AesGcm(key) if key else None))


def _write(store: CheckedStore, count: int, first: int = 1) -> BatchResult:
    contents = [pages.content(first + index).toreadonly() for index in range(count)]
    return store.write_blocking(
        pages.keys(count, first), contents, pages.key(first - 1) if first > 1 else b"", first - 1, TENANT
    )


class TestKeyFile:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Iterator[Callable[..., Path]]:
        def write_one(content: bytes, mode: int = 0o600) -> Path:
            path = tmp_path / "key"
            path.write_bytes(content)
            path.chmod(mode)
            return path

        yield write_one

    @pytest.mark.parametrize(
        "content",
        [
            KEY,
            KEY.hex().encode(),
            KEY.hex().upper().encode() + b"\n",
            base64.b64encode(KEY),
            base64.b64encode(KEY) + b"\r\n",
        ],
    )
    @pytest.mark.parametrize("mode", [0o600, 0o400])
    def test_three_forms_hold_the_same_key(self, write: Callable[..., Path], content: bytes, mode: int) -> None:
        cipher = _open(write(content, mode))
        assert cipher is not None
        assert cipher.key_id == AesGcm(KEY).key_id != AesGcm(OTHER).key_id
        assert _judge(_sealed(AesGcm(KEY)), cipher)[0] is Verdict.GOOD

    def test_key_that_ends_in_a_newline_is_a_key(self, write: Callable[..., Path]) -> None:
        assert _open(write(KEY[:31] + b"\n")).key_id == AesGcm(KEY[:31] + b"\n").key_id

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            KEY[:31],
            KEY + b"\n",
            KEY + KEY,
            KEY.hex().encode()[:-1],
            KEY.hex().encode() + b"00",
            KEY[:16].hex().encode() + b"\n",
            base64.b64encode(KEY + b"\0"),
            b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n",
            b"root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534\n",
            "Schlüssel".encode() * 4,
            KEY.hex().encode() + b" " * 200,
        ],
    )
    def test_anything_else_is_refused_without_a_word_of_it(self, write: Callable[..., Path], content: bytes) -> None:
        path = write(content)
        with pytest.raises(StorageError) as caught:
            _open(path)
        assert caught.value.reason == "refused"
        # The same sentence whatever is inside: whoever may name any file learns that it is no key, and no more.
        assert str(caught.value) == (
            "the file of extra config encryption.key_file holds no key; it must hold 32 random bytes, or these in "
            "hexadecimal or base64"
        )
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None

    @pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o610, 0o601, 0o777])
    def test_file_that_others_can_open_is_refused(self, write: Callable[..., Path], mode: int) -> None:
        with pytest.raises(StorageError, match=f"has mode {mode:04o}; nobody else may read it: chmod 600"):
            _open(write(KEY, mode))

    def test_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="No such file") as caught:
            _open(tmp_path / "missing")
        assert caught.value.reason == "refused"
        assert "missing" not in str(caught.value), "a key given in the path's place would be repeated"

    def test_link_is_not_followed(self, write: Callable[..., Path], tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(write(KEY))
        with pytest.raises(StorageError, match="symbolic link"):
            _open(link)

    def test_what_is_no_file_is_refused_at_once(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe", 0o600)
        for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
            with pytest.raises(StorageError, match="is no regular file"):
                _open(path)

    def test_file_of_another_user_is_refused(self, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        path, owner = write(KEY), os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        with pytest.raises(StorageError, match=f"belongs to user {owner}; it must belong to {owner + 1}"):
            _open(path)

    def test_neither_key_nor_cipher_shows_itself(self) -> None:
        key = secrets.token_bytes(32)
        shown = repr(AesGcm(key)) + repr(Shared(AesGcm(key)))
        assert repr(key)[2:10] not in shown
        assert key.hex()[:8] not in shown

    def test_no_key_file_is_no_encryption(self) -> None:
        assert open_cipher_blocking(None) is None


def _open(path: Path) -> AesGcm:
    cipher = open_cipher_blocking(EncryptionSettings(key_file=str(path)))
    assert cipher is not None
    return cipher


def test_present_is_what_a_second_write_of_a_readable_page_says(open_backend: Open) -> None:
    """Only pages known to be unreadable are replaced: a readable one is not written again at every offer."""
    backend = open_backend("memory")
    store = _store(backend, KEY)
    _write(store, 1)
    stored = backend.read_blocking([page := IncomingPage(pages.layout(), pages.key(1), pages.empty(1)[0])])
    nonce = bytes(page.header[212:224])
    assert stored == [PageResult.HIT]
    assert _write(store, 1) == BatchResult(1)
    backend.read_blocking([page])
    assert bytes(page.header[212:224]) == nonce
    assert store.counters.get("present_pages") == 1
