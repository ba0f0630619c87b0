"""The S3 backend and a server that refuses it, dies, hangs, or answers what it should not."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import PageResult
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage
from tests.servers import s3
from tests.servers.program import free_port
from tests.servers.redis import Certificates
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.s3_pages import fault, incoming, names, outgoing


@pytest.fixture(scope="module", autouse=True)
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.RcloneServer]:
    with s3.warm(s3.RcloneServer(tmp_path_factory.mktemp("rclone"))) as server:
        assert isinstance(server, s3.RcloneServer)
        yield server


def attach_fault(open_backend: Open, port: int, **more: object) -> StorageError:
    """Why a store cannot be attached."""
    return fault(lambda: open_backend("s3", s3.config(port, **more)))


@pytest.mark.parametrize("changes", [{"secret_key": "not-that-one"}, {"access_key": "AKIDOFNOBODY"}])
def test_wrong_keys_are_refused_as_such(open_backend: Open, rclone: s3.RcloneServer, changes: dict[str, str]) -> None:
    error = attach_fault(open_backend, rclone.port, **changes)
    assert (error.reason, error.code) == ("refused", "wrong_password")
    assert not any(value in str(error) for value in changes.values())


@pytest.mark.parametrize(
    ("changes", "reason", "code"),
    [
        ({"bucket": "nobody-made-it"}, "refused", "not_found"),
        ({"endpoint": "http://no-such-host.invalid:9"}, "refused", "wrong_host"),
        ({"tls_ca_file": "/nowhere/ca.pem"}, "refused", "bad_config"),
    ],
)
def test_what_is_wrong_with_a_place(
    open_backend: Open, rclone: s3.RcloneServer, changes: dict[str, str], reason: str, code: str
) -> None:
    error = attach_fault(open_backend, rclone.port, **changes)
    assert (error.reason, error.code) == (reason, code), error


def test_nobody_listens(open_backend: Open) -> None:
    error = attach_fault(open_backend, free_port())
    assert (error.reason, error.code) == ("io", "refused"), error


def test_tls(open_backend: Open, tmp_path_factory: pytest.TempPathFactory, rclone: s3.RcloneServer) -> None:
    """A server whose authority is known, one whose is not, one that is somebody else, and one that speaks none."""
    folder = tmp_path_factory.mktemp("tls")
    certificates = Certificates(folder)
    cert, secret = certificates.make("server", ["127.0.0.1"])
    with s3.RcloneServer(folder, "--cert", cert, "--key", secret) as server:
        assert isinstance(server, s3.RcloneServer)
        good = {"endpoint": f"https://127.0.0.1:{server.port}", "tls_ca_file": certificates.ca_file}
        backend = open_backend("s3", s3.config(server.port, **good))
        assert backend.write_blocking(outgoing(2)) == [PageResult.WRITTEN] * 2
        for wrong in (
            {"endpoint": good["endpoint"]},
            good | {"endpoint": f"https://localhost:{server.port}"},
            {"endpoint": f"https://127.0.0.1:{rclone.port}"},
        ):
            error = attach_fault(open_backend, server.port, **wrong)
            assert (error.reason, error.code) == ("refused", "tls"), error


def test_a_server_that_is_killed_and_comes_back(open_backend: Open, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every call ends with a value while it is away, and the same attachment goes on when it is back."""
    with s3.RcloneServer(tmp_path_factory.mktemp("killed")) as server:
        assert isinstance(server, s3.RcloneServer)
        backend = open_backend("s3", s3.config(server.port, retries=1))
        backend.write_blocking(outgoing(4))
        server.kill_blocking()
        read = backend.read_blocking(incoming(4))
        assert [error.reason for error in read if isinstance(error, StorageError)] == ["io"] and len(read) == 1
        for call in (
            lambda: backend.exists_blocking(names(4)),
            lambda: backend.write_blocking(outgoing(4)),
            lambda: backend.delete_blocking(names(4)),
            lambda: backend.clear_blocking(pages.NAMESPACE),
        ):
            assert fault(call).code == "refused"
        server.start_blocking()
        assert backend.exists_blocking(names(4)) == 4
        assert backend.read_blocking(incoming(4)) == [PageResult.HIT] * 4


