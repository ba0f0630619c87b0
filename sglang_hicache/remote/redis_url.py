"""Where a Redis server is, as one URL: taken apart, checked, and shown without its password.

    redis://[[user]:password@]host[:port][/db]      rediss://...: with TLS      unix://[[user]:password@]/path[?db=N]

`valkey` and `valkeys` mean the same as `redis` and `rediss`.  Used by whatever judges a command, and by the client.
Pure.  What is wrong with a URL is said without repeating it: it may hold a password.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

DEFAULT_PORT = 6379

#: What a URL begins with, and whether the server speaks TLS there.
SCHEMES = {"redis": False, "rediss": True, "valkey": False, "valkeys": True, "unix": False}

_MOST_DATABASES = 1 << 20
_LONGEST_SOCKET_PATH = 107
_FORM = "it takes redis://[user:password@]host[:port][/db], rediss://... for TLS, or unix://[user:password@]/path[?db=N]"


class RedisUrl(NamedTuple):
    """A URL, taken apart."""

    #: "": a socket of this machine.
    host: str
    port: int
    #: Of the socket; "": a host.
    path: str
    is_tls: bool
    username: str
    password: str
    db: int

    def __repr__(self) -> str:
        return f"<RedisUrl {self.place()}>"

    def place(self) -> str:
        """For an operator: no user, no password."""
        db = f"/{self.db}" if self.db else ""
        if self.path:
            return f"unix://{self.path}" + (f"?db={self.db}" if self.db else "")
        return f"{'rediss' if self.is_tls else 'redis'}://{address(self.host, self.port)}{db}"


def address(host: str, port: int) -> str:
    """host:port, in brackets where the host is an address with colons."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_redis_url(url: str) -> RedisUrl:
    """ValueError: it is none, and why."""
    scheme, found, _ = url.partition("://")
    if not found or scheme not in SCHEMES:
        raise ValueError(f"the url begins with none of {', '.join(f'{name}://' for name in SCHEMES)}; {_FORM}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        # The complaint of the library repeats what it has read, which may be half of a password.
        hint = "a password takes %40 for @ and %2F for /"
        raise ValueError(f"the url has no valid host and port; {hint}; {_FORM}") from None
    if parts.fragment:
        raise ValueError(f"the url has a part behind #; a password takes %23 for #; {_FORM}")
    path, db = _place(scheme, unquote(parts.path), _query(parts.query))
    host = "" if scheme == "unix" else unquote(parts.hostname or "")
    if scheme == "unix" and parts.hostname:
        raise ValueError(f"a unix url has three slashes before its path; {_FORM}")
    if scheme != "unix" and not host:
        raise ValueError(f"the url names no host; {_FORM}")
    _check_host(host)
    if port == 0:
        raise ValueError("the url has port 0; it takes 1 to 65535")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return RedisUrl(host, port or DEFAULT_PORT, path, SCHEMES[scheme], user, password, db)


def parse_address(text: str) -> tuple[str, int]:
    """`host:port` of a node; ValueError: it is none."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536 or "@" in host or "/" in host:
        raise ValueError("it takes host:port, with the port from 1 to 65535, and neither user nor password")
    _check_host(host)
    return host, int(port)


def _check_host(host: str) -> None:
    """A name that nobody could look up is found out here, and not by an error that is none of the network."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError("the name of the host has an empty part, or one that is too long") from None


def _query(text: str) -> dict[str, str]:
    options = dict(parse_qsl(text, keep_blank_values=True))
    if set(options) - {"db"}:
        raise ValueError(f"the url has options behind ?; it takes db alone, the rest has keys of its own; {_FORM}")
    return options


def _place(scheme: str, path: str, options: dict[str, str]) -> tuple[str, int]:
    """Path of the socket and number of the database."""
    text = options.get("db", "")
    if scheme == "unix":
        if not path.startswith("/") or "\0" in path or len(path.encode()) > _LONGEST_SOCKET_PATH:
            raise ValueError(f"the url has no absolute path of at most {_LONGEST_SOCKET_PATH} bytes; {_FORM}")
    else:
        below = path.removeprefix("/")
        if below and text:
            raise ValueError(f"the url names its database twice; {_FORM}")
        path, text = "", text or below
    if text and not (text.isascii() and text.isdigit() and int(text) < _MOST_DATABASES):
        raise ValueError(f"the url has no number of a database behind its host; {_FORM}")
    return path, int(text or 0)
