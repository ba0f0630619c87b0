"""Other weights for a loaded model: read on a thread, refused as a whole, taken in place."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sglang_hicache.errors import IntegrityError, UserError
from sglang_hicache.weights_digest import weights_digest
from sglang_hicache.workers import checkpoint
from sglang_hicache.workers.model_worker import ModelWorker
from sglang_hicache.workers.staging import StagedWeights
from tests.unit.model.support import config_of, generate, greedy_batch, model_config, open_worker, prompts, save_model

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def changed(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture with other weights, in another folder."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3)
    model.save_pretrained(folder)
    return model


def stage(worker: ModelWorker, folder: Path, digest: str | None = None) -> str:
    """Read weights to the end; what became of it."""
    digest = digest or weights_digest(str(folder), str(folder / "digests"))
    worker.next_weights.stage(str(folder), digest)
    return ended(worker.next_weights)


def ended(next_weights: StagedWeights[Any]) -> str:
    """Wait for the thread."""
    reading = next_weights._reading
    assert reading is not None
    reading.result.exception(PATIENCE_S)
    outcome = next_weights.outcome()
    assert outcome is not None
    return outcome


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_worker_computes_what_a_fresh_one_would(tmp_path: Path, name: str, deterministic: bool) -> None:
    other = changed(tmp_path / "new", save_model(tmp_path / "old", config_of(name)))
    [prompt] = prompts([40])
    worker = open_worker(model_config(tmp_path / "old", deterministic=deterministic), 16)
    before = greedy_batch(worker, [prompt], 8)
    assert stage(worker, tmp_path / "new") == ""
    assert greedy_batch(worker, [prompt], 8) == before, "what is staged must not touch what serves"
    old_class = worker.layout.numerics_class
    worker.next_weights.commit_blocking()
    after = greedy_batch(worker, [prompt], 8)
    fresh = open_worker(model_config(tmp_path / "new", deterministic=deterministic), 16)
    assert after == greedy_batch(fresh, [prompt], 8) == [generate(other, prompt, 8)] != before
    assert worker.layout == fresh.layout, "a fresh server must look for the pages under the same name"
    assert (worker.layout.numerics_class != old_class) is deterministic
    worker.close()
    fresh.close()


def test_another_architecture_is_refused(tmp_path: Path, llama_worker: ModelWorker) -> None:
    save_model(tmp_path / "other", config_of("qwen2"))
    assert "another architecture" in stage(llama_worker, tmp_path / "other")
    with pytest.raises(IntegrityError, match="not ready"):
        llama_worker.next_weights.commit_blocking()


def test_files_that_are_not_what_their_digest_says_are_refused(tmp_path: Path, llama_worker: ModelWorker) -> None:
    """They changed after the digest was made: under it, the pages of these weights would be found by others."""
    save_model(tmp_path / "new", config_of("llama"))
    assert "changed while they were read" in stage(llama_worker, tmp_path / "new", digest="0" * 64)


def test_files_that_change_while_a_server_starts_are_refused(tmp_path: Path) -> None:
    """The launcher makes the digest, and the ranks read the weights up to minutes later: a download may go on."""
    save_model(tmp_path / "model", config_of("llama"))
    digest = weights_digest(str(tmp_path / "model"), str(tmp_path / "digests"))
    open_worker(model_config(tmp_path / "model", weights_digest=digest), 16).close()
    with pytest.raises(UserError, match="changed while they were read"):
        open_worker(model_config(tmp_path / "model", weights_digest="0" * 64), 16)


def test_a_tensor_of_another_shape_is_refused_before_it_is_read(
    tmp_path: Path, llama_worker: ModelWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may claim, and with holes in it really have, a tensor larger than any memory."""
    save_model(tmp_path / "new", config_of("llama"))

    class Claims:
        def __enter__(self) -> Claims:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def keys(self) -> list[str]:
            return ["model.embed_tokens.weight"]

        def get_slice(self, name: str) -> Claims:
            return self

        def get_shape(self) -> list[int]:
            return [1 << 40, 64]

        def __getitem__(self, part: object) -> None:
            raise MemoryError("it was read")

    monkeypatch.setattr(checkpoint, "safe_open", lambda *args, **options: Claims())
    assert "of shape [1099511627776, 64] does not fit" in stage(llama_worker, tmp_path / "new", digest="0" * 64)


def test_a_file_that_is_cut_off_is_a_reason_and_no_crash(tmp_path: Path, llama_worker: ModelWorker) -> None:
    save_model(tmp_path / "new", config_of("llama"))
    file = tmp_path / "new" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert stage(llama_worker, tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    llama_worker.next_weights.stage(str(tmp_path / "new"), "0" * 64)
    assert ended(llama_worker.next_weights)


class TestStagedWeights:
    def test_a_drop_ends_the_thread_at_its_next_piece(self) -> None:
        begun, go_on, taken = threading.Event(), threading.Event(), []
        pieces: list[int] = []

        def read(path: str, digest: str, check: Any) -> str:
            begun.set()
            for piece in range(100):
                assert go_on.wait(PATIENCE_S)
                check()
                pieces.append(piece)
            return digest

        weights = StagedWeights(read, taken.append)
        weights.stage("/new", "d")
        assert begun.wait(PATIENCE_S)
        assert weights.outcome() is None and "reading" in repr(weights)
        dropped = weights._reading
        weights.drop()
        assert weights.outcome() is None and "nothing" in repr(weights)
        go_on.set()
        assert dropped is not None and "nobody waits" in str(dropped.result.exception(PATIENCE_S))
        assert pieces == [] and taken == []

    def test_the_latest_weights_count(self) -> None:
        taken: list[str] = []
        weights = StagedWeights(lambda path, digest, check: digest, taken.append)
        weights.stage("/one", "d1")
        weights.stage("/two", "d2")
        assert ended(weights) == ""
        weights.commit_blocking()
        assert taken == ["d2"]
        weights.drop()
        weights.close_blocking()
        with pytest.raises(IntegrityError):
            weights.commit_blocking()

    def test_close_waits_for_the_thread(self) -> None:
        weights = StagedWeights(lambda path, digest, check: digest, lambda digest: None)
        weights.stage("/one", "d1")
        weights.close_blocking()
        assert weights.outcome() is None
