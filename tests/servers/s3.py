"""S3 servers that tests start by themselves: two real ones, and one that answers as a test tells it."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.remote.s3_client import S3Bucket, S3Endpoint
from tests.servers.program import Program, free_port, listens

BUCKET = "pages"
ACCESS_KEY = "AKIDOFATEST"
SECRET_KEY = "secret-of-a-test"

#: moto looks here for the service that is asked, and at nothing else.
_SCOPE = f"{ACCESS_KEY}/20261128/us-east-1/s3/aws4_request"

_BIN = Path(sys.executable).parent


def needs(program: str) -> str:
    """A program of the environment's; a test without it is skipped and says why."""
    found = shutil.which(program, path=str(_BIN)) or shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed here; scripts/install installs it")
    return found


def config(port: int, **more: Any) -> dict[str, Any]:
    """An extra config for a server on a loopback port."""
    return {
        # A machine that others use, too, takes its time; what a bound does is shown where one is given.
        "timeout_s": 60.0, "connect_timeout_s": 60.0,
        "bucket": BUCKET, "endpoint": f"http://127.0.0.1:{port}", "access_key": ACCESS_KEY, "secret_key": SECRET_KEY,
    } | more  # fmt: skip


def bucket(port: int, **more: Any) -> S3Bucket:
    """The bucket as a test uses it itself."""
    return S3Bucket(S3Endpoint(**config(port, **more)))


class RcloneServer(Program):
    """`rclone serve s3` over a folder: it checks signatures, knows no conditional writes, and what it was given is
    there for another one over the same folder."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.root = folder / "buckets"
        (self.root / BUCKET).mkdir(parents=True, exist_ok=True)
        command = [
            needs("rclone"), "serve", "s3", "--addr", f"127.0.0.1:{self.port}", "--config", "/dev/null",
            "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", *options, str(self.root),
        ]  # fmt: skip
        super().__init__(command, folder, lambda: listens(self.port))

    def file(self, key: str) -> Path:
        """Where it keeps an object."""
        return self.root / BUCKET / key


class MotoServer(Program):
    """moto's server: all in memory, conditional writes and parts of objects as Amazon has them, no signatures."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        command = [needs("moto_server"), "-H", "127.0.0.1", "-p", str(self.port)]
        super().__init__(command, folder, lambda: listens(self.port))

    def start_blocking(self) -> None:
        super().start_blocking()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request("PUT", f"/{BUCKET}", headers={"Authorization": f"AWS4-HMAC-SHA256 Credential={_SCOPE}"})
            assert connection.getresponse().status == 200


def warm_up() -> None:
    """Has the library start its threads: they stay as long as this process, and their descriptors would be taken for a
    leak of the first test.  For fixtures of a module."""
    with contextlib.suppress(StorageError):
        bucket(free_port(), retries=0).check_blocking()


@contextlib.contextmanager
def warm(server: Program) -> Iterator[Program]:
    """A server that runs, and the library that asks it."""
    warm_up()
    with server:
        yield server


class Request:
    """What was asked."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self.method = handler.command
        self.path = handler.path
        self.headers = handler.headers
        self.content = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))


_NOTHING_LISTED = b"<ListBucketResult></ListBucketResult>"

#: Status, headers and body.
Answer = tuple[int, dict[str, str], bytes]


def refusal(status: int, code: str, words: str = "no") -> Answer:
    """What a server answers when it does not do what was asked."""
    return status, {}, f"<Error><Code>{code}</Code><Message>{words}</Message></Error>".encode()


def content(body: bytes, size: int | None = None) -> Answer:
    """An object, or the beginning of one."""
    headers = {"ETag": '"e"', "Last-Modified": "Sat, 28 Nov 2026 13:00:00 GMT"}
    return 200, headers | {"Content-Length": str(len(body) if size is None else size)}, body


class ScriptedServer:
    """Answers each request by a function, but for listings (`lists`), where nothing is found: for what a real server
    does once in a month."""

    def __init__(self, answer: Callable[[Request], Answer], *, lists: bool = True) -> None:
        self.requests: list[Request] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                request = Request(self)
                scripted.requests.append(request)
                is_listing = lists and "list-type=" in request.path
                status, headers, body = content(_NOTHING_LISTED) if is_listing else answer(request)
                self.send_response(status)
                # Said, or the library would send the next request on a connection that ends.
                always = {"Content-Length": str(len(body)), "Connection": "close"}
                for name, value in (always | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.port = self._server.server_address[1]

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def count(self, method: str) -> int:
        """Requests of one kind so far."""
        return sum(request.method == method for request in self.requests)


def files(server: RcloneServer, prefix: str = "") -> Sequence[Path]:
    """What a server keeps below a prefix."""
    return sorted(path for path in server.file(prefix).rglob("*") if path.is_file())
