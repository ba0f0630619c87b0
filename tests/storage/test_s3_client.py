"""The bucket that store and connectors share: objects, listings, and requests by the usual keys."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.remote.s3_client import S3Bucket, S3Endpoint
from tests.servers import s3


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    s3.warm_up()


@pytest.fixture(scope="module", params=["rclone", "moto"])
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    kind = s3.RcloneServer if request.param == "rclone" else s3.MotoServer
    with s3.warm(kind(tmp_path_factory.mktemp(request.param))) as server:
        assert isinstance(server, (s3.RcloneServer, s3.MotoServer))
        yield server.port


@pytest.fixture
def bucket(port: int) -> Iterator[S3Bucket]:
    found = s3.bucket(port, prefix="models/")
    yield found
    found.delete_blocking([key for key, _ in found.list_blocking()])
    found.close()


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment that says nothing of Amazon."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_an_object_from_its_first_byte_to_its_end(bucket: S3Bucket) -> None:
    content = bytes(range(256)) * 40
    assert bucket.get_blocking("a/b") is None and bucket.size_blocking("a/b") is None
    assert bucket.open_blocking("a/b") is None and bucket.get_range_blocking("a/b", 0, 1) is None
    assert bucket.put_blocking("a/b", [content[:100], memoryview(content)[100:]])
    assert bucket.get_blocking("a/b") == content
    assert bucket.size_blocking("a/b") == len(content)
    opened = bucket.open_blocking("a/b")
    assert opened is not None
    assert (opened[0], b"".join(opened[1])) == (len(content), content)
    bucket.delete_blocking(["a/b", "never/there"])
    assert bucket.size_blocking("a/b") is None


def test_parts_of_an_object(bucket: S3Bucket) -> None:
    """One of the servers answers with the whole object's status, which the library refuses."""
    content = bytes(range(256)) * 4000
    bucket.put_blocking("x", [content])
    for start, length in ((0, 1), (0, 256), (1000, 5000), (len(content) - 10, 10), (len(content) - 10, 100)):
        assert bucket.get_range_blocking("x", start, length) == content[start : start + length]
    assert bucket.get_range_blocking("x", len(content), 10) == b""


def test_content_in_parts(bucket: S3Bucket) -> None:
    content = os.urandom(11 * 1024 * 1024)
    bucket.put_blocking("large", [content[:777], content[777:]], part_bytes=5 * 1024 * 1024)
    assert bucket.get_blocking("large") == content


@pytest.mark.parametrize("key", ["a b", "ä/ö", "100%", "%41", "a+b&c=d?e#f", "~x..", "q'\"<>|*", "x" * 200])
def test_odd_keys(bucket: S3Bucket, key: str) -> None:
    bucket.put_blocking(key, [b"odd"])
    assert bucket.get_blocking(key) == b"odd"
    assert list(bucket.list_blocking()) == [(key, 3)]
    bucket.delete_blocking([key])
    assert list(bucket.list_blocking()) == []


@pytest.mark.parametrize("key", ["a//b", "a/../b", "./a", "tab\there"])
def test_keys_that_cannot_be_named(bucket: S3Bucket, key: str) -> None:
    with pytest.raises(StorageError) as error:
        bucket.put_blocking(key, [b""])
    assert (error.value.reason, error.value.code) == ("refused", "bad_config")


def test_listings_by_prefix(bucket: S3Bucket) -> None:
    for key in ("a/1", "a/2", "ab", "b/a/1"):
        bucket.put_blocking(key, [key.encode()])
    found = {
        prefix: sorted(key for key, _ in bucket.list_blocking(prefix)) for prefix in ("", "a", "a/", "b", "c", "a/1")
    }
    assert found == {
        "": ["a/1", "a/2", "ab", "b/a/1"], "a": ["a/1", "a/2", "ab"], "a/": ["a/1", "a/2"], "b": ["b/a/1"], "c": [],
        "a/1": ["a/1"],
    }  # fmt: skip


