"""What every connector does, over a real server of its kind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_hicache.connectors import (
    BaseFileSystemConnector,
    BaseKVConnector,
    ConnectorType,
    create_remote_connector,
    file,
)
from sglang_hicache.errors import StorageError, UserError
from tests.servers import s3
from tests.servers.program import free_port
from tests.servers.redis import Certificates, TlsServer
from tests.unit.connectors.conftest import PASSWORD, Open, Places

ODD_KEYS = [
    "a b", "ü/ñ/日本", "100%", "a%2Fb", "#?&=+", "[x]*", "it's", "a\\b", "(1)", "~tilde", "x" * 200, ".hidden",
    "a,b;c:d@e$f!",
]  # fmt: skip
MANY = [f"files/{number:05d}" for number in range(5000)]


def test_bytes_come_back_whole_and_in_parts(kind: str, connect: Open) -> None:
    place = connect(kind)
    data = bytes(range(256)) * 100
    place.write_blocking("folder/binary", data)
    place.write_blocking("folder/empty", b"")
    assert bytes(place.read_blocking("folder/binary")) == data
    assert bytes(place.read_blocking("folder/binary", 100, 50)) == data[100:150]
    assert bytes(place.read_blocking("folder/binary", 0, 50)) == data[:50]
    assert bytes(place.read_blocking("folder/binary", 25500)) == data[25500:]
    assert bytes(place.read_blocking("folder/empty")) == b""
    assert place.sizes_blocking(["folder/empty", "none", "folder/binary"]) == [0, None, len(data)]
    place.write_blocking("folder/binary", b"other")
    assert bytes(place.read_blocking("folder/binary")) == b"other"
    place.delete_blocking(["folder/binary", "folder/binary", "none"])
    assert place.find_blocking("folder/binary") is None
    assert [entry.key for entry in place.entries_blocking()] == ["folder/empty"]


def test_a_key_that_is_not_there_is_named(kind: str, connect: Open) -> None:
    place = connect(kind)
    with pytest.raises(StorageError, match=r"nothing under the key 'no/such key'") as caught:
        place.read_blocking("no/such key")
    assert caught.value.code == "not_found" and place.url in str(caught.value)


def test_keys_with_odd_characters(kind: str, connect: Open) -> None:
    place = connect(kind)
    for number, key in enumerate(ODD_KEYS):
        place.write_blocking(key, b"%d" % number)
    assert [bytes(place.read_blocking(key)) for key in ODD_KEYS] == [b"%d" % n for n in range(len(ODD_KEYS))]
    assert sorted(entry.key for entry in place.entries_blocking()) == sorted(ODD_KEYS)
    assert [entry.key for entry in place.entries_blocking("[x")] == ["[x]*"]
    place.delete_blocking(ODD_KEYS)
    assert not list(place.entries_blocking())


def test_two_places_in_one_store_do_not_see_each_other(kind: str, connect: Open, places: Places) -> None:
    """`m` and `m2`: one name is the beginning of the other."""
    one, two = (connect(url=places.at(kind, f"{kind}-{name}")) for name in ("m", "m2"))
    one.write_blocking("key", b"1")
    two.write_blocking("key", b"2")
    assert [entry.key for entry in one.entries_blocking()] == ["key"]
    one.delete_blocking(["key"])
    assert bytes(two.read_blocking("key")) == b"2" and one.find_blocking("key") is None


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, places: Places) -> Iterator[dict[str, str]]:
    """Places with 5,000 objects, by kind."""
    folder = tmp_path_factory.mktemp("many")
    rclone = s3.RcloneServer(folder)
    for root in (folder / "file", rclone.file("m")):
        (root / "files").mkdir(parents=True)
        for key in MANY:
            (root / key).write_bytes(b"12")
    with places.redis.client() as client, client.pipeline(transaction=False) as pipe:
        for key in MANY:
            pipe.set(f"many/{key}", b"12")
        pipe.execute()
    # After its files: those that come behind its back it sees minutes later.
    with rclone:
        where = f"s3://{s3.BUCKET}/m?endpoint=http://127.0.0.1:{rclone.port}"
        yield {"file": f"file://{folder}/file", "redis": places.at("redis", "many"), "s3": where}


def test_a_listing_has_all_of_five_thousand(kind: str, connect: Open, many: dict[str, str]) -> None:
    """One answer of a server has a thousand keys; elsewhere a listing ended there."""
    found = list(connect(url=many[kind]).entries_blocking("files/"))
    assert sorted(entry.key for entry in found) == MANY and {entry.size_bytes for entry in found} == {2}


def test_kinds_are_flags(connect: Open) -> None:
    redis, file, bucket = (connect(kind) for kind in ("redis", "file", "s3"))
    for place, own, other in (
        (redis, ConnectorType.KV, ConnectorType.FS),
        (file, ConnectorType.FS, ConnectorType.KV),
        (bucket, ConnectorType.FS, ConnectorType.KV),
    ):
        assert place.type & own and place.type & ConnectorType.WEIGHT and not place.type & other


def test_the_interface_of_values(connect: Open) -> None:
    place = connect("redis")
    assert isinstance(place, BaseKVConnector)
    place.set("binary", b"\xff\0")
    place.setstr("text", "ü")
    assert place.get("binary") == b"\xff\0" and place.getstr("text") == "ü"
    assert place.get("none") is None and place.getstr("none") is None
    assert sorted(place.list()) == ["binary", "text"] and list(place.list("t")) == ["text"]
    place.delete("text", "none")
    assert not place.exists("text") and place.exists("binary")


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_the_interface_of_files(kind: str, connect: Open) -> None:
    place = connect(kind)
    assert isinstance(place, BaseFileSystemConnector)
    place.write_blocking("config.json", b"{}")
    place.write_blocking("sub/more.json", b"[]")
    place.write_blocking("model.safetensors", b"0123456789")
    assert place.glob("*.json") == ["config.json", "sub/more.json"] and place.glob("nothing*") == []
    assert [tuple(entry) for entry in place.list("sub/")] == [("sub/more.json", 2)]
    assert bytes(place.read("model.safetensors", 2, 3)) == b"234"
    folder = Path(place.pull_files())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {"config.json", "sub/more.json"}
    again = place.pull_files(str(folder / "again"), allow=("*.safetensors",), ignore=())
    assert [path.name for path in Path(again).iterdir()] == ["model.safetensors"]
    place.close()
    assert not folder.exists()


def test_a_connector_takes_over_no_signals(kind: str, connect: Open) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with connect(kind) as place:
        place.write_blocking("key", b"value")
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("key", ["../up", "a/../../up", "/etc/x", "a//b", "nul\0"])
def test_a_folder_is_not_left(connect: Open, key: str) -> None:
    with pytest.raises(UserError, match="would lead out of the folder"):
        connect("file").write_blocking(key, b"x")


def test_what_a_folder_cannot_tell_is_a_fault_that_names_the_key(
    places: Places, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = places.new("file")
    place = connect(url=url)
    place.write_blocking("a/b", b"1")
    with pytest.raises(StorageError, match=r"cannot look up the key 'x+': File name too long"):
        place.sizes_blocking(["x" * 300])

    def scandir(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(StorageError, match=r"cannot list the key '.': Permission denied"):
            list(place.entries_blocking())
    place.delete_blocking(["a/b/c", "no/such/folder"])
    assert place.sizes_blocking(["a/b", "a/b/c", "a"]) == [1, None, None]


def test_new_folders_outlive_the_power(connect: Open, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    url = places.new("file")
    root = Path(url.removeprefix("file://").replace("%20", " "))
    root.mkdir(parents=True)
    synced: list[Path] = []
    monkeypatch.setattr(file, "sync_folder_blocking", synced.append)
    for key, wanted in (("a/b/one", ["a/b", "a", "."]), ("a/b/two", ["a/b"])):
        connect(url=url).write_blocking(key, b"x")
        assert synced == [root / name for name in wanted]
        synced.clear()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://host/model", "no connector for http:// URLs; allowed are file:///path, redis://"),
        ("instance://host:1", "no connector for instance://"),
        ("/a/folder", "no URL of a model; allowed are"),
        ("redis://host:6379", "stands the name of a model"),
        ("redis://host:6379/0", "a database is \\?db=N"),
        ("redis://host/m?db=x", "db is the number"),
        ("redis://host/m?database=1", "unknown option database"),
        ("redis://host:port/m", "no valid host and port"),
        ("redis://host/../m", "would lead out"),
        ("rediss://host/m?tls_check_hostname=maybe", "yes or no"),
        ("file://elsewhere/m", "three slashes"),
        ("file://", "three slashes"),
        ("s3://", "bucket"),
        ("s3://key:secret@bucket/m", "holds no keys"),
        ("s3://bucket/a//b", "prefix"),
        ("s3://bucket/m?endpoint=ftp://x", "endpoint"),
        ("s3://bucket/m?path_style=1", "yes or no"),
    ],
)
def test_a_url_that_nobody_can_use_says_what_is_allowed(url: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        create_remote_connector(url)
    assert "secret" not in str(caught.value)


def test_valkey_means_the_same(connect: Open, places: Places) -> None:
    url = places.new("redis")
    connect(url=url).write_blocking("key", b"value")
    assert connect(url=url.replace("redis", "valkey")).find_blocking("key") == b"value"


def test_a_server_with_tls(places: Places, tmp_path: Path) -> None:
    """Its certificate is checked, by the authorities that the URL names."""
    certificates = Certificates(tmp_path / "certificates")
    server = TlsServer(tmp_path / "tls", certificates, ["127.0.0.1"], "--tls-auth-clients", "no")
    with server, create_remote_connector(f"{server.tls_url}/m?tls_ca_file={certificates.ca_file}") as place:
        place.write_blocking("key", b"value")
        assert place.find_blocking("key") == b"value"
        with create_remote_connector(f"{server.tls_url}/m") as strict, pytest.raises(StorageError) as caught:
            strict.find_blocking("key")
    assert caught.value.code == "tls"


def test_a_database_is_an_option(connect: Open, places: Places) -> None:
    url = places.new("redis")
    connect(url=f"{url}?db=3").write_blocking("key", b"value")
    assert connect(url=url).find_blocking("key") is None
    with places.redis.client(db=3) as client:
        assert client.dbsize() == 1


def test_wrong_keys_are_refused_and_not_repeated(
    connect: Open, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="cannot read the key 'k'.*invalid username-password") as caught:
        connect(url=f"redis://:wrongword@127.0.0.1:{places.redis.port}/m").find_blocking("k")
    assert caught.value.code == "wrong_password" and "wrongword" not in str(caught.value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongword")
    with pytest.raises(StorageError, match="get k") as caught:
        connect("s3").find_blocking("k")
    assert caught.value.code in ("wrong_password", "no_permission") and "wrongword" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "says"),
    [("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch")],
)
def test_what_is_wrong_with_the_keys_is_said_by_the_first_question(
    variable: str, says: str, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody begins with the size of the list: an answer without a body, and so without a reason."""
    monkeypatch.setenv(variable, "wrongword")
    with pytest.raises(StorageError, match=says) as caught:
        connect("s3").manifest_blocking()
    assert caught.value.code == "wrong_password" and "wrongword" not in str(caught.value)


