"""What a client knows after each way in which a question or a command can go wrong."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from sglang_hicache.ctl.client import Client, Reply
from sglang_hicache.ctl.exits import OutcomeUnknown, Refused, Unreachable
from sglang_hicache.errors import UserError
from tests.unit.ctl.fake import FakeServer, Said


def test_a_question_carries_the_key_and_gets_json(server: FakeServer) -> None:
    server.says("GET", "/x", Said({"a": 1}))
    assert Client(server.url, "k3y").ask("/x", first="1 & 2") == {"a": 1}
    asked = server.asked[0]
    assert (asked.key, asked.query, asked.body) == ("Bearer k3y", {"first": "1 & 2"}, None)


def test_without_a_key_there_is_no_header(server: FakeServer) -> None:
    server.says("GET", "/x", Said({}))
    Client(server.url).ask("/x")
    assert server.asked[0].key == ""


def test_a_server_behind_a_path(server: FakeServer) -> None:
    server.says("PUT", "/behind/x", Said("done", operation_id="7"))
    reply = Client(server.url + "/behind/").command("PUT", "/x", {"a": "ü"}, timeout_s=20)
    assert (reply.message, reply.operation_id, server.asked[0].body) == ("done", "7", {"a": "ü"})


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for method in ("GET", "PUT"):
        with pytest.raises(Unreachable, match="cannot reach"):
            Client(f"http://127.0.0.1:{port}").send(method, "/x")


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(Unreachable, match="cannot reach http://nobody.invalid"):
        Client("http://nobody.invalid:1").ask("/x")


@pytest.mark.parametrize("is_late", [True, False], ids=["no answer in time", "the connection breaks"])
def test_a_command_that_went_out_may_have_been_done(server: FakeServer, is_late: bool) -> None:
    """A question can be asked again; whoever repeats a command blindly may do it twice."""
    for method in ("GET", "PUT"):
        server.says(method, "/x", server.hang if is_late else Said(status=0))
    words = "no answer within 0.2 s" if is_late else "the connection broke"
    with pytest.raises(OutcomeUnknown, match=words):
        Client(server.url).command("PUT", "/x", {}, timeout_s=0.2)
    server.close()
    other = FakeServer()
    other.says("GET", "/x", other.hang if is_late else Said(status=0))
    try:
        with pytest.raises(Unreachable, match=words):
            Client(other.url).send("GET", "/x", timeout_s=0.2)
    finally:
        other.close()


def test_a_server_that_does_not_know_how_it_ended(server: FakeServer) -> None:
    server.says("PUT", "/x", Said("Failed to attach.\noutcome unknown: rank 1", 504))
    with pytest.raises(OutcomeUnknown, match="rank 1"):
        Client(server.url).command("PUT", "/x", {}, timeout_s=20)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Said("Failed to detach.\nnot idle\n", 400), "Failed to detach.\nnot idle"),
        (Said({"error": "needs an admin key"}, 400), "needs an admin key"),
        (Said({"error": {"message": "no such operation"}}, 404), "no such operation"),
        (Said({"object": "error", "message": "malformed", "code": 400}, 400), "malformed"),
        (Said({"error": "Unauthorized"}, 401), "Unauthorized: this takes the admin key, from --key-file or HICACHECTL"),
        (Said("", 500), "HTTP status 500"),
        (Said("", 308, headers={"Location": "http://127.0.0.1:9/thief"}), "give the final address"),
    ],
)
def test_a_refusal_in_its_own_words(server: FakeServer, said: Said, words: str) -> None:
    server.says("GET", "/x", said)
    with pytest.raises(Refused) as caught:
        Client(server.url, "key").ask("/x")
    assert words in str(caught.value)
    assert len(server.asked) == 1


def test_what_is_no_server_of_ours() -> None:
    with pytest.raises(Refused, match="is --url that of a server"):
        Reply(200, "<html>hello</html>").json()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("127.0.0.1:30000", "http://HOST:PORT"),
        ("ftp://host", "http://HOST:PORT"),
        ("http://", "http://HOST:PORT"),
        ("http://host:x", "http://HOST:PORT"),
        ("http://host:1?a=b", "http://HOST:PORT"),
        ("http://me:hunter2@host:1", "--key-file"),
    ],
)
def test_an_address_that_is_none(url: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        Client(url)
    assert words in str(caught.value) and "hunter2" not in str(caught.value)


def test_neither_proxies_nor_redirects_get_the_key(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment is for the way into the internet, and would be handed the admin key."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.says("GET", "/x", Said({}))
    assert Client(server.url, "key").ask("/x") == {}


def test_tls_that_fails_is_out_of_reach(server: FakeServer) -> None:
    with pytest.raises(Unreachable, match="no TLS connection.*--cacert"):
        Client(server.url.replace("http", "https"), "key").ask("/x")
    assert not server.asked


def test_certificates_that_cannot_be_used() -> None:
    with pytest.raises(UserError, match="--cacert.*nowhere.pem"):
        Client("https://127.0.0.1:1", cacert="nowhere.pem")
    with pytest.raises(UserError, match="is for https"):
        Client("http://127.0.0.1:1", cacert="nowhere.pem")


def _certificate(folder: Path) -> Path:
    """Of 127.0.0.1, signed by itself; the key is in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "server.pem").write_bytes(private + made.public_bytes(Encoding.PEM))
    return folder / "server.pem"


def test_a_server_is_asked_over_tls_only_if_its_certificate_is_trusted(tmp_path: Path) -> None:
    """Whoever answers without it may be anybody, and would be handed the admin key."""
    certificate = str(_certificate(tmp_path))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    server = FakeServer(tls)
    server.says("GET", "/x", Said({"a": 1}))
    try:
        with pytest.raises(Unreachable, match="no TLS connection.*self-signed certificate.*--cacert"):
            Client(server.url, "key").ask("/x")
        assert not server.asked
        assert Client(server.url, "key", cacert=certificate).ask("/x") == {"a": 1}
        stranger = server.url.replace("127.0.0.1", "localhost")
        with pytest.raises(Unreachable, match="no TLS connection.*[Hh]ostname"):
            Client(stranger, "key", cacert=certificate).ask("/x")
    finally:
        server.close()
