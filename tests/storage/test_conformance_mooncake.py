"""The Mooncake backend keeps the contract, also while a saboteur sits in front of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from sglang_hicache.storage.backend import PageOutcome, StorageBackend
from sglang_hicache.storage.conformance import CHECKS, Make
from sglang_hicache.storage.conformance_faults import (
    SABOTAGES,
    check_damage_at_every_byte,
    check_pages_cut_at_every_byte,
    check_sabotaged,
)
from sglang_hicache.storage.encryption import AesGcm
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, PageName
from tests.servers.mooncake import Mooncake, needs_mooncake, warm_up
from tests.storage import pages

needs_mooncake()


class Kept(StorageBackend):
    """A backend that stays open from one check to the next: leaving a Mooncake store takes a second."""

    def __init__(self, inner: StorageBackend) -> None:
        self._inner = inner
        self.capabilities = inner.capabilities

    def open_blocking(self) -> None:
        pass

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        return self._inner.exists_blocking(names)

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        return self._inner.read_blocking(pages)

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        return self._inner.write_blocking(pages)

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        return self._inner.delete_blocking(names)

    def clear_blocking(self, namespace: str) -> int:
        return self._inner.clear_blocking(namespace)

    def close_blocking(self) -> None:
        pass


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mooncake]:
    """A store for all checks."""
    with Mooncake(tmp_path_factory.mktemp("mooncake")) as started:
        warm_up(started)
        yield started


@pytest.fixture(scope="module")
def kept(store: Mooncake) -> Iterator[Kept]:
    """One backend for checks that need no new one."""
    backend = pages.backend("mooncake", store.config())
    backend.open_blocking()
    yield Kept(backend)
    backend.close_blocking()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_backend_keeps_the_contract(check: Callable[[Make], None], store: Mooncake) -> None:
    check(lambda: pages.backend("mooncake", store.config()))


@pytest.mark.leaks("the library connects when it needs to, and its client stays open for the next check")
@pytest.mark.parametrize("key", [b"", b"k" * 32], ids=["plain", "encrypted"])
@pytest.mark.parametrize(("call", "kind"), SABOTAGES)
def test_a_saboteur_costs_pages_and_nothing_else(call: str, kind: str, key: bytes, kept: Kept) -> None:
    check_sabotaged(lambda: kept, call, kind, AesGcm(key) if key else None)


@pytest.mark.leaks("the library connects when it needs to, and its client stays open for the next check")
@pytest.mark.parametrize("check", [check_damage_at_every_byte, check_pages_cut_at_every_byte])
def test_damage_at_any_byte_is_a_miss(check: Callable[..., None], kept: Kept) -> None:
    check(lambda: kept)


@pytest.mark.leaks("the library connects when it needs to, and its client stays open for the next check")
def test_an_empty_batch_is_no_call(kept: Kept) -> None:
    assert kept.read_blocking([]) == kept.write_blocking([]) == []
    assert kept.delete_blocking([]) == kept.exists_blocking([]) == 0