def test_nothing_shows_a_password(connect: Open) -> None:
    place = connect("redis")
    assert "@" not in place.url and PASSWORD not in repr(place) and "p%40ss" not in repr(vars(place))


def test_a_server_that_is_not_there_is_named(connect: Open) -> None:
    port = free_port()
    with pytest.raises(StorageError, match=f"redis://127.0.0.1:{port}/m: cannot read the key 'k'.*refused"):
        connect(url=f"redis://127.0.0.1:{port}/m").find_blocking("k")


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("redis://host/m", "redis", "redis"), ("s3://bucket/m", "obstore", "s3")]
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = [f"sglang_hicache.{name}_client" for name in ("remote.redis", "remote.s3")]
    ours += [f"sglang_hicache.connectors.{extra}", "sglang_hicache.remote.s3_errors"]
    for name in list(sys.modules):
        if name in ours:
            monkeypatch.delitem(sys.modules, name)
        elif name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"need the package '{package}'.*pip install 'sglang-hicache\[{extra}\]'"):
        create_remote_connector(url)


def test_only_who_uses_a_store_pays_for_its_library() -> None:
    code = (
        "import sys, sglang_hicache.connectors, sglang_hicache.save_model as m; "
        "m.create_remote_connector('file:///x'); "
        "print([name for name in ('torch', 'redis', 'obstore', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
