"""The S3 backend keeps the contract over real servers, and under a saboteur."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from sglang_hicache.storage.conformance import CHECKS, Make, check_backend
from sglang_hicache.storage.conformance_faults import (
    SABOTAGES,
    check_damage_at_every_byte,
    check_pages_cut_at_every_byte,
    check_sabotaged,
)
from sglang_hicache.storage.encryption import AesGcm
from tests.servers import s3
from tests.storage import pages


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Backends over one rclone."""
    with s3.warm(s3.RcloneServer(tmp_path_factory.mktemp("rclone"))) as server:
        assert isinstance(server, s3.RcloneServer)
        yield lambda: pages.backend("s3", s3.config(server.port))


@pytest.fixture(scope="module")
def make_moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Backends over one moto."""
    with s3.warm(s3.MotoServer(tmp_path_factory.mktemp("moto"))) as server:
        assert isinstance(server, s3.MotoServer)
        yield lambda: pages.backend("s3", s3.config(server.port))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_backend_keeps_the_contract(check: Callable[[Make], None], make: Make) -> None:
    check(make)


def test_backend_keeps_the_contract_over_moto(make_moto: Make) -> None:
    check_backend(make_moto)


@pytest.mark.parametrize(("call", "kind"), SABOTAGES)
def test_a_saboteur_costs_pages_and_nothing_else(call: str, kind: str, make: Make) -> None:
    check_sabotaged(make, call, kind)


@pytest.mark.parametrize(("call", "kind"), [("read", "flip"), ("write", "short")])
def test_encrypted_pages_under_attack(call: str, kind: str, make: Make) -> None:
    check_sabotaged(make, call, kind, AesGcm(b"k" * 32))


@pytest.mark.parametrize("check", [check_damage_at_every_byte, check_pages_cut_at_every_byte])
def test_damage_at_any_byte_is_a_miss(check: Callable[..., None], make: Make) -> None:
    check(make)
