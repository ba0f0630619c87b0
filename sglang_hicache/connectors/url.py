"""URLs of places that hold models: taken apart, filled in from the environment, and shown without their secrets.

    file:///path     redis://[[user]:password@]host[:port]/model[?db=N]     s3://bucket/prefix[?endpoint=URL]

Used wherever a model may be named: the launcher, the ranks, `save_model`.  What is wrong with a URL is said without
repeating it: it may hold a password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from sglang_hicache.errors import UserError
from sglang_hicache.observe import without_logins

ALLOWED = (
    "allowed are file:///path, redis://[user:password@]host[:port]/model (rediss:// with TLS; valkey://, valkeys://), "
    "and s3://bucket/prefix"
)

_ENVIRONMENT = re.compile(r"\$\{env\.([A-Za-z_][A-Za-z0-9_]*)\}")


class StoreUrl(NamedTuple):
    """A URL, taken apart.  Its repr and `public` show neither user nor password."""

    scheme: str
    #: user:password@host:port, as it was written.
    netloc: str
    #: Behind the host, without quoting and without slashes around it.
    path: str
    options: dict[str, str]
    public: str

    def __repr__(self) -> str:
        return f"<StoreUrl {self.public}>"

    @property
    def login(self) -> str:
        """What stands before the host; "" for nothing."""
        return self.netloc.rpartition("@")[0]

    @property
    def host(self) -> str:
        """With its port."""
        return self.netloc.rpartition("@")[2]

    @property
    def name(self) -> str:
        """What the model is called where nobody gave it another name."""
        return self.path.rpartition("/")[2] or self.host


def is_url(text: str) -> bool:
    """Is this meant as a URL?  A directory or a hub id has no :// in it."""
    return "://" in text


def parse_url(url: str) -> StoreUrl:
    """UserError: it is none, and why."""
    scheme, found, _ = url.partition("://")
    if not found or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*", scheme):
        raise UserError(f"this is no URL of a model; {ALLOWED}")
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise UserError(f"the {scheme} URL cannot be read; {ALLOWED}") from None
    try:
        _ = parts.port
    except ValueError:  # what stands there may be a password with a ? in it
        raise UserError(f"the {scheme} URL has no valid host and port; a ? in a password is %3F") from None
    if parts.fragment or "@" in parts.path or "@" in parts.query.partition("://")[0]:
        # A password with #, ? or / in it ends the host there: what is left of it must not be taken for a model's name.
        raise UserError(
            f"the {scheme} URL has a # or an @ where none may be; %23, %3F, %40 and %2F stand for #, ?, @ and / in "
            "names and passwords"
        )
    options = dict(pairs)
    if len(options) < len(pairs):
        raise UserError(f"the {scheme} URL has the same option twice behind ?")
    path = unquote(parts.path, errors="surrogateescape")
    if "\0" in path:
        raise UserError(f"the {scheme} URL has a NUL character in its path")
    public = f"{scheme.lower()}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.query:
        public += f"?{without_logins(parts.query)}"
    return StoreUrl(scheme.lower(), parts.netloc, path.strip("/"), options, public)


def check_options(url: StoreUrl, *allowed: str) -> None:
    """Refuse what nobody would read."""
    unknown = sorted(set(url.options) - set(allowed))
    if unknown:
        takes = f"takes {', '.join(allowed)}" if allowed else "takes none"
        raise UserError(f"{url.public}: unknown option {', '.join(unknown)} behind ?; {url.scheme}:// {takes}")


def secrets_of_url(url: str) -> list[str]:
    """What of a URL must not appear in a log."""
    if not is_url(url):
        return []
    login = parse_url(url).login
    password = login.partition(":")[2]
    return [text for text in dict.fromkeys((password, unquote(password))) if text]


def shows_password(url: str) -> bool:
    """Does whoever sees this URL see a password?  One that comes from the environment is not seen."""
    password = parse_url(url).login.partition(":")[2] if is_url(url) else ""
    return bool(password) and not _ENVIRONMENT.fullmatch(password)


def filled_in(url: str, environment: Mapping[str, str]) -> str:
    """`${env.NAME}` in a URL replaced by that variable, quoted, so that a password may have any character."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in environment:
            raise UserError(f"the URL has {found[0]}, but {found[1]} is not set in the environment")
        return quote(environment[found[1]], safe="")

    if "${" in _ENVIRONMENT.sub("", url):
        raise UserError("the URL has ${ in it; only ${env.NAME} can be filled in")
    return _ENVIRONMENT.sub(value, url)
