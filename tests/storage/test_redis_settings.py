"""What the Redis backend may be told, and with which words the rest is refused: never with a password in them."""

from __future__ import annotations

import json

import pytest

from sglang_hicache.errors import UserError
from sglang_hicache.remote.redis_url import parse_redis_url
from sglang_hicache.storage import registry
from sglang_hicache.storage.redis_settings import RedisSettings

_URL = "redis://host:6379"


def _settings(**config: object) -> RedisSettings:
    _, settings = registry.validate_extra_config("redis", json.dumps(config))
    assert isinstance(settings, RedisSettings)
    return settings


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "url is missing; give the server, such as redis://127.0.0.1:6379/0"),
        ({"url": "http://host"}, "begins with none of redis://, rediss://, valkey://, valkeys://, unix://"),
        ({"url": "host:6379"}, "begins with none of"),
        ({"url": "redis://"}, "names no host"),
        ({"url": "redis://host:0"}, "port 0"),
        ({"url": "redis://a..b:1"}, "the name of the host has an empty part"),
        ({"url": "redis://" + "a" * 64}, "the name of the host has an empty part, or one that is too long"),
        ({"url": "redis://host:70000"}, "no valid host and port"),
        ({"url": "redis://host/one"}, "no number of a database"),
        ({"url": "redis://host/0?timeout=3"}, "options behind"),
        ({"url": "redis://host/1?db=2"}, "names its database twice"),
        ({"url": "unix://host/path"}, "three slashes"),
        ({"url": "unix://"}, "no absolute path"),
        ({"url": "unix:///" + "x" * 110}, "at most 107 bytes"),
        ({"url": _URL, "mode": "ring"}, "mode"),
        ({"url": _URL, "ttl_s": -1}, "ttl_s=-1 is not allowed; it takes seconds from 0"),
        ({"url": _URL, "ttl_s": 10**12}, "ttl_s="),
        ({"url": _URL, "timeout_s": 0}, "timeout_s=0.0 is not allowed; it takes seconds, 0.01 to 60"),
        ({"url": _URL, "connect_timeout_s": 61}, "connect_timeout_s=61.0 is not allowed"),
        ({"url": _URL, "connections": 0}, "connections=0 is not allowed; it takes 1 to 32"),
        ({"url": _URL, "connections": 33}, "connections=33 is not allowed"),
        ({"url": _URL, "prefix": ""}, "prefix='' is not allowed"),
        ({"url": _URL, "prefix": "a\n"}, "prefix"),
        ({"url": _URL, "prefix": "ä" * 101}, "1 to 200 bytes"),
        ({"url": _URL, "prefix": "a{b}c", "mode": "cluster"}, "all pages on one node"),
        ({"url": _URL, "tls_ca_file": "/ca.pem"}, "begins with rediss://"),
        ({"url": "rediss://host", "tls_ca_file": "ca.pem"}, "tls_ca_file='ca.pem' is not allowed"),
        ({"url": "rediss://host", "tls_cert_file": "/c.pem"}, "go together"),
        ({"url": _URL, "nodes": ["a:1"]}, "nodes is for the modes cluster and sentinel"),
        ({"url": _URL, "mode": "cluster", "nodes": ["a..b:1"]}, "nodes, entry 1: the name of the host"),
        ({"url": _URL, "mode": "cluster", "nodes": ["a"]}, "nodes, entry 1: it takes host:port"),
        ({"url": _URL, "mode": "cluster", "nodes": ["a:1", "me:secret@b:1"]}, "nodes, entry 2: it takes host:port"),
        ({"url": "redis://host/3", "mode": "cluster"}, "a cluster has database 0 alone"),
        ({"url": "unix:///path", "mode": "cluster"}, "mode cluster takes host and port"),
        ({"url": _URL, "mode": "sentinel"}, "mode sentinel needs it"),
        ({"url": _URL, "service_name": "pages"}, "mode sentinel needs it, no other one"),
        ({"url": _URL, "sentinel_password": "x"}, "are for mode sentinel"),
        ({"url": _URL, "host": "b"}, "unknown extra config 'host'; redis takes url, username, password, mode"),
    ],
)
def test_what_is_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        _settings(**config)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:hunter2@host:port", "redis://me:hunter#2@host", "redis://me:hunter2/3@host", "redis://me:hunter2@",
        "redis://me:hunter2@host/x", "redis://me:[hunter2@host", "redis://:hunter2@host?password=hunter2",
        "rediss:/me:hunter2@host", "unix://me:hunter2@host/path", "redis://me:hunter2@host:0",
    ],
)  # fmt: skip
def test_a_url_that_is_refused_is_not_repeated(url: str) -> None:
    with pytest.raises(UserError) as caught:
        _settings(url=url)
    assert "hunter" not in str(caught.value)


def test_placeholders_are_taken_and_checked_where_they_are_known() -> None:
    text = "${env.REDIS}"
    settings = _settings(
        url=text, password=text, username=text, prefix="${node.hostname}/", mode="cluster", nodes=[text],
        tls_ca_file=text, tls_cert_file=text, tls_key_file=text,
    )  # fmt: skip
    assert settings.place() == ""


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"url": "redis://me:hunter2@host"}, "redis://host:6379"),
        ({"url": "valkeys://me:hunter2@host:7/3"}, "rediss://host:7/3"),
        ({"url": "redis://[::1]:7?db=2"}, "redis://[::1]:7/2"),
        ({"url": "unix://me:hunter2@/run/redis.sock?db=4"}, "unix:///run/redis.sock?db=4"),
        ({"url": "redis://:hunter2@a:1", "mode": "cluster", "nodes": ["b:2"]}, "the cluster of a:1,b:2"),
        (
            {"url": "redis://:hunter2@a:1/5", "mode": "sentinel", "service_name": "m", "nodes": ["b:2"]},
            "'m' of the sentinels a:1,b:2",
        ),
    ],
)
def test_the_place_has_no_login(config: dict[str, object], place: str) -> None:
    assert _settings(**config).place() == place


def test_settings_are_shown_without_a_password() -> None:
    """Whoever prints them, or an error that has them in it, prints the place."""
    found = _settings(url="redis://me:hunter2@host", password="hunter3")
    assert repr(found) == str(found) == "<RedisSettings redis://host:6379>"


def test_user_and_password_of_a_url_are_unquoted() -> None:
    found = parse_redis_url("redis://m%40e:p%2Fw%23%3A@h%2Dost:1/9")
    assert (found.username, found.password, found.host, found.port, found.db) == ("m@e", "p/w#:", "h-ost", 1, 9)
    assert "p/w" not in repr(found)
