"""URLs of models: what is shown of them, what is secret, and what comes from the environment."""

from __future__ import annotations

import pytest

from sglang_hicache.connectors.url import filled_in, is_url, parse_url, secrets_of_url, shows_password
from sglang_hicache.errors import UserError

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "public", "name"),
    [
        ("file:///models/my%20model", "file:///models/my%20model", "my model"),
        (f"redis://:{SECRET}@host:6379/org/model", "redis://host:6379/org/model", "model"),
        (f"REDIS://user:{SECRET}@host/m?db=3", "redis://host/m?db=3", "m"),
        (f"redis://user:x@{SECRET}@host/m", "redis://host/m", "m"),
        ("s3://bucket", "s3://bucket", "bucket"),
        (
            f"s3://bucket/a/b/?endpoint=http://u:{SECRET}@h:9000&secret_key={SECRET}",
            "s3://bucket/a/b/?endpoint=http://***@h:9000&secret_key=***",
            "b",
        ),
    ],
)
def test_what_is_shown_has_no_secret(url: str, public: str, name: str) -> None:
    found = parse_url(url)
    assert (found.public, found.name) == (public, name)
    assert SECRET not in found.public and SECRET not in repr(found)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:pass/{SECRET}@host/m",
        f"redis://:pass#{SECRET}@host/m",
        f"redis://:pass?{SECRET}@host/m",
        f"redis://:{SECRET}?a=b@host/m",
        f"redis://:123?a={SECRET}@host/m",
        f"redis://:{SECRET}?a=b",
        f"redis://[{SECRET}/m",
        f"redis://host/m?{SECRET}",
        f"redis://host/m?db=1&db={SECRET}",
        f"redis://host/{SECRET}%00",
        f"{SECRET}",
        f"1{SECRET}://x",
    ],
)
def test_a_url_that_is_wrong_is_not_repeated(url: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_url(url)
    assert SECRET not in str(caught.value).removeprefix(f"the {SECRET}")


def test_which_texts_are_secret() -> None:
    assert secrets_of_url("redis://u:p%40ss@host/m") == ["p%40ss", "p@ss"]
    assert secrets_of_url("redis://user@host/m") == [] and secrets_of_url("/a/folder") == []


def test_the_environment_fills_a_url_and_quotes_it() -> None:
    url = filled_in("redis://${env.WHO}:${env.WORD}@host/m", {"WHO": "me", "WORD": "a/b@c#d%e"})
    found = parse_url(url)
    assert found.login == "me:a%2Fb%40c%23d%25e" and found.host == "host" and found.path == "m"
    assert secrets_of_url(url)[1] == "a/b@c#d%e"


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(UserError, match="WORD is not set"):
        filled_in("redis://:${env.WORD}@host/m", {})


@pytest.mark.parametrize("text", ["${node.ip}", "${rank}", "${env.}", "${env.A-B}", "${", "${env.SET}${x}"])
def test_only_variables_are_filled_in(text: str) -> None:
    with pytest.raises(UserError, match="only \\${env.NAME} can be filled in"):
        filled_in(f"redis://{text}/m", {"SET": "1"})


def test_a_password_on_the_command_line_is_seen() -> None:
    assert shows_password("redis://:word@host/m") and shows_password("redis://:a${env.B}@host/m")
    for url in ("redis://:${env.WORD}@host/m", "redis://user@host/m", "redis://host/m", "/folder", "s3://bucket/m"):
        assert not shows_password(url)


def test_what_a_url_is() -> None:
    assert is_url("s3://bucket/x") and not is_url("owner/name") and not is_url("/models/a:b")
