"""A server that says what a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import json
import ssl
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

#: Waits longer than any test: for requests that must not be answered in time.
_FOR_EVER_S = 60.0


@dataclass
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    key: str
    body: Any


@dataclass
class Said:
    """An answer."""

    body: Any = ""
    status: int = 200
    operation_id: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class FakeServer:
    """Answers each method and path with what was scripted for it, one after the other; the last one again and again."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[Asked] = []
        self._script: dict[tuple[str, str], deque[Said | Callable[[], Said]]] = {}
        self._let_go = threading.Event()
        self._http = HTTPServer(("127.0.0.1", 0), _handler(self))
        if tls is not None:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._let_go.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def says(self, method: str, path: str, *answers: Said | Callable[[], Said]) -> None:
        self._script[method, path] = deque(answers)

    def hang(self) -> Said:
        """An answer that does not come; scripted where one is expected."""
        self._let_go.wait(_FOR_EVER_S)
        return Said()

    def answer(self, asked: Asked) -> Said:
        self.asked.append(asked)
        answers = self._script.get((asked.method, asked.path))
        if not answers:
            return Said({"error": {"message": f"Not Found: {asked.method} {asked.path}"}}, 404)
        said = answers.popleft() if len(answers) > 1 else answers[0]
        return said if isinstance(said, Said) else said()


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            parts = urlsplit(self.path)
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = self.headers.get("Authorization", "")
            body = json.loads(data) if data else None
            said = server.answer(Asked(self.command, parts.path, dict(parse_qsl(parts.query)), key, body))
            if said.status == 0:
                return  # the connection ends without a word
            content = said.body if isinstance(said.body, str) else json.dumps(said.body)
            self.send_response(said.status)
            for name, value in said.headers.items():
                self.send_header(name, value)
            if said.operation_id:
                self.send_header("X-HiCache-Operation", said.operation_id)
            self.end_headers()
            self.wfile.write(content.encode())

        do_GET = do_PUT = do_DELETE = do_POST = _serve

        def log_message(self, format: str, *args: Any) -> None:
            return

    return Handler
