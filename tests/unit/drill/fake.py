"""A server that a drill takes for one of ours, and that can be told to do what ours must never do."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

STATUS = "/hicache/storage-backend"


class FakeServer:
    """Two ranks, one store inside a saboteur, and a model that says the sums of what it is asked."""

    def __init__(self, control: Path) -> None:
        self.control = control
        self.backend: str | None = "faulty"
        self.config: dict[str, Any] = {"inner": "file", "inner_config": {}, "control": str(control)}
        self.ranks = [_rank(number, control) for number in range(2)]
        self.breaker: dict[str, Any] = {"state": "closed", "trips": 0, "serving": "primary"}
        #: What the breaker counts at each look; the last one stays.
        self.trips: list[int] = []
        #: Looks at the status before rank 1 is in the state of rank 0.
        self.looks_apart = 0
        #: The one look at which the status is none.
        self.odd_look = 0
        self._looks = 0
        self.is_exact = True
        #: Requests after this many misbehave; the reference run of the tests has 4.
        self.good_requests = 10**9
        #: How: "lose", "lie", "cut" or "odd".
        self.misbehaviour = "lose"
        #: Prompt tokens that come from storage.
        self.storage_tokens = 0
        #: Requests of each kind, in order.
        self.asked: list[tuple[str, str, Any]] = []
        self._lock = threading.Lock()
        self._generated = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def commands(self) -> list[tuple[str, str, Any]]:
        """What was asked beyond questions and answers of the model."""
        return [asked for asked in self.asked if asked[0] != "GET" and asked[1] != "/generate"]

    def answer(self, method: str, path: str, body: Any) -> tuple[int, str]:
        with self._lock:
            self.asked.append((method, path, body))
        if path == "/generate":
            return self._generate(body)
        match method, path:
            case "GET", "/server_info":
                return 200, json.dumps({"enable_deterministic_inference": self.is_exact})
            case "GET", _ if path == STATUS:
                return 200, json.dumps(self._status())
            case "PUT", _ if path == STATUS:
                return self._attach(body)
            case "DELETE", _ if path == STATUS:
                self._change(None, {})
                return 200, "HiCache storage backend detached."
        return 404, f"Not Found: {path}"

    def _generate(self, body: Any) -> tuple[int, str]:
        with self._lock:
            self._generated += 1
            misbehaves = self._generated > self.good_requests
        prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        answer = [(sum(prompt) + number) % 1000 for number in range(count)]
        if misbehaves and self.misbehaviour == "lose":
            return 503, json.dumps({"error": {"message": "lost"}})
        if misbehaves:
            answer = answer[:-1] if self.misbehaviour == "cut" else [*answer[:-1], 7]
        if misbehaves and self.misbehaviour == "odd":
            return 200, f"data: {json.dumps({'output_ids': answer, 'meta_info': None})}\n\ndata: [DONE]\n\n"
        details = {"device": 0, "host": 0, "storage": self.storage_tokens}
        events = [{"output_ids": answer[:1], "meta_info": {}}]
        events.append({"output_ids": answer, "meta_info": {"cached_tokens_details": details}})
        return 200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    def _attach(self, body: Any) -> tuple[int, str]:
        if body["hicache_storage_backend"] not in ("faulty", "file"):
            return 400, "Failed to attach HiCache storage backend.\nunknown storage backend"
        if body.get("dry_run"):
            ranks = [{"rank": 0, "code": "", "ok": True}, {"rank": 1, "code": "no_space", "ok": False}]
            return 400, json.dumps({"ok": False, "ranks": ranks})
        self._change(body["hicache_storage_backend"], json.loads(body["hicache_storage_backend_extra_config_json"]))
        return 200, "HiCache storage backend attached."

    def _change(self, backend: str | None, config: dict[str, Any]) -> None:
        self.backend, self.config = backend, config
        for rank in self.ranks:
            rank |= {"state": "attached" if backend else "detached", "epoch": rank["epoch"] + bool(backend)}

    def _status(self) -> dict[str, Any]:
        with self._lock:
            self.looks_apart -= 1
            self._looks += 1
            is_odd = self._looks == self.odd_look
            ranks = [self.ranks[0], self.ranks[1] | ({"epoch": 9} if self.looks_apart >= 0 else {})]
            if self.trips:
                self.breaker["trips"] = self.trips.pop(0)
        return {
            "hicache_storage_backend": self.backend,
            "hicache_storage_backend_extra_config": json.dumps(self.config) if self.backend else None,
            "ranks": [{"rank": 0}] if is_odd else ranks,
            "breaker": self.breaker,
        }


def _rank(number: int, control: Path) -> dict[str, Any]:
    load = {"queue-req": 0, "running-req": 0, "copy-ops": 0}
    pools = {"device_pages": 64, "device_pages_free": 40, "device_pages_evictable": 24}
    return {
        "rank": number, "state": "attached", "epoch": 1, "in_flight": {}, "queued_backups": 0,
        "quarantined_pages": 0, "last_error": None, "backend_info": {"control": str(control)}, "load": load | pools,
    }  # fmt: skip


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, text = server.answer(self.command, urlsplit(self.path).path, json.loads(data) if data else None)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PUT = do_DELETE = do_POST = _serve

        def log_message(self, format: str, *args: Any) -> None:
            return

    return Handler
