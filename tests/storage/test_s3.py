"""The S3 backend over real servers: what it asks for, what it stores, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from sglang_hicache.remote.s3_client import S3Bucket
from sglang_hicache.storage.backend import PageResult, StorageBackend
from tests.servers import s3
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.s3_pages import incoming, key, names, outgoing

OTHER_NAMESPACE = "c3" * 32


@pytest.fixture(scope="module", autouse=True)
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


def its_bucket(backend: StorageBackend) -> S3Bucket:
    """The bucket of a backend, as somebody else sees it."""
    return s3.bucket(int(backend.info()["place"].rpartition(":")[2]))


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


def test_what_is_shown_has_no_secrets(over: Callable[..., StorageBackend]) -> None:
    backend = over("rclone", session_token="token-of-a-test")
    shown = f"{backend!r} {backend.info()} {backend.stats()}"
    assert s3.BUCKET in shown
    for secret in (s3.SECRET_KEY, s3.ACCESS_KEY, "token-of-a-test"):
        assert secret not in shown
