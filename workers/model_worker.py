"""The hands of one rank: its share of the model, its device pool, and the copies to and from the host pool.

Implements `batch.Worker`; created and called by the rank's scheduler, on its one thread.  It computes what it is
told and never decides: no queue, no cache, no clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sglang_hicache.cache.pools import HostPool
from sglang_hicache.config import ModelConfig
from sglang_hicache.errors import IntegrityError, UserError
from sglang_hicache.weights_digest import default_cache_file, weights_digest
from sglang_hicache.workers import models
from sglang_hicache.workers.attention.pool import TORCH_DTYPES, DevicePool
from sglang_hicache.workers.batch import ForwardBatch, KVLayout
from sglang_hicache.workers.invariant import make_invariant
from sglang_hicache.workers.parallel import Numerics, TensorGroup, kv_share
from sglang_hicache.workers.runner import ModelRunner
from sglang_hicache.workers.sampler import sample
from sglang_hicache.workers.selfcheck import self_check
from sglang_hicache.workers.staging import StagedWeights
from sglang_hicache.workers.transfer import CopyEngine, CpuCopyEngine, CudaCopyEngine, host_pages_of
from sglang_hicache.workers.weights import load_model, read_weights, replace_weights

_log = logging.getLogger(__name__)

_DEVICE_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


class ModelWorker:
    """One rank of a tensor-parallel model.  `rendezvous` is a path for the ranks to meet at, fresh for each start."""

    def __init__(self, model: ModelConfig, rank: int, tp_size: int, rendezvous: str) -> None:
        self._config = model
        self._rendezvous = rendezvous
        self._numerics = Numerics.EXACT if model.deterministic else Numerics.FAST
        self._group = TensorGroup(rank, tp_size, self._numerics)
        self._device = _device(model, rank)
        self._model: PreTrainedModel | None = None
        self._layout: KVLayout | None = None
        #: They wait in main memory: one more copy of this rank's share, until they are taken.
        self.next_weights = StagedWeights(self._read_next_blocking, self._take_next_blocking)
        #: Set by `allocate`.
        self.runner: ModelRunner | None = None
        #: Set by `allocate` when there is a host pool.
        self.copies: CopyEngine | None = None

    @property
    def layout(self) -> KVLayout:
        """Shape and meaning of a page of this rank."""
        if self._layout is None:
            raise IntegrityError("the layout of a model worker is known only after load_blocking")
        return self._layout

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._loaded().config.vocab_size

    def load_blocking(self, page_size: int) -> None:
        """Join the other ranks, read this rank's weights, and prove the arithmetic if it has to be exact."""
        config = models.read_config(self._config.path)
        models.check_tensor_parallel(config, self._group.size)
        if self._numerics is Numerics.EXACT:
            models.check_exact(config)
        self._group.join_blocking(self._rendezvous, self._device)
        self._model = load_model(
            self._config.path,
            config,
            dtype=TORCH_DTYPES[self._config.dtype],
            device=self._device,
            group=self._group,
            weights_url=self._config.weights_url,
        )
        # What comes from a store is checked chunk by chunk, against what the digest was made of.
        if self._config.weights_digest and not self._config.weights_url:
            _check_unchanged_blocking(self._config.path, self._config.weights_digest)
        self._layout = _layout(config, self._config.dtype, page_size, self._group)
        if self._numerics is Numerics.EXACT:
            make_invariant(self._model)
            self._prove_exact_blocking()
        _log.info("loaded %s, numerics %s", config.architectures[0], self._layout.numerics_class)

    def allocate(self, device_pages: int, host: HostPool | None) -> None:
        """Make the device pool of `device_pages` pages, the dummy page among them, beside this host pool."""
        pool = DevicePool(self.layout, device_pages, self._device)
        self.runner = ModelRunner(self._loaded(), pool, self._numerics)
        if host is not None:
            engine = CudaCopyEngine if self._device.type == "cuda" else CpuCopyEngine
            self.copies = engine(pool, host_pages_of(host, self.layout, pool.kv.dtype))

    def forward_blocking(self, batch: ForwardBatch) -> list[int]:
        """Compute the rows; one token id per row that wants one, chosen by rank 0 for all."""
        if self.runner is None:
            raise IntegrityError("a forward before the device pool was allocated")
        if self.copies is not None:
            self.copies.fence()
        logits = self.runner.forward(batch)
        wanted = [row.sampling for row in batch.rows if row.sampling is not None]
        if not wanted:
            return []
        if self._group.rank == 0:
            ids = sample(logits, wanted)
        else:
            ids = torch.empty(len(wanted), dtype=torch.int64, device=self._device)
        return self._group.broadcast(ids).tolist()

    def copy_out(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Copy device pages to host pages."""
        self._engine().copy_out(op_id, device_pages, host_pages)

    def copy_in(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Copy host pages to device pages."""
        self._engine().copy_in(op_id, device_pages, host_pages)

    def finished_copies(self) -> list[int]:
        """Copies finished since the last call."""
        return [] if self.copies is None else self.copies.finished()

    def close(self) -> None:
        """Give back the pools and leave the group."""
        self.next_weights.close_blocking()
        if self.copies is not None:
            self.copies.close()
        self.copies = self.runner = self._model = None
        self._group.close()

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            raise IntegrityError("the model worker has not loaded its model")
        return self._model

    def _engine(self) -> CopyEngine:
        if self.copies is None:
            raise IntegrityError("a copy without a host pool")
        return self.copies

    def _read_next_blocking(self, path: str, digest: str, check: Callable[[], None]) -> dict[str, torch.Tensor]:
        """On a thread: read, and see that what was read is what its digest says."""
        model, config = self._loaded(), models.read_config(path)
        here, there = self.layout.architecture, models.canonical_architecture(config)
        if here != there or config.tie_word_embeddings != model.config.tie_word_embeddings:
            raise UserError(f"{path} is of another architecture: {there}; the server runs {here}")
        weights = read_weights(path, model, check)
        _check_unchanged_blocking(path, digest)
        return weights

    def _take_next_blocking(self, weights: dict[str, torch.Tensor]) -> None:
        """In the same tick on all ranks, for the proof needs them all: the exact class is part of a page's name.

        A machine that kept its promise with the old weights and breaks it with the new ones can serve no longer, since
        the old ones are overwritten: the error stops the server.
        """
        replace_weights(self._loaded(), weights)
        if self._numerics is Numerics.EXACT:
            self._prove_exact_blocking()
        _log.info("took other weights, numerics %s", self.layout.numerics_class)

    def _prove_exact_blocking(self) -> None:
        fingerprint = self_check(self._loaded(), self.layout, self._device)
        self._layout = replace(self.layout, numerics_class=self._exact_class(fingerprint))

    def _exact_class(self, fingerprint: str) -> str:
        if self._device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self._device)
            isa = f"sm{major}{minor}"
        else:
            isa = torch.backends.cpu.get_cpu_capability()
        # The name of an instruction set says too little (AVX512 stands for CPUs that round differently), so what
        # the self-check computed is part of it.
        return f"exact:{self._group.size}:{self._device.type}:{torch.__version__}:{isa}-{fingerprint}"


