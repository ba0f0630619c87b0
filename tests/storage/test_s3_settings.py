"""What the S3 backend may be told, and with which words the rest is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest

from sglang_hicache.errors import UserError
from sglang_hicache.storage import registry
from sglang_hicache.storage.diagnosis import diagnose
from sglang_hicache.storage.s3_settings import S3Settings

_GOOD = {"bucket": "pages", "access_key": "AKID", "secret_key": "hush"}


def settings(**config: Any) -> S3Settings:
    _, found = registry.validate_extra_config("s3", msgspec.json.encode(config).decode())
    assert isinstance(found, S3Settings)
    return found


def test_a_bucket_is_enough() -> None:
    found = settings(bucket="pages")
    assert (found.prefix, found.parallel, found.multipart_bytes()) == ("hicache/", 16, 32 * 1024 * 1024)
    assert found.place() == "s3://pages/hicache/"
    assert settings(bucket="pages", endpoint="http://h:9").place() == "s3://pages/hicache/ on http://h:9"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "bucket is missing"),
        ({"bucket": "a/b"}, "bucket='a/b' is not allowed"),
        ({"bucket": "pages", "endpoint": "h:9000"}, "it takes http:// or https://"),
        ({"bucket": "pages", "prefix": "/x"}, "prefix='/x' is not allowed"),
        ({"bucket": "pages", "prefix": "x" * 701}, "prefix has 701 bytes"),
        ({"bucket": "pages", "access_key": "AKID"}, "access_key and secret_key go together"),
        ({"bucket": "pages", "secret_key": "hush"}, "access_key and secret_key go together"),
        ({"bucket": "pages", "session_token": "hush"}, "session_token goes with"),
        ({**_GOOD, "tls_ca_file": "ca.pem"}, "tls_ca_file='ca.pem' is not allowed"),
        ({**_GOOD, "parallel": 0}, "parallel=0 is not allowed"),
        ({**_GOOD, "parallel": 257}, "parallel=257 is not allowed"),
        ({**_GOOD, "timeout_s": 0}, "timeout_s=0.0 is not allowed"),
        ({**_GOOD, "connect_timeout_s": 61}, "connect_timeout_s=61.0 is not allowed"),
        ({**_GOOD, "retries": -1}, "retries=-1 is not allowed"),
        ({**_GOOD, "multipart_size": "1MiB"}, "multipart_size='1MiB' is not allowed"),
        ({**_GOOD, "multipart_size": "much"}, "much"),
        ({**_GOOD, "max_workers": 16}, "unknown extra config 'max_workers'; s3 takes bucket, "),
        ({**_GOOD, "endpoint": "http://me:hush@h"}, "a user or a password"),
        ({**_GOOD, "secret_key": "hush\n"}, "secret_key begins or ends with a space, or holds a line break"),
        ({**_GOOD, "access_key": "hu\nsh"}, "access_key begins or ends"),
        ({**_GOOD, "access_key": "hushä"}, "access_key begins or ends"),
        ({**_GOOD, "session_token": " hush"}, "session_token begins or ends"),
        ({**_GOOD, "region": "us east"}, "region='us east' is not allowed"),
        ({**_GOOD, "endpoint": "http://10.0.0.1:9", "path_style": False}, "10.0.0.1 is a number"),
        ({**_GOOD, "endpoint": "http://[::1]:9", "path_style": False}, r"\[::1\] is a number"),
    ],
)
def test_what_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        settings(**config)
    assert "hush" not in str(error.value)


def test_placeholders_are_checked_where_they_are_filled_in() -> None:
    found = settings(
        bucket="${env.BUCKET}",
        endpoint="${env.S3_URL}",
        prefix="${node.hostname}/",
        access_key="${env.AWS_ACCESS_KEY_ID}",
        secret_key="${env.AWS_SECRET_ACCESS_KEY}",
        tls_ca_file="${env.CA}",
        multipart_size="${env.SIZE}",
    )
    assert found.endpoint == "${env.S3_URL}"


def test_no_secret_is_shown() -> None:
    found = settings(**_GOOD, session_token="hush", endpoint="http://h:9")
    assert "hush" not in f"{found!r} {found} {found.place()}" and "AKID" not in repr(found)
    assert "hush" not in str(diagnose(ValueError("no"), "s3", found))


def test_the_library_is_imported_by_whoever_uses_it() -> None:
    """A process that only judges a command starts without it."""
    code = (
        "import sys; from sglang_hicache.storage import registry; "
        "registry.validate_extra_config('s3', '{\"bucket\": \"pages\"}'); print('obstore' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