def test_only_new(tmp_path_factory: pytest.TempPathFactory) -> None:
    with s3.MotoServer(tmp_path_factory.mktemp("moto")) as server:
        assert isinstance(server, s3.MotoServer)
        found = s3.bucket(server.port)
        assert found.put_blocking("x", [b"1"], only_new=True)
        assert not found.put_blocking("x", [b"2"], only_new=True)
        assert found.get_blocking("x") == b"1"


def test_keys_and_server_of_the_environment(port: int, no_aws: pytest.MonkeyPatch) -> None:
    no_aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    no_aws.setenv("AWS_ACCESS_KEY_ID", s3.ACCESS_KEY)
    no_aws.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET_KEY)
    S3Bucket(S3Endpoint(bucket=s3.BUCKET)).check_blocking()


def test_keys_of_a_profile(port: int, no_aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"[team]\naws_access_key_id={s3.ACCESS_KEY}\naws_secret_access_key={s3.SECRET_KEY}\n")
    no_aws.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    no_aws.setenv("AWS_PROFILE", "team")
    S3Bucket(S3Endpoint(bucket=s3.BUCKET, endpoint=f"http://127.0.0.1:{port}")).check_blocking()


def test_given_keys_come_before_all_others(port: int, no_aws: pytest.MonkeyPatch) -> None:
    """And nobody asks the machine for its role, which takes seconds where it has none."""
    no_aws.setenv("AWS_ACCESS_KEY_ID", "AKIDOFNOBODY")
    no_aws.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    with s3.ScriptedServer(lambda _: s3.refusal(500, "InternalError")) as machine:
        no_aws.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{machine.port}")
        s3.bucket(port).check_blocking()
        assert machine.requests == []


def test_given_keys_bring_nothing_of_other_keys_along(no_aws: pytest.MonkeyPatch) -> None:
    """A machine of Amazon's has a token for its own keys in the environment, and the store is somebody else's."""
    no_aws.setenv("AWS_SESSION_TOKEN", "token-of-others")
    no_aws.setenv("AWS_SKIP_SIGNATURE", "true")
    with s3.ScriptedServer(lambda _: s3.content(b"")) as server:
        s3.bucket(server.port).check_blocking()
        headers = server.requests[0].headers
        assert headers["x-amz-security-token"] is None
        assert f"Credential={s3.ACCESS_KEY}/" in headers["Authorization"]


def test_a_machine_without_a_role(no_aws: pytest.MonkeyPatch) -> None:
    with s3.ScriptedServer(lambda _: s3.refusal(404, "NoSuchRole")) as machine:
        no_aws.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{machine.port}")
        with pytest.raises(StorageError, match="no access key that could be used was found") as error:
            S3Bucket(S3Endpoint(bucket=s3.BUCKET, retries=0)).check_blocking()
        assert error.value.code == "wrong_password"
        assert machine.requests


def test_a_session_token_travels(no_aws: pytest.MonkeyPatch) -> None:
    with s3.ScriptedServer(lambda _: s3.content(b"")) as server:
        s3.bucket(server.port, session_token="token-of-a-test").check_blocking()
        assert server.requests[0].headers["x-amz-security-token"] == "token-of-a-test"