def _check_unchanged_blocking(path: str, digest: str) -> None:
    """After the weights were read.  The digest is part of every page's name: under that of files which changed since it
    was made, the pages of these weights would be found by whoever serves the others."""
    if weights_digest(path, default_cache_file()) != digest:
        raise UserError(f"the weights in {path} changed while they were read; try again when they are whole")


def _device(model: ModelConfig, rank: int) -> torch.device:
    allowed = _DEVICE_DTYPES.get(model.device)
    if allowed is None:
        raise UserError(f"device {model.device} is not supported; supported are {', '.join(_DEVICE_DTYPES)}")
    if model.dtype not in allowed:
        raise UserError(f"dtype {model.dtype} is not supported on {model.device}; supported are {', '.join(allowed)}")
    if model.device == "cpu":
        return torch.device("cpu")
    if rank >= torch.cuda.device_count():
        raise UserError(f"rank {rank} needs CUDA device {rank}, but there are {torch.cuda.device_count()}")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def _layout(config: PretrainedConfig, dtype: str, page_size: int, group: TensorGroup) -> KVLayout:
    heads = config.num_key_value_heads
    share = kv_share(heads, group)
    head_start, head_end = share.bounds(heads)
    fields = config.to_dict()
    return KVLayout(
        layers=config.num_hidden_layers,
        page_size=page_size,
        kv_heads_local=head_end - head_start,
        head_dim=fields.get("head_dim") or config.hidden_size // config.num_attention_heads,
        dtype=dtype,
        head_start=head_start,
        head_end=head_end,
        kv_heads_total=heads,
        writes=group.rank % (group.size // share.parts) == 0,
        architecture=models.canonical_architecture(config),
        numerics_class="fast",
    )
