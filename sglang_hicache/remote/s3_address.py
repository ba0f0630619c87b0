"""Where an S3 store is: URLs `s3://bucket/prefix`, endpoints, buckets and prefixes, checked before anything is asked.

Used where a config is judged and where it is used.  Every check raises ValueError with what is allowed; none of them
repeats a text that may hold a password.  Pure.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

SCHEME = "s3://"

#: Looser than Amazon's own rule, which other servers do not have: no slash, nothing that needs a quote in a URL.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_REGION = re.compile(r"[A-Za-z0-9._-]+")

_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")


def check_endpoint(endpoint: str) -> None:
    """A server's address: scheme, host, port, nothing else."""
    takes = "it takes http:// or https://, a host, and maybe a port and a path, such as http://10.0.0.7:9000"
    if endpoint != endpoint.strip() or not endpoint.isascii() or not endpoint.isprintable():
        raise ValueError(f"the endpoint holds a character that no address may have; {takes}")
    try:
        where = urlsplit(endpoint)
        port = where.port
    except ValueError:
        raise ValueError(f"the endpoint is no address; {takes}") from None
    if where.username is not None or where.password is not None:
        raise ValueError(f"the endpoint holds a user or a password, which belong into keys of their own; {takes}")
    if where.scheme not in ("http", "https") or not _HOST.fullmatch(_host(endpoint)) or port == 0:
        raise ValueError(f"endpoint={endpoint!r} is not allowed; {takes}")
    if where.query or where.fragment or " " in endpoint:
        raise ValueError(f"endpoint={endpoint!r} is not allowed; {takes}")


def check_bucket(bucket: str) -> None:
    """A bucket's name, and nothing that would lead into another one."""
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"bucket={bucket!r} is not allowed; it takes a name of letters, digits, dots and hyphens")


def check_prefix(prefix: str) -> None:
    """The beginning of keys.  Not every client can name a key with an empty step, or with `.` or `..` for one."""
    *steps, last = prefix.split("/")
    if not prefix.isprintable() or last in (".", "..") or any(step in ("", ".", "..") for step in steps):
        raise ValueError(
            f"prefix={prefix!r} is not allowed; it takes text such as 'hicache/' without a slash in front, and without "
            "empty steps, '.' and '..' between slashes"
        )


def check_region(region: str) -> None:
    """A word that goes into every signature."""
    if not _REGION.fullmatch(region):
        raise ValueError(f"region={region!r} is not allowed; it takes a name of letters, digits and hyphens")


def check_key(name: str, text: str) -> None:
    """A key or a token, by the name under which it was given.  The end of a line, which comes along when a key is read
    from a file, would go unseen into a secret key, and the library ends with a panic where a header cannot hold it."""
    is_header = not name.lower().endswith(("secret_key", "secret_access_key"))
    if text != text.strip() or not text.isprintable() or (is_header and not text.isascii()):
        raise ValueError(f"{name} begins or ends with a space, or holds a line break or what no key has; give it bare")


def parse_s3_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix`; a prefix that is not empty ends with a slash."""
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or "@" in bucket:
        raise ValueError("an S3 URL is s3://bucket or s3://bucket/prefix; endpoint and keys have options of their own")
    check_bucket(bucket)
    prefix = prefix.rstrip("/")
    prefix = f"{prefix}/" if prefix else ""
    check_prefix(prefix)
    return bucket, prefix


def with_bucket(endpoint: str, bucket: str) -> str:
    """The endpoint under which a server that is asked by host name keeps this bucket."""
    scheme, _, rest = endpoint.partition("://")
    host = _host(endpoint)
    if host.startswith("[") or host.rpartition(".")[2].isdigit():
        raise ValueError(f"path_style=false puts the bucket in front of a host name, and {host} is a number")
    return f"{scheme}://{bucket}.{rest}"


def _host(endpoint: str) -> str:
    """The host as it is written, with the brackets of an address of IPv6."""
    rest = endpoint.partition("://")[2].split("/")[0]
    return rest.partition("]")[0] + "]" if rest.startswith("[") else rest.partition(":")[0]
