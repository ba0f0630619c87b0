"""A client that reads an answer while it comes: what it takes to see when the first token was there."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

from sglang_hicache.ctl.client import Client

_EVENT, _END = b"data: ", b"[DONE]"


class AnswerFailed(Exception):
    """A request had no answer, or half of one; the text says why."""


class StreamClient(Client):
    """Asks one server; threads may each ask on their own."""

    def events(self, path: str, body: dict[str, Any], *, key: str, timeout_s: float) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer; `timeout_s` holds for each of them.  `key`: "" for that of the client."""
        headers = self._headers | {"Content-Type": "application/json"}
        if key:
            headers |= {"Authorization": f"Bearer {key}"}
        connection: http.client.HTTPConnection | None = None
        try:
            connection = self._connect()
            assert connection.sock is not None
            connection.sock.settimeout(timeout_s)
            connection.request("POST", f"{self._prefix}{path}", json.dumps(body).encode(), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise AnswerFailed(f"HTTP status {response.status}: {response.read(500).decode(errors='replace')}")
            for line in response:
                if line.startswith(_EVENT) and not line.startswith(_EVENT + _END):
                    yield _decoded(line.removeprefix(_EVENT))
        except (OSError, http.client.HTTPException) as error:
            raise AnswerFailed(f"{type(error).__name__}: {error}") from error
        finally:
            if connection is not None:
                connection.close()


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise AnswerFailed(f"an event is not JSON: {line[:200]!r}") from error
    if not isinstance(event, dict) or "error" in event:
        raise AnswerFailed(f"the server says: {line[:500].decode(errors='replace').strip()}")
    return event
