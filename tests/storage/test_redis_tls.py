"""Redis over TLS: whom we trust, who they are, who we are, and what is told when one of them is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.conformance import check_backend
from sglang_hicache.storage.diagnosis import diagnose
from tests.servers.redis import SLOTS, Certificates, TlsServer, Watched, bus_port, redis_server, tls_sentinel
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.redis_world import read, write

_MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all servers and certificates here."""
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Certificates:
    """Signs the servers here."""
    return Certificates(folder / "authority")


@pytest.fixture(scope="module")
def server(folder: Path, authority: Certificates) -> Iterator[TlsServer]:
    """Proves to be 127.0.0.1 and asks nobody who he is."""
    with TlsServer(folder / "server", authority, ["127.0.0.1"]) as running:
        assert isinstance(running, TlsServer)
        yield running


@pytest.fixture(scope="module")
def stranger(folder: Path, authority: Certificates) -> Iterator[TlsServer]:
    """Proves to be somebody else, and asks for the certificate of whoever comes."""
    with TlsServer(folder / "stranger", authority, ["store.example"], "--tls-auth-clients", "yes") as running:
        assert isinstance(running, TlsServer)
        yield running


def _refused(open_backend: Open, **config: Any) -> str:
    with pytest.raises(StorageError) as caught:
        open_backend("redis", config | {"connect_timeout_s": 2, "timeout_s": 2})
    return diagnose(caught.value, "redis").code


def test_pages_over_tls(server: TlsServer, authority: Certificates, open_backend: Open) -> None:
    """Whole pages, in commands that are larger than a record of TLS, over several connections."""
    config = {"url": server.tls_url, "tls_ca_file": authority.ca_file}
    check_backend(lambda: pages.backend("redis", config))
    for connections in (1, 3):
        backend = open_backend("redis", config | {"connections": connections, "prefix": f"{connections}/"})
        assert write(backend, 9, size=_MIB) == read(backend, 9, size=_MIB) == BatchResult(9)
        assert backend.info()["url"] == server.tls_url


def test_an_authority_that_is_not_trusted(
    server: TlsServer, folder: Path, open_backend: Open
) -> None:
    other = Certificates(folder / "other")
    assert _refused(open_backend, url=server.tls_url, tls_ca_file=other.ca_file) == "tls"
    assert _refused(open_backend, url=server.tls_url) == "tls"
    assert _refused(open_backend, url=server.tls_url, tls_ca_file=other.ca_file, tls_check_hostname=False) == "tls"


def test_a_file_of_authorities_that_is_none(server: TlsServer, folder: Path, open_backend: Open) -> None:
    with pytest.raises(StorageError, match="/nowhere/ca.pem") as caught:
        open_backend("redis", {"url": server.tls_url, "tls_ca_file": "/nowhere/ca.pem"})
    assert caught.value.code == "not_found"
    (folder / "empty.pem").write_text("no certificate")
    assert _refused(open_backend, url=server.tls_url, tls_ca_file=str(folder / "empty.pem")) == "tls"


def test_a_certificate_for_another_host(stranger: TlsServer, authority: Certificates, open_backend: Open) -> None:
    cert, key = authority.make("client", [])
    config = {
        "url": stranger.tls_url, "tls_ca_file": authority.ca_file, "tls_cert_file": cert, "tls_key_file": key
    }  # fmt: skip
    assert _refused(open_backend, **config) == "tls"
    backend = open_backend("redis", config | {"tls_check_hostname": False})
    assert write(backend, 2) == BatchResult(2)


def test_a_server_that_wants_to_know_who_we_are(
    stranger: TlsServer, authority: Certificates, folder: Path, open_backend: Open
) -> None:
    config = {"url": stranger.tls_url, "tls_ca_file": authority.ca_file, "tls_check_hostname": False}
    assert _refused(open_backend, **config) in ("tls", "refused")
    cert, key = Certificates(folder / "another").make("impostor", [])
    assert _refused(open_backend, **config, tls_cert_file=cert, tls_key_file=key) in ("tls", "refused")


def test_one_side_speaks_tls_and_the_other_does_not(
    server: TlsServer, authority: Certificates, open_backend: Open
) -> None:
    plain = f"rediss://127.0.0.1:{server.port}"
    assert _refused(open_backend, url=plain, tls_ca_file=authority.ca_file) == "tls"
    assert _refused(open_backend, url=f"redis://127.0.0.1:{server.tls_port}") in ("refused", "timeout")


def test_the_password_goes_through_tls_as_well(folder: Path, authority: Certificates, open_backend: Open) -> None:
    server = TlsServer(folder / "secret", authority, ["127.0.0.1"])
    with server:
        server.run("ACL", "SETUSER", "pages", "reset", "on", ">geheim-77", "~hicache/*", "+@all")
        config = {"url": server.tls_url, "tls_ca_file": authority.ca_file, "username": "pages"}
        assert write(open_backend("redis", config | {"password": "geheim-77"}), 1) == BatchResult(1)
        assert _refused(open_backend, **config, password="falsch-88") == "wrong_password"


def test_a_cluster_over_tls(folder: Path, authority: Certificates, open_backend: Open) -> None:
    """Its nodes are found by the addresses, and the ports with TLS, that they announce."""
    options = ("--cluster-enabled", "yes", "--tls-cluster", "yes", *bus_port())
    with TlsServer(folder / "ring", authority, ["127.0.0.1"], *options) as node:
        assert isinstance(node, TlsServer)
        node.run("CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
        pages.wait_until(lambda: b"cluster_state:ok" in node.run("CLUSTER", "INFO"), "the node does not serve")
        backend = open_backend("redis", {"url": node.tls_url, "mode": "cluster", "tls_ca_file": authority.ca_file})
        assert write(backend, 9) == read(backend, 9) == BatchResult(9)


def test_a_master_behind_sentinels_over_tls(folder: Path, authority: Certificates, open_backend: Open) -> None:
    """The sentinel speaks TLS as well, and names the port of the master that does."""
    with TlsServer(folder / "master", authority, ["127.0.0.1"]) as master:
        assert isinstance(master, TlsServer)
        with tls_sentinel(folder / "sentinel", authority, master.tls_port) as port:
            backend = open_backend(
                "redis",
                {
                    "url": f"rediss://127.0.0.1:{port}", "mode": "sentinel", "service_name": Watched.SERVICE,
                    "tls_ca_file": authority.ca_file,
                },
            )  # fmt: skip
            assert write(backend, 9) == read(backend, 9) == BatchResult(9)


def test_a_plain_server_needs_no_certificate(tmp_path: Path, open_backend: Open) -> None:
    with redis_server(tmp_path) as plain:
        assert write(open_backend("redis", {"url": plain.url}), 1) == BatchResult(1)
