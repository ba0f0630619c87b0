"""The S3 backend over real servers: what it asks for, what it leaves alone, and what becomes of it without them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.remote.s3_client import S3Bucket
from sglang_hicache.storage.backend import PageResult, StorageBackend
from sglang_hicache.storage.object_name import object_name
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage, PageName
from tests.servers import s3
from tests.servers.program import free_port
from tests.servers.redis import Certificates
from tests.storage import pages
from tests.storage.conftest import Open

OTHER_NAMESPACE = "c3" * 32


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.RcloneServer]:
    with s3.warm(s3.RcloneServer(tmp_path_factory.mktemp("rclone"))) as server:
        assert isinstance(server, s3.RcloneServer)
        yield server


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.MotoServer]:
    with s3.warm(s3.MotoServer(tmp_path_factory.mktemp("moto"))) as server:
        assert isinstance(server, s3.MotoServer)
        yield server


@pytest.fixture
def over(open_backend: Open, rclone: s3.RcloneServer, moto: s3.MotoServer) -> Iterator[Callable[..., StorageBackend]]:
    """Opens backends over one of the servers, which is empty when the test is over."""
    opened: list[StorageBackend] = []
    ports = {"rclone": rclone.port, "moto": moto.port}

    def open_one(name: str, **more: object) -> StorageBackend:
        opened.append(open_backend("s3", s3.config(ports[name], **more)))
        return opened[-1]

    yield open_one
    for backend in opened:
        for namespace in (pages.NAMESPACE, OTHER_NAMESPACE):
            backend.clear_blocking(namespace)


def outgoing(count: int, namespace: str = pages.NAMESPACE, size: int = pages.PAGE_BYTES) -> list[OutgoingPage]:
    layout = pages.layout(namespace, size=size)
    keys = pages.keys(count)
    return [OutgoingPage(layout, key, pages.content(n, size), b"", n) for n, key in enumerate(keys)]


def incoming(count: int, size: int = pages.PAGE_BYTES) -> list[IncomingPage]:
    layout = pages.layout(size=size)
    return [IncomingPage(layout, key, target) for key, target in zip(pages.keys(count), pages.empty(count, size))]


def names(count: int) -> list[PageName]:
    layout = pages.layout()
    return [layout.name(key) for key in pages.keys(count)]


def key(name: PageName) -> str:
    return object_name("hicache/", name)


def its_bucket(backend: StorageBackend) -> S3Bucket:
    """The bucket of a backend, as somebody else sees it."""
    return s3.bucket(int(backend.info()["place"].rpartition(":")[2]))


def fault(call: Callable[[], object]) -> StorageError:
    with pytest.raises(StorageError) as found:
        call()
    assert s3.SECRET_KEY not in str(found.value)
    return found.value


def attach_fault(open_backend: Open, port: int, **more: object) -> StorageError:
    """Why a store cannot be attached."""
    return fault(lambda: open_backend("s3", s3.config(port, **more)))


@pytest.mark.parametrize("server", ["rclone", "moto"])
def test_a_page_that_is_there_does_not_travel_again(over: Callable[..., StorageBackend], server: str) -> None:
    backend = over(server)
    assert backend.write_blocking(outgoing(4)) == [PageResult.WRITTEN] * 4
    before = backend.stats()["put_requests"]
    assert backend.write_blocking(outgoing(6)) == [PageResult.PRESENT] * 4 + [PageResult.WRITTEN] * 2
    assert backend.stats()["put_requests"] == before + 2


def test_behind_a_missing_page_nobody_is_asked_and_the_server_refuses_what_is_there(
    over: Callable[..., StorageBackend],
) -> None:
    """The first page was thrown out by a lifecycle rule.  Nobody asks for its children, and they are not replaced."""
    backend = over("moto")
    backend.write_blocking(outgoing(3))
    assert backend.delete_blocking(names(1)) == 1
    asked = backend.stats()["head_requests"]
    outcomes = backend.write_blocking(outgoing(3))
    assert outcomes == [PageResult.WRITTEN, PageResult.PRESENT, PageResult.PRESENT]
    # For the first page, and for the sizes of those that the server has refused to replace.
    assert backend.stats()["head_requests"] == asked + 3


@pytest.mark.parametrize("server", ["rclone", "moto"])
@pytest.mark.parametrize("conditional", [True, False])
def test_an_object_of_another_size_gives_way(
    over: Callable[..., StorageBackend], server: str, conditional: bool
) -> None:
    backend = over(server, conditional_put=conditional)
    bucket = its_bucket(backend)
    for index, name in enumerate(names(2)):
        bucket.put_blocking(key(name), [b"x" * (index * 9000)])
    assert backend.read_blocking(incoming(2)) == [PageResult.WRONG_SIZE] * 2
    assert backend.write_blocking(outgoing(2)) == [PageResult.WRITTEN] * 2
    assert backend.read_blocking(incoming(2)) == [PageResult.HIT] * 2


def test_reads_go_on_behind_a_damaged_page_and_end_at_a_gap(over: Callable[..., StorageBackend]) -> None:
    backend = over("rclone")
    backend.write_blocking(outgoing(6))
    bad, gap = names(6)[1], names(6)[4]
    its_bucket(backend).put_blocking(key(bad), [b"?"])
    backend.delete_blocking([gap])
    expected = [PageResult.HIT, PageResult.WRONG_SIZE, PageResult.HIT, PageResult.HIT, PageResult.MISS]
    wanted = incoming(6)
    assert backend.read_blocking(wanted) == expected
    assert [page.payload == pages.content(n) for n, page in enumerate(wanted[:4])] == [True, False, True, True]
    assert backend.exists_blocking(names(6)) == 4
    assert backend.set_aside_blocking(bad)
    assert not backend.set_aside_blocking(bad)


def test_large_pages_in_parts(over: Callable[..., StorageBackend], moto: s3.MotoServer) -> None:
    """Above `multipart_size`, and only there, and whatever the parts are: the object is one."""
    size = 11 * 1024 * 1024
    backend = over("moto", multipart_size="5MiB", conditional_put=False)
    assert backend.write_blocking(outgoing(1, size=size)) == [PageResult.WRITTEN]
    wanted = incoming(1, size)
    assert backend.read_blocking(wanted) == [PageResult.HIT]
    assert wanted[0].payload == pages.content(0, size)
    assert "uploadId=" in moto.log.read_text()


def test_clear_takes_pages_of_one_namespace_and_nothing_else(
    over: Callable[..., StorageBackend], rclone: s3.RcloneServer
) -> None:
    backend = over("rclone")
    backend.write_blocking(outgoing(3))
    backend.write_blocking(outgoing(2, OTHER_NAMESPACE))
    bucket = s3.bucket(rclone.port)
    folder = f"hicache/{pages.NAMESPACE}"
    foreign = [f"{folder}/notes.txt", f"{folder}/{'0' * 64}.0-2.tmp", f"{folder}/x/{'0' * 64}.0-2", f"{folder}0/y", "z"]
    for name in foreign:
        bucket.put_blocking(name, [b"somebody's"])
    assert backend.clear_blocking(pages.NAMESPACE) == 3
    assert backend.clear_blocking(pages.NAMESPACE) == 0
    assert [bucket.size_blocking(name) for name in foreign] == [10] * 5
    assert len(s3.files(rclone, f"hicache/{OTHER_NAMESPACE}")) == 2
    bucket.delete_blocking(foreign)


def test_clear_of_more_pages_than_one_answer_names(
    open_backend: Open, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """5,200 pages: six answers of the server, and six requests that delete."""
    server, count = s3.RcloneServer(tmp_path_factory.mktemp("many")), 5200
    folder = server.file(f"hicache/{pages.NAMESPACE}")
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:064x}.0-2").write_bytes(b"a page")
    (folder / "notes.txt").write_bytes(b"somebody's")
    with server:
        backend = open_backend("s3", s3.config(server.port))
        assert backend.clear_blocking(pages.NAMESPACE) == count
        assert backend.stats()["delete_requests"] == 6
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]


def test_deletes_one_by_one_for_a_server_that_knows_no_lists(over: Callable[..., StorageBackend]) -> None:
    backend = over("moto", bulk_delete=False)
    backend.write_blocking(outgoing(3))
    assert backend.delete_blocking([*names(2), pages.layout().name(b"?" * 32)]) == 2
    assert backend.clear_blocking(pages.NAMESPACE) == 1


def test_a_prefix_that_ends_within_a_name(over: Callable[..., StorageBackend], rclone: s3.RcloneServer) -> None:
    backend = over("rclone", prefix="team/kv-")
    backend.write_blocking(outgoing(2))
    assert len(s3.files(rclone, f"team/kv-{pages.NAMESPACE}")) == 2
    assert over("rclone", prefix="team/").clear_blocking(pages.NAMESPACE) == 0
    assert backend.clear_blocking(pages.NAMESPACE) == 2


@pytest.mark.parametrize("prefix", ["", "a"])
def test_prefixes_without_a_slash(over: Callable[..., StorageBackend], prefix: str) -> None:
    backend = over("rclone", prefix=prefix)
    backend.write_blocking(outgoing(2))
    assert backend.exists_blocking(names(2)) == 2
    assert backend.clear_blocking(pages.NAMESPACE) == 2


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
    """64 look-ups and 64 reads: each batch ends after one time-out, not after four for each thread."""
    with s3.RcloneServer(tmp_path_factory.mktemp("hangs")) as server:
        assert isinstance(server, s3.RcloneServer)
        backend = open_backend("s3", s3.config(server.port, timeout_s=0.5))
        backend.write_blocking(outgoing(64))
        server.pause()
        started = time.monotonic()
        assert fault(lambda: backend.exists_blocking(names(64))).code == "timeout"
        outcomes = backend.read_blocking(incoming(64))
        took_s = time.monotonic() - started
        server.go_on()
        assert len(outcomes) == 1 and isinstance(outcomes[0], StorageError) and outcomes[0].code == "timeout"
        assert took_s < 10, took_s
        assert backend.read_blocking(incoming(64)) == [PageResult.HIT] * 64


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


def test_what_is_shown_has_no_secrets(over: Callable[..., StorageBackend]) -> None:
    backend = over("rclone", session_token="token-of-a-test")
    shown = f"{backend!r} {backend.info()} {backend.stats()}"
    assert s3.BUCKET in shown
    for secret in (s3.SECRET_KEY, s3.ACCESS_KEY, "token-of-a-test"):
        assert secret not in shown
