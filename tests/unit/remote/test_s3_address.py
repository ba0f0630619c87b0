"""Addresses, buckets, prefixes and URLs of S3 stores, and where keys come from when nobody gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.remote.s3_address import check_bucket, check_endpoint, check_prefix, parse_s3_url, with_bucket
from sglang_hicache.remote.s3_client import S3Bucket, S3Endpoint
from sglang_hicache.remote.s3_credentials import NoCredentials, endpoint_of, profile_keys, region_of


@pytest.mark.parametrize(
    "endpoint",
    ["http://10.0.0.7:9000", "https://s3.example.com", "http://[::1]:9000", "http://minio:9000/path", "https://a_b.c"],
)
def test_addresses(endpoint: str) -> None:
    check_endpoint(endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        "10.0.0.7:9000", "ftp://x", "http://", "http://a b", "http://x:0", "http://x:70000", "http://x/?q", "http://x#f",
        "http:///path", " http://x", "http://x\n", "http://bücher.example", "s3://x", "http://[::1",
    ],
)  # fmt: skip
def test_what_is_no_address(endpoint: str) -> None:
    """Some of these end the library with more than an exception."""
    with pytest.raises(ValueError, match="it takes http:// or https://, a host"):
        check_endpoint(endpoint)


@pytest.mark.parametrize("endpoint", ["http://user:hush@host:9000", "http://:hush@host", "https://hush@host"])
def test_a_password_in_an_address_is_not_repeated(endpoint: str) -> None:
    with pytest.raises(ValueError, match="a user or a password") as error:
        check_endpoint(endpoint)
    assert "hush" not in str(error.value)


@pytest.mark.parametrize("bucket", ["", "a", "a/b", "-a", "a b", "a?b", "ä" * 3, "a" * 300])
def test_what_is_no_bucket(bucket: str) -> None:
    with pytest.raises(ValueError, match="bucket=.*is not allowed"):
        check_bucket(bucket)


def test_prefixes() -> None:
    for good in ("", "hicache/", "team/kv-", "a", "a b/", "ä/"):
        check_prefix(good)
    for bad in ("/", "/a", "a//b", "./a", "a/../b/", "..", "a/.", "a\n/"):
        with pytest.raises(ValueError, match="prefix=.*is not allowed"):
            check_prefix(bad)


def test_urls() -> None:
    assert parse_s3_url("s3://models") == ("models", "")
    assert parse_s3_url("s3://models/") == ("models", "")
    assert parse_s3_url("s3://models/a/b//") == ("models", "a/b/")
    for bad in ("http://models/a", "s3:///a", "s3://key:hush@models/a", "s3://models//a"):
        with pytest.raises(ValueError) as error:
            parse_s3_url(bad)
        assert "hush" not in str(error.value)
    assert with_bucket("https://s3.example.com:9000", "b") == "https://b.s3.example.com:9000"


def test_keys_of_a_profile(tmp_path: Path) -> None:
    folder = tmp_path / ".aws"
    folder.mkdir()
    (folder / "credentials").write_text(
        "[default]\naws_access_key_id = A\naws_secret_access_key = B%\n"
        "[other]\naws_access_key_id=C\naws_secret_access_key=D\naws_session_token=E\n"
    )
    (folder / "config").write_text("[default]\nregion = eu-west-1\n[profile other]\nregion = eu-south-2\n")
    home = {"HOME": str(tmp_path)}
    found = profile_keys(home)
    assert found is not None
    keys = found()
    assert (keys["access_key_id"], keys["secret_access_key"], keys["token"]) == ("A", "B%", None)
    other = profile_keys(home | {"AWS_PROFILE": "other"})
    assert other is not None and other()["token"] == "E"
    assert region_of(home) == "eu-west-1"
    assert region_of(home | {"AWS_PROFILE": "other"}) == "eu-south-2"
    assert region_of(home | {"AWS_REGION": "x"}) == "x"
    # Whoever rotates keys writes new ones into the file.
    (folder / "credentials").write_text("[default]\naws_access_key_id = F\naws_secret_access_key = G\n")
    assert found()["access_key_id"] == "F"


def test_what_comes_before_a_profile_and_what_after(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("[default]\naws_access_key_id = A\naws_secret_access_key = B\n")
    file = {"HOME": str(tmp_path), "AWS_SHARED_CREDENTIALS_FILE": str(path)}
    assert profile_keys(file | {"AWS_ACCESS_KEY_ID": "x"}) is None
    assert profile_keys(file | {"AWS_WEB_IDENTITY_TOKEN_FILE": "/x"}) is None
    assert profile_keys(file | {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://x"}) is not None
    nothing = {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.raises(NoCredentials):
        profile_keys(nothing)
    assert profile_keys(nothing | {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://x"}) is None
    assert region_of(nothing) == "us-east-1"


@pytest.mark.parametrize("content", ["no profiles", "[default]\nkeys without values", "\x00\xff"])
def test_a_file_that_is_none_has_no_keys(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content, encoding="latin-1")
    environment = {"HOME": str(tmp_path), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "keys")}
    assert profile_keys(environment) is None


def test_the_server_of_the_environment() -> None:
    assert endpoint_of({}) == ""
    assert endpoint_of({"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_S3": "http://b"}) == "http://b"


def test_an_address_of_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "nonsense")
    with pytest.raises(StorageError, match="it takes http://") as error:
        S3Bucket(S3Endpoint(bucket="abc", access_key="a", secret_key="b"))
    assert error.value.code == "bad_config"


def test_one_key_alone_is_refused() -> None:
    with pytest.raises(StorageError, match="access_key and secret_key come together") as error:
        S3Bucket(S3Endpoint(bucket="abc", secret_key="hush"))
    assert "hush" not in str(error.value)
    assert "hush" not in repr(S3Endpoint(bucket="abc", access_key="x", secret_key="hush", session_token="hush"))


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_keys_of_the_environment_that_nobody_could_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that ends with a line break, read into a variable: the library would end with a panic at its first
    request, or sign with another key."""
    keys = {"AWS_ACCESS_KEY_ID": "hush1", "AWS_SECRET_ACCESS_KEY": "hush2", "AWS_SESSION_TOKEN": "hush3"}
    for key, text in keys.items():
        monkeypatch.setenv(key, f"{text}\n" if key == name else text)
    with pytest.raises(StorageError, match=f"{name} begins or ends with a space") as error:
        S3Bucket(S3Endpoint(bucket="abc"))
    assert error.value.code == "bad_config" and "hush" not in str(error.value)


def test_an_address_with_a_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the extra config is refused before anything is made of it; this one comes from the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hush@host:9000")
    endpoint = S3Endpoint(bucket="abc", access_key="a", secret_key="b")
    assert endpoint.place() == "s3://abc/"
    with pytest.raises(StorageError, match="a user or a password") as error:
        S3Bucket(endpoint)
    assert "hush" not in str(error.value)
