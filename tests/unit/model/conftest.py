"""Torch on one thread, quiet transformers, and a worker that most tests can share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging

from sglang_hicache.workers.model_worker import ModelWorker
from tests.unit.model.support import config_of, model_config, open_worker, save_model


@pytest.fixture(scope="package", autouse=True)
def quiet_single_thread() -> None:
    # The progress bar starts a thread that never ends.
    logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture
def llama_worker(tmp_path) -> Iterator[ModelWorker]:
    """One rank, fp32, pages of 16 tokens, fast numerics."""
    save_model(tmp_path, config_of("llama"))
    worker = open_worker(model_config(tmp_path), 16, device_tokens=512)
    yield worker
    worker.close()
