"""Asks one server over HTTP: one connection per question, a deadline on each, and errors that say what is known.

Over the standard library: neither proxies of the environment nor redirects are followed, because either would carry
the admin key to somebody else.  Blocks its caller; nothing is shared, so threads may each ask on their own.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from sglang_hicache.ctl.exits import OutcomeUnknown, Refused, Unreachable
from sglang_hicache.errors import UserError

#: Seconds for a question that the server answers at once; a rank that hangs costs it 1.5 s.
QUESTION_TIMEOUT_S = 10.0

#: More than any answer has; what is at the URL may be anything.
_LARGEST_REPLY_BYTES = 64 * 1024 * 1024

#: Not every rank has answered in time.
UNKNOWN_STATUS = 504


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer."""

    status: int
    text: str
    #: Id under which GET /hicache/operations tells about it; "": it was no command.
    operation_id: str = ""

    @property
    def is_success(self) -> bool:
        """Done, or accepted."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The body as JSON; whatever is at the URL, if it is not that, it is not a server of ours."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            said = self.text[:200]
            raise Refused(f"the answer ({self.status}) is not JSON: {said!r}; is --url that of a server?") from None

    @property
    def message(self) -> str:
        """What it says in words: the admin routes answer in plain text, or with one of three forms of an error."""
        try:
            said = json.loads(self.text)
        except (ValueError, RecursionError):
            return self.text.strip() or f"HTTP status {self.status}, without words"
        for name in ("error", "message"):
            if isinstance(said, dict) and name in said:
                said = said[name]
        return said if isinstance(said, str) else self.text.strip()


class Client:
    """A server's address, and the key to it."""

    def __init__(self, url: str, key: str = "", *, cacert: str = "") -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise UserError(f"--url {url!r} is no address; it takes http://HOST:PORT or https://HOST:PORT")
        if parts.username is not None or parts.password is not None:
            raise UserError("--url holds a login; the key comes from --key-file or HICACHECTL_KEY")
        if cacert and parts.scheme != "https":
            raise UserError(f"--cacert is for https, and --url is {url!r}")
        self.url = url.rstrip("/")
        self._host, self._port, self._prefix = parts.hostname, port, parts.path.rstrip("/")
        self._tls = _tls(cacert) if parts.scheme == "https" else None
        self._headers = {"Connection": "close"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def __repr__(self) -> str:
        return f"<Client {self.url}>"

    def ask(self, path: str, **query: Any) -> Any:
        """A question: the JSON of the answer; `Refused` says why there is none."""
        reply = self.send("GET", path, query=query)
        if not reply.is_success:
            raise refusal(reply)
        return reply.json()

    def command(
        self, method: str, path: str, body: Any = None, *, query: Mapping[str, Any] | None = None, timeout_s: float
    ) -> Reply:
        """A command that was done or accepted; `timeout_s` must be longer than its own deadline on the server."""
        reply = self.send(method, path, body, query=query, timeout_s=timeout_s)
        if reply.status == UNKNOWN_STATUS:
            raise OutcomeUnknown(reply.message)
        if not reply.is_success:
            raise refusal(reply)
        return reply

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, Any] | None = None,
        timeout_s: float = QUESTION_TIMEOUT_S,
    ) -> Reply:
        """One request; any answer, whatever its status."""
        connection = self._connect()
        try:
            connection.sock.settimeout(timeout_s)
            data = None if body is None else json.dumps(body).encode()
            target = f"{self._prefix}{path}" + (f"?{urlencode(query)}" if query else "")
            headers = self._headers | ({"Content-Type": "application/json"} if data is not None else {})
            connection.request(method, target, data, headers)
            return _read(connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(method, path, error, timeout_s) from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        """Connected, so that what fails later is known to have been sent."""
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=QUESTION_TIMEOUT_S)
        else:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=QUESTION_TIMEOUT_S, context=self._tls
            )
        try:
            connection.connect()
        except ssl.SSLError as error:
            connection.close()
            raise Unreachable(
                f"no TLS connection to {self.url}: {error}; --cacert names the certificate that it can be checked with"
            ) from error
        except OSError as error:
            connection.close()
            raise Unreachable(f"cannot reach {self.url}: {error}; is the server up, and is --url right?") from error
        return connection

    def _lost(self, method: str, path: str, error: Exception, timeout_s: float) -> Unreachable | OutcomeUnknown:
        is_late = isinstance(error, TimeoutError)
        how = f"no answer within {timeout_s:g} s" if is_late else f"the connection broke: {error}"
        what = f"{method} {self.url}{path}: {how}"
        if method == "GET":
            return Unreachable(what)
        return OutcomeUnknown(
            f"{what}; it may have been done, or not: see `hicachectl status` and `hicachectl operations list`"
        )


def refusal(reply: Reply) -> Refused:
    """An answer that says no, in words for people."""
    if reply.status in (401, 403):
        return Refused(
            f"{reply.message}: this takes the admin key, from --key-file or HICACHECTL_KEY; if one was given, it is "
            "not this server's"
        )
    if 300 <= reply.status < 400:
        return Refused(f"the server sends us elsewhere ({reply.status}); give the final address as --url")
    return Refused(reply.message)


def _tls(cacert: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=cacert or None)
    except OSError as error:  # SSLError is one, too
        raise UserError(f"--cacert {cacert!r} cannot be used: {error}") from error


def _read(response: http.client.HTTPResponse) -> Reply:
    data = response.read(_LARGEST_REPLY_BYTES)
    operation_id = response.getheader("X-HiCache-Operation") or ""
    return Reply(response.status, data.decode(errors="replace"), operation_id)
