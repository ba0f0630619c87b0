"""Run as a program: the checks of the contract over a class of SGLang itself, with nothing standing in for anything.

Its argument is JSON: `backend`, `config`, and the faults of a saboteur.  Exit 0: all checks hold.  Exit 77: the class
cannot be imported here, and the last line says what is missing.
"""

from __future__ import annotations

import json
import sys

from sglang_hicache.errors import StorageError
from sglang_hicache.storage import registry
from sglang_hicache.storage.backend import OpenContext, StorageBackend
from sglang_hicache.storage.conformance import CHECKS, check_clear_is_confined
from sglang_hicache.storage.conformance_faults import check_sabotaged
from sglang_hicache.storage.diagnosis import diagnose
from sglang_hicache.storage.page_format import WRITE_CHUNK_BYTES

MISSING = 77


def main(job: dict) -> int:
    _, settings = registry.validate_extra_config(job["backend"], json.dumps(job["config"]))

    def make(page_bytes: int = 4096) -> StorageBackend:
        context = OpenContext(rank=1, namespace="ab" * 32, page_bytes=page_bytes, tp_size=2, model_name="org/m")
        return registry.create(job["backend"], settings, context)

    def make_large() -> StorageBackend:
        return make(WRITE_CHUNK_BYTES + 1)

    backend = make()
    try:
        backend.open_blocking()
        print("opened", backend, backend.info())
    except StorageError as error:
        print(error)
        return MISSING if diagnose(error, job["backend"]).code == "missing_library" else 1
    finally:
        backend.close_blocking()
    for check in CHECKS:
        if check is not check_clear_is_confined:
            check(make_large)
            print("holds:", check.__name__)
    for call, kind in job["sabotage"]:
        check_sabotaged(make, call, kind)
        print("holds under", kind, "in", call)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
