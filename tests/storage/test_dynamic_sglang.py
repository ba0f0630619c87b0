"""SGLang's own classes, from its package: skipped where that is not, as most machines have no use for 10 GB of it.

    pip install --no-deps --target DIR sglang==0.5.23
    HICACHE_TEST_SGLANG=DIR scripts/test tests/storage/test_dynamic_sglang.py

Its package alone imports `SeaweedFSStore`; `HiCacheFile` also wants orjson, pybase64, pillow and triton, in the same
DIR.
Nothing stands in for any module here: that would prove nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.storage.conformance_faults import SABOTAGES
from tests.house.source import ROOT
from tests.servers import s3
from tests.storage.plugins.sglang_check import MISSING
from tests.storage.test_dynamic import is_installed

pytestmark = pytest.mark.sglang

FOLDER_ENV = "HICACHE_TEST_SGLANG"


def check(backend: str, config: dict[str, Any]) -> str:
    """What the program says; skips with its reason if the class is not to be had here."""
    folder = os.environ.get(FOLDER_ENV, "")
    job = {"backend": backend, "config": config, "sabotage": SABOTAGES[::3]}
    path = os.pathsep.join(part for part in (str(ROOT), folder) if part)
    done = subprocess.run(
        [sys.executable, "-m", "tests.storage.plugins.sglang_check", json.dumps(job)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode == MISSING:
        pytest.skip(f"SGLang's class cannot be imported here: {done.stdout.splitlines()[-1]}")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def sglang() -> None:
    """Its package is somewhere."""
    if not os.environ.get(FOLDER_ENV) and not is_installed("sglang"):
        pytest.skip(f"sglang is not installed, and {FOLDER_ENV} names no folder with it")


@pytest.fixture(scope="module")
def moto(sglang: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An S3 server."""
    with s3.MotoServer(tmp_path_factory.mktemp("moto")) as server:
        yield server


def test_its_file_backend_keeps_the_contract(tmp_path: Path) -> None:
    config = {
        "backend_name": "file", "module_path": "sglang.srt.mem_cache.hicache_storage", "class_name": "HiCacheFile",
        "constructor": "config", "file_storage_path": str(tmp_path), "clear_all": True,
    }  # fmt: skip
    said = check("dynamic", config)
    assert "'interface': 'v0'" in said and "holds: check_round_trip" in said


@pytest.mark.long
def test_its_store_for_seaweedfs_keeps_the_contract_by_its_name(moto: Any) -> None:
    config = {
        "endpoint": f"http://127.0.0.1:{moto.port}", "access_key": s3.ACCESS_KEY, "secret_key": s3.SECRET_KEY,
        "clear_all": True,
    }  # fmt: skip
    said = check("seaweedfs", config)
    assert "'interface': 'v1'" in said and "holds: check_round_trip" in said