@pytest.mark.parametrize(("sign", "expected"), [(True, False), (False, True), (None, False)])
def test_content_is_signed_where_nothing_else_protects_it(sign: bool | None, expected: bool) -> None:
    with s3.ScriptedServer(lambda _: s3.content(b"")) as server:
        s3.bucket(server.port, sign_payload=sign).put_blocking("x", [b"1"])
        assert (server.requests[0].headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD") is expected


def test_a_bucket_in_the_host(no_aws: pytest.MonkeyPatch) -> None:
    """Some machines know every name below `localhost`, others do not: in the path it would always arrive."""
    with s3.ScriptedServer(lambda _: s3.content(b"")) as server:
        endpoint = f"http://localhost:{server.port}"
        with contextlib.suppress(StorageError):
            s3.bucket(server.port, endpoint=endpoint, path_style=False, bucket="abc").put_blocking("x", [b"1"])
        assert {request.headers["Host"].partition(":")[0] for request in server.requests} <= {"abc.localhost"}


@pytest.mark.parametrize(
    ("key", "reason", "code"), [("models/x", "refused", "no_permission"), ("models/never-asked", "io", "")]
)
def test_one_of_many_that_is_not_deleted(key: str, reason: str, code: str) -> None:
    """The server names it, with a reason of its own.  Where it names another one the library ends with a panic, which
    is no `Exception`: the lane that asked would end with it, and nobody would be told."""
    words = f"<Error><Key>{key}</Key><Code>AccessDenied</Code><Message>not you</Message></Error>"
    answer = s3.content(f"<DeleteResult>{words}</DeleteResult>".encode())
    with s3.ScriptedServer(lambda _: answer) as server:
        with pytest.raises(StorageError, match="not you" if code else "PanicException") as error:
            s3.bucket(server.port, prefix="models/").delete_blocking(["x", "y"])
        assert (error.value.reason, error.value.code) == (reason, code)


def test_a_key_that_the_library_cannot_name_keeps_nobody_away() -> None:
    """Somebody has put it below our prefix: there is a list, and that is all that is asked."""
    listed = b"<ListBucketResult><Contents><Key>models//x</Key><LastModified>2026-11-28T13:00:00.000Z</LastModified>"
    listed += b'<ETag>"e"</ETag><Size>1</Size></Contents></ListBucketResult>'
    with s3.ScriptedServer(lambda _: s3.content(listed), lists=False) as server:
        s3.bucket(server.port, prefix="models/").check_blocking()
        with pytest.raises(StorageError, match="models//x") as error:
            list(s3.bucket(server.port, prefix="models/").list_blocking())
        assert (error.value.reason, error.value.code) == ("refused", "foreign_format")


@pytest.mark.parametrize(
    ("answer", "words", "code"),
    [
        ((200, {"Content-Length": "-5"}, b"x"), "no answer of an S3 server", "bad_config"),
        ((302, {"Location": "/elsewhere"}, b""), "sends us elsewhere", "bad_config"),
        ((200, {"Last-Modified": "lately"}, b"x"), "Generic S3 error: Invalid last modified 'lately'", ""),
    ],
)
def test_answers_of_somebody_who_is_no_s3_server(answer: s3.Answer, words: str, code: str) -> None:
    """What was wrong is said, and not the request that was sent."""
    with s3.ScriptedServer(lambda _: answer) as server:
        with pytest.raises(StorageError, match=words) as error:
            s3.bucket(server.port, retries=0).get_blocking("x")
        assert error.value.code == code and "GET" not in str(error.value)


def test_a_server_that_sends_more_than_was_asked_for_fills_no_memory() -> None:
    """1. 100 bytes are asked for.  2. The answer says that it is a thousand times a mebibyte, and goes on.  3. The
    caller gets its bytes at once, and the server finds nobody who reads the rest."""
    block, blocks, sent = bytes(range(256)) * 4096, 1000, 0

    def pour() -> None:
        nonlocal sent
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(
                b'HTTP/1.1 206 Partial Content\r\nETag: "e"\r\nLast-Modified: Sat, 28 Nov 2026 13:00:00 GMT\r\n'
                b"Content-Range: bytes 0-99/%d\r\nContent-Length: %d\r\n\r\n" % ((len(block) * blocks,) * 2)
            )
            while sent < blocks:
                connection.sendall(block)
                sent += 1

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=pour)
        server.start()
        bucket = s3.bucket(listener.getsockname()[1], retries=0)
        found = bucket.get_range_blocking("x", 0, 100)
        server.join()
        bucket.close()
    assert found == block[:100]
    assert sent < blocks, "all of it was fetched"
