"""What errors of Redis are to an operator, and that no password is in them."""

from __future__ import annotations

import ssl

import pytest
import redis
from redis import exceptions
from redis.sentinel import MasterNotFoundError, Sentinel

from sglang_hicache.remote.redis_client import RedisEndpoint, storage_error
from sglang_hicache.storage.diagnosis import ADVICE


def _behind(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (exceptions.AuthenticationError("invalid username-password pair"), "refused", "wrong_password"),
        (redis.ResponseError("NOAUTH Authentication required."), "refused", "wrong_password"),
        (redis.ResponseError("WRONGPASS invalid username-password pair"), "refused", "wrong_password"),
        (exceptions.NoPermissionError("this user has no permissions"), "refused", "no_permission"),
        (redis.ResponseError("NOPERM this user has no permissions"), "refused", "no_permission"),
        (redis.ResponseError("DENIED Redis is running in protected mode"), "refused", "no_permission"),
        (redis.ResponseError("OOM command not allowed when used memory > 'maxmemory'."), "no_space", "no_space"),
        (exceptions.OutOfMemoryError("command not allowed"), "no_space", "no_space"),
        (redis.ResponseError("MISCONF Redis is configured to save RDB snapshots, but"), "no_space", "no_space"),
        (redis.ResponseError("READONLY You can't write against a read only replica."), "io", "read_only"),
        (exceptions.ReadOnlyError("You can't write against a read only replica."), "io", "read_only"),
        (redis.ResponseError("NOREPLICAS Not enough good replicas to write."), "io", "read_only"),
        (exceptions.BusyLoadingError("Redis is loading the dataset in memory"), "io", ""),
        (redis.ResponseError("LOADING Redis is loading the dataset in memory"), "io", ""),
        (redis.ResponseError("BUSY Redis is busy running a script."), "io", ""),
        (redis.ResponseError("TRYAGAIN Multiple keys request during rehashing of slot"), "io", ""),
        (redis.ResponseError("CLUSTERDOWN The cluster is down"), "io", ""),
        (redis.ResponseError("MASTERDOWN Link with MASTER is down"), "io", ""),
        (redis.ResponseError("max number of clients reached"), "io", ""),
        (redis.InvalidResponse("what answers there speaks no Redis protocol"), "refused", "refused"),
        (_behind(redis.ConnectionError("x"), ssl.SSLCertVerificationError("self-signed")), "refused", "tls"),
        (_behind(redis.ConnectionError("x"), ssl.SSLCertVerificationError("is not yet valid")), "refused", "clock"),
        (_behind(redis.ConnectionError("x"), ConnectionResetError(104, "reset")), "io", "refused"),
        (_behind(redis.TimeoutError("x"), TimeoutError("_ssl.c: The handshake operation timed out")), "io", "tls"),
        (TimeoutError("timed out"), "io", "timeout"),
        (BrokenPipeError(32, "Broken pipe"), "io", "refused"),
        (redis.ConnectionError("Connection closed by server."), "io", "refused"),
    ],
)
def test_reason_and_code(error: BaseException, reason: str, code: str) -> None:
    found = storage_error(error, "redis://host:1")
    assert (found.reason, found.code) == (reason, code), found
    assert str(found).startswith(f"redis at redis://host:1: {type(error).__name__}: ")
    assert not code or code in ADVICE


def test_a_command_that_a_server_repeats_is_not_repeated() -> None:
    said = "ERR unknown command 'AUTH', with args beginning with: 'me' 'hunter2' "
    found = storage_error(redis.ResponseError(said), "redis://host:1")
    assert "unknown command 'AUTH'" in str(found) and "hunter2" not in str(found)


@pytest.mark.parametrize(
    ("behind", "code"),
    [
        (exceptions.AuthenticationError("invalid username-password pair"), "wrong_password"),
        (redis.ConnectionError("Error 111 connecting to host:1. Connection refused."), "refused"),
        (redis.TimeoutError("Timeout connecting to server"), "timeout"),
        (None, "not_found"),
    ],
)
def test_sentinels_that_name_no_master_are_not_shown_with_their_password(
    behind: Exception | None, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library puts what a sentinel's client was made with into its complaint."""
    sentinels = Sentinel([("host", 1)], sentinel_kwargs={"password": "hunter2", "username": "hunter3"})

    def ask(_: redis.Redis) -> dict[str, object]:
        if behind is not None:
            raise behind
        return {}

    monkeypatch.setattr(redis.Redis, "sentinel_masters", ask)
    with pytest.raises(MasterNotFoundError) as caught:
        sentinels.discover_master("pages")
    found = storage_error(caught.value, "'pages' of the sentinels host:1")
    assert found.code == code
    assert "No master found for 'pages'" in str(found) and "hunter" not in str(found)
    assert behind is None or type(behind).__name__ in str(found)


def test_an_endpoint_shows_neither_url_nor_password() -> None:
    endpoint = RedisEndpoint("redis://me:hunter2@host/3", password="hunter3")
    assert "hunter" not in repr(endpoint) + endpoint.place()
    assert endpoint.place() == "redis://host:6379/3"
