"""New weights for a server that serves: real model, two ranks, three tiers, one store.

What the server says after an update must be what a server says that was started on the new weights, from whatever tier;
and the store must know the pages of each by the weights' content, also of weights that come back.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from sglang_hicache.server_args import BUILTIN_MODEL_PATH
from tests.processes.server import Server, cached

FLAGS = (
    "--enable-deterministic-inference", "--page-size", "16", "--max-total-tokens", "4096",
    "--enable-hierarchical-cache", "--check-rank-digests",
)  # fmt: skip
PROMPT = "The list of all the names that are defined in the module, sorted, with a line for each of them. " * 3


def perturbed(folder: Path, factor: float) -> Path:
    """The built-in model with other weights, so that another token is the likeliest."""
    shutil.copytree(BUILTIN_MODEL_PATH, folder)
    file = folder / "model.safetensors"
    file.chmod(0o600)
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    save_file({name: value * factor if value.ndim > 1 else value for name, value in tensors.items()}, file)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [Path(BUILTIN_MODEL_PATH).resolve(), perturbed(tmp_path_factory.mktemp("checkpoints") / "other", 0.7)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), *FLAGS, tp_size=2) as running:
        yield running


@pytest.fixture(scope="module")
def first_ids(server: Server) -> list[int]:
    """What the server says with the weights that it was started with."""
    return server.generate(PROMPT)["output_ids"]


def update(server: Server, checkpoint: Path, **fields: Any) -> dict[str, Any]:
    body = {"model_path": str(checkpoint)} | fields
    reply = server.admin("POST", "/update_weights_from_disk", json=body)
    return reply.json() | {"status": reply.status_code}


def tiers(reply: dict[str, Any]) -> dict[str, int]:
    return {name: n for name, n in cached(reply).items() if name in ("device", "host", "storage") and n}


def test_fm32_old_pages_are_never_served_and_found_again_when_their_weights_come_back(
    server: Server, checkpoints: list[Path], first_ids: list[int], tmp_path: Path
) -> None:
    assert server.attach(tmp_path / "store").status_code == 200
    server.flush()
    wanted = {0: server.generate(PROMPT)["output_ids"]}
    assert wanted[0] == first_ids
    server.quiesce()
    for turn, index in enumerate((1, 0, 1)):
        answer = update(server, checkpoints[index], weight_version=f"v{turn}")
        assert (answer["status"], answer["success"]) == (200, True), answer
        fresh = server.generate(PROMPT)
        assert fresh["output_ids"] == wanted.setdefault(index, fresh["output_ids"])
        assert fresh["meta_info"]["weight_version"] == f"v{turn}"
        # The first time nothing fits; weights that were here before find what they had stored.
        assert set(tiers(fresh)) == ({"storage"} if turn else set()), cached(fresh)
        server.quiesce()
        again = server.generate(PROMPT)
        assert again["output_ids"] == wanted[index] and set(tiers(again)) == {"device"}
    assert wanted[0] != wanted[1], "both say the same: nothing above could have been told apart"
    info = server.http.get("/model_info").json()
    assert (info["model_path"], info["weight_version"]) == (str(checkpoints[1]), "v2")
    ranks = server.status()["ranks"]
    assert len({rank["weights_digest"] for rank in ranks}) == 1 and ranks[0]["weight_version"] == "v2"
    server.quiesce()

    # A server that is started on these weights finds the pages that the update has written, and says the same without.
    extra = json.dumps({"file_storage_path": str(tmp_path / "store"), "prefetch_threshold": 16})
    storage = (
        "--hicache-storage-backend", "file", "--hicache-storage-backend-extra-config", extra,
        "--hicache-storage-prefetch-policy", "wait_complete", "--model-path", str(checkpoints[1]),
    )  # fmt: skip
    with Server(tmp_path / "fresh", *FLAGS, *storage, tp_size=2) as other:
        found = other.generate(PROMPT)
        assert found["output_ids"] == wanted[1] and set(tiers(found)) == {"storage"}
        other.quiesce()
        reply = other.admin("POST", "/flush_cache", params={"timeout": 30, "keep_storage": "false"})
        assert reply.status_code == 200, reply.text
        computed = other.generate(PROMPT)
        assert computed["output_ids"] == wanted[1] and not tiers(computed)

    # It has cleared its own pages, which are those of the present weights here; those of the other weights are there.
    assert update(server, checkpoints[0])["success"]
    assert set(tiers(server.generate(PROMPT))) == {"storage"}


def test_a_checkpoint_that_does_not_fit_changes_nothing(
    server: Server, checkpoints: list[Path], first_ids: list[int], tmp_path: Path
) -> None:
    assert update(server, checkpoints[0])["success"]
    assert server.generate(PROMPT)["output_ids"] == first_ids
    shutil.copytree(checkpoints[1], tmp_path / "short")
    weights = tmp_path / "short" / "model.safetensors"
    with safe_open(weights, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    name, _ = tensors.popitem()
    save_file(tensors, weights)
    answer = update(server, tmp_path / "short")
    assert answer["status"] == 400 and f"no tensor {name}" in answer["message"], answer
    assert "rank 0" in answer["message"] and "rank 1" not in answer["message"].split("; ")[0]
    again = server.generate(PROMPT)
    assert again["output_ids"] == first_ids and set(tiers(again)) == {"device"}, "not even the cache was touched"


def test_an_update_under_load_mixes_no_text(server: Server, checkpoints: list[Path], first_ids: list[int]) -> None:
    """Every answer is that of the one set of weights or of the other, and says of which."""
    assert update(server, checkpoints[0], weight_version="old")["success"]
    replies: list[dict[str, Any]] = []
    load = threading.Thread(target=lambda: [replies.extend(server.generate_all([PROMPT] * 4)) for _ in range(6)])
    load.start()
    answer = update(server, checkpoints[1], weight_version="new")
    load.join()
    assert answer["success"], answer
    last = server.generate(PROMPT)
    assert last["meta_info"]["weight_version"] == "new" and last["output_ids"] != first_ids
    texts = {"old": first_ids, "new": last["output_ids"]}
    for reply in replies:
        assert reply["output_ids"] == texts[reply["meta_info"]["weight_version"]]
