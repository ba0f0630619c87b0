"""A plug-in under a whole server: the same text, through faults of the plug-in and after its processes are new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.processes.server import Server, cached
from tests.processes.test_same_text import EXACT, QUESTIONS, SYSTEM, ids

FLAGS = (
    *EXACT, "--enable-hierarchical-cache", "--max-total-tokens", "768", "--hicache-ratio", "8", "--check-rank-digests",
    "--hicache-upload-rate", "0",
)  # fmt: skip
PROMPTS = [SYSTEM + question for question in QUESTIONS[:2]]

#: As somebody else would write it, in a file outside of this project.  A file `lie` in its folder makes it a liar.
PLUG_IN = '''
import ctypes, os, pathlib
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

class Folder(HiCacheStorage):
    def __init__(self, storage_config, kwargs):
        self.folder = pathlib.Path(kwargs["folder"])

    def lie(self):
        path = self.folder / "lie"
        return path.read_text() if path.exists() else ""

    def answer(self, value):
        lie = self.lie()
        if lie == "raise":
            raise RuntimeError("out of order")
        if lie == "die":
            os._exit(1)
        return None if lie == "none" else value

    def batch_get_v1(self, keys, host_indices, extra_info=None):
        return self.answer([self.one(*page, False) for page in self.pages(keys, host_indices)])

    def batch_set_v1(self, keys, host_indices, extra_info=None):
        return self.answer([self.one(*page, True) for page in self.pages(keys, host_indices)])

    def pages(self, keys, host_indices):
        return zip(keys, *self.mem_pool_host.get_page_buffer_meta(host_indices))

    def one(self, key, pointer, size, is_write):
        path = self.folder / key
        if is_write:
            new = path.with_name(f".{key}.{os.getpid()}")
            new.write_bytes(ctypes.string_at(pointer, size))
            new.rename(path)
        elif not path.exists():
            return False
        else:
            ctypes.memmove(pointer, path.read_bytes(), size)
        return True

    def exists(self, key):
        return (self.folder / key).exists()

    def get(self, *args):
        raise NotImplementedError

    set = batch_get = batch_set = get
'''


def hits(reply: dict[str, Any]) -> int:
    return cached(reply).get("storage", 0)


@pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_plug_in_costs_time_and_never_a_token(tp_size: int, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "folder_store.py").write_text(PLUG_IN, encoding="utf-8")
    folder = tmp_path / "pages"
    folder.mkdir()
    config = {
        "backend_name": "folder", "module_path": "folder_store", "class_name": "Folder", "interface_v1": 1,
        "folder": str(folder),
    }  # fmt: skip
    allow = ("--hicache-allow-dynamic-backend", "folder_store:Folder")
    server = Server(tmp_path / "a", *FLAGS, *allow, tp_size=tp_size, env={"PYTHONPATH": str(tmp_path / "lib")})
    with server:
        wanted = ids([server.generate(prompt) for prompt in PROMPTS])
        refused = server.attach_store("dynamic", config | {"class_name": "Other"})
        assert refused.status_code == 400 and "folder_store:Other" in refused.text
        assert server.attach_store("dynamic", config, dry_run=True).status_code == 200
        assert server.attach_store("dynamic", config).status_code == 200
        server.flush()

        def ask() -> int:
            """All prompts, from the store as far as it gives them: how many tokens came from there."""
            server.quiesce()
            server.flush()
            replies = [server.generate(prompt) for prompt in PROMPTS]
            assert ids(replies) == wanted
            return sum(hits(reply) for reply in replies)

        assert ask() == 0, "the store was not empty"
        assert ask() > 150
        for lie in ("none", "raise"):
            (folder / "lie").write_text(lie, encoding="utf-8")
            assert ask() == 0, lie
            (folder / "lie").unlink()
            ask()  # what could not be read is left alone for a while, or written again
            assert ask() > 150, lie
        (folder / "lie").write_text("die", encoding="utf-8")
        server.flush()
        assert server.generate(PROMPTS[0])["output_ids"] == wanted[0]
        server.wait_until(lambda ranks: all(rank["state"] == "detached" for rank in ranks), "the plug-in has died")
        (folder / "lie").unlink()
        assert server.attach_store("dynamic", config).status_code == 200
        server.flush()
        ask()
        assert ask() > 150
