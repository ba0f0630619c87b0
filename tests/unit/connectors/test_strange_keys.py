"""Keys that somebody else has put into a bucket: S3 takes any text for one, and none may leave the folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.client import BaseClient
from botocore.config import Config

from sglang_hicache.connectors.source import fetch_blocking
from sglang_hicache.errors import StorageError, UserError
from tests.servers import s3
from tests.unit.connectors.conftest import SAVED


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.MotoServer]:
    """It keeps what it is given in memory, so that no file system has a say in what a key may be."""
    with s3.warm(s3.MotoServer(tmp_path_factory.mktemp("moto"))) as server:
        assert isinstance(server, s3.MotoServer)
        yield server


@pytest.fixture
def bucket(moto: s3.MotoServer) -> Iterator[BaseClient]:
    """The bucket as Amazon's own library fills it."""
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{moto.port}", region_name="us-east-1",
        aws_access_key_id=s3.ACCESS_KEY, aws_secret_access_key=s3.SECRET_KEY, config=Config(max_pool_connections=1),
    )  # fmt: skip
    yield client
    client.close()


def url(moto: s3.MotoServer, name: str) -> str:
    return f"s3://{s3.BUCKET}/{name}?endpoint=http://127.0.0.1:{moto.port}"


ESCAPING = ["../evil.json", "a/../../evil.json", "./evil.json", "/evil.json", "a//evil.json"]


@pytest.mark.parametrize("key", ESCAPING)
def test_a_key_that_would_escape_is_refused_by_name(
    key: str, moto: s3.MotoServer, bucket: BaseClient, model: Path, tmp_path: Path
) -> None:
    name = f"m{ESCAPING.index(key)}"
    for file in SAVED:
        bucket.put_object(Bucket=s3.BUCKET, Key=f"{name}/{file}", Body=(model / file).read_bytes())
    bucket.put_object(Bucket=s3.BUCKET, Key=f"{name}/{key}", Body=b"{}")
    (tmp_path / "in").mkdir()
    with pytest.raises((UserError, StorageError)) as caught:
        fetch_blocking(url(moto, name), tmp_path / "in" / "run")
    assert "evil.json" in str(caught.value)
    assert not list(tmp_path.rglob("*evil*"))


def test_what_other_tools_leave_is_no_file(
    moto: s3.MotoServer, bucket: BaseClient, model: Path, tmp_path: Path
) -> None:
    """Consoles make an empty object `folder/` for a folder."""
    for file in SAVED:
        bucket.put_object(Bucket=s3.BUCKET, Key=f"plain/{file}", Body=(model / file).read_bytes())
    bucket.put_object(Bucket=s3.BUCKET, Key="plain/folder/", Body=b"")
    found = fetch_blocking(url(moto, "plain"), tmp_path / "run")
    assert (Path(found.directory) / "templates ü" / "100% #?&=+.jinja").read_text() == "{{ odd }}"