def test_pages_survive_a_server_that_moves(open_backend: Open, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("moves")
    for expected in (PageResult.WRITTEN, PageResult.PRESENT):
        with s3.RcloneServer(folder) as server:  # on a port of its own each time
            assert isinstance(server, s3.RcloneServer)
            assert open_backend("s3", s3.config(server.port)).write_blocking(outgoing(3)) == [expected] * 3


def test_a_server_that_hangs_costs_its_time_and_no_more(
    open_backend: Open, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """64 look-ups and 64 reads: each batch ends after one time-out, and not after four for each of its threads."""
    with s3.RcloneServer(tmp_path_factory.mktemp("hangs")) as server:
        assert isinstance(server, s3.RcloneServer)
        patient = open_backend("s3", s3.config(server.port))
        assert patient.write_blocking(outgoing(64)) == [PageResult.WRITTEN] * 64
        backend = open_backend("s3", s3.config(server.port, timeout_s=0.5))
        server.pause()
        assert fault(lambda: backend.exists_blocking(names(64))).code == "timeout"
        outcomes = backend.read_blocking(incoming(64))
        server.go_on()
        assert len(outcomes) == 1 and isinstance(outcomes[0], StorageError) and outcomes[0].code == "timeout"
        begun = backend.stats()
        assert begun["head_requests"] < 64 and begun["get_requests"] < 64, "more were begun after the time-out"
        assert patient.read_blocking(incoming(64)) == [PageResult.HIT] * 64


def test_requests_of_a_batch_are_under_way_at_the_same_time(open_backend: Open) -> None:
    """The server answers when it has four of them: one after the other they would never be four."""
    together = threading.Barrier(4)

    def answer(request: s3.Request) -> s3.Answer:
        if request.method == "HEAD":
            together.wait(pages.PATIENCE_S)
        return s3.content(b"")

    with s3.ScriptedServer(answer) as server:
        backend = open_backend("s3", s3.config(server.port, parallel=4, timeout_s=60))
        assert backend.exists_blocking(names(8)) == 8


def test_a_miss_costs_a_handful_of_requests(open_backend: Open) -> None:
    missing = s3.refusal(404, "NoSuchKey")
    with s3.ScriptedServer(lambda _: missing) as server:
        backend = open_backend("s3", s3.config(server.port, parallel=4))
        assert backend.exists_blocking(names(200)) == 0
        assert 1 <= server.count("HEAD") <= 4


def test_nothing_is_fetched_of_an_object_of_another_size(open_backend: Open) -> None:
    """It says that a gigabyte follows, and sends none of it: whoever wanted it would wait for ever."""
    with s3.ScriptedServer(lambda _: s3.content(b"x" * 100, 1 << 30)) as server:
        backend = open_backend("s3", s3.config(server.port, timeout_s=60))
        assert backend.read_blocking(incoming(1)) == [PageResult.WRONG_SIZE]


def test_a_page_that_breaks_off_is_a_fault_of_that_page(open_backend: Open) -> None:
    size = pages.PAGE_BYTES + HEADER_BYTES
    with s3.ScriptedServer(lambda _: s3.content(b"x" * 100, size)) as server:
        backend = open_backend("s3", s3.config(server.port, retries=0))
        outcomes = backend.read_blocking(incoming(2))
        assert len(outcomes) == 1 and isinstance(outcomes[0], StorageError) and outcomes[0].reason == "io"


def test_a_fault_holds_no_host_memory(open_backend: Open) -> None:
    """Its traceback would: pages, and the library's store with all of its connections, until the collector comes."""
    memory = bytearray(pages.PAGE_BYTES)
    with s3.ScriptedServer(lambda _: s3.refusal(500, "InternalError")) as server:
        backend = open_backend("s3", s3.config(server.port, retries=0))
        gc.disable()
        try:
            target = IncomingPage(pages.layout(), pages.key(0), memoryview(memory))
            outcomes = backend.read_blocking([target])
            del target
            memory.append(0)  # BufferError: somebody holds a view
        finally:
            gc.enable()
        assert isinstance(outcomes[0], StorageError)


def test_a_server_without_conditional_writes_is_asked_for_them_once(open_backend: Open) -> None:
    def answer(request: s3.Request) -> s3.Answer:
        if request.method == "HEAD":
            return s3.refusal(404, "NoSuchKey")
        if request.headers.get("If-None-Match"):
            return s3.refusal(501, "NotImplemented", "A header you provided implies functionality that is missing")
        return s3.content(b"")

    with s3.ScriptedServer(answer) as server:
        backend = open_backend("s3", s3.config(server.port, parallel=1, retries=0))
        assert backend.write_blocking(outgoing(3)) == [PageResult.WRITTEN] * 3
        assert server.count("PUT") == 4


def test_a_server_that_asks_for_patience_gets_it(open_backend: Open) -> None:
    """503 SlowDown is answered by another try a little later, and no page is lost by it."""
    refused = iter([True, True])

    def answer(request: s3.Request) -> s3.Answer:
        if request.method == "HEAD":
            return s3.refusal(503, "SlowDown") if next(refused, False) else s3.refusal(404, "NoSuchKey")
        return s3.content(b"")

    with s3.ScriptedServer(answer) as server:
        backend = open_backend("s3", s3.config(server.port, retries=2))
        assert backend.write_blocking(outgoing(1)) == [PageResult.WRITTEN]
        assert server.count("HEAD") == 3


@pytest.mark.parametrize(
    ("answer", "reason", "code"),
    [
        (
            s3.refusal(403, "RequestTimeTooSkewed", "The difference between the request time and ours"),
            "refused",
            "clock",
        ),
        (s3.refusal(403, "AccessDenied"), "refused", "no_permission"),
        (s3.refusal(400, "ExpiredToken"), "refused", "wrong_password"),
        (s3.refusal(400, "AuthorizationHeaderMalformed"), "refused", "bad_config"),
        (s3.refusal(301, "PermanentRedirect"), "refused", "bad_config"),
        (s3.refusal(503, "SlowDown"), "io", "timeout"),
        (s3.refusal(500, "InternalError"), "io", ""),
        (s3.refusal(507, "XMinioStorageFull"), "no_space", "no_space"),
    ],
)
def test_what_a_server_says_is_what_the_operator_is_told(
    open_backend: Open, answer: s3.Answer, reason: str, code: str
) -> None:
    with s3.ScriptedServer(lambda _: answer, lists=False) as server:
        error = attach_fault(open_backend, server.port, retries=0)
        assert (error.reason, error.code) == (reason, code), error


def test_a_full_store_is_no_fault_of_the_server(open_backend: Open) -> None:
    def answer(request: s3.Request) -> s3.Answer:
        if request.method == "PUT":
            return s3.refusal(507, "InsufficientStorage")
        return s3.refusal(404, "NoSuchKey") if request.method == "HEAD" else s3.content(b"")

    with s3.ScriptedServer(answer) as server:
        outcomes = open_backend("s3", s3.config(server.port, retries=0, parallel=1)).write_blocking(outgoing(3))
        assert [error.reason for error in outcomes if isinstance(error, StorageError)] == ["no_space"]
