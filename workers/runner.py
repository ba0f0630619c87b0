"""One forward of the model over the device pool: a batch in, logits out.

Owned by the model worker, on the thread that calls it.  Decides nothing: which rows, pages and lengths is the
scheduler's, which token is the sampler's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sglang_hicache.workers.attention.exact import ROW_MULTIPLE, ExactPlan
from sglang_hicache.workers.attention.fast import FastPlan
from sglang_hicache.workers.attention.interface import AttentionContext, Planner
from sglang_hicache.workers.attention.packing import pack
from sglang_hicache.workers.attention.pool import DevicePool
from sglang_hicache.workers.batch import ForwardBatch
from sglang_hicache.workers.parallel import Numerics

_PLANNERS: dict[Numerics, Planner] = {Numerics.FAST: FastPlan, Numerics.EXACT: ExactPlan}
#: Products in exact numerics have at least this many rows: with fewer the libraries take other kernels.
_ROW_MULTIPLES = {Numerics.FAST: 1, Numerics.EXACT: ROW_MULTIPLE}


class ModelRunner:
    """A model that attends through a device pool."""

    def __init__(self, model: PreTrainedModel, pool: DevicePool, numerics: Numerics) -> None:
        self.model = model
        self.pool = pool
        self._planner = _PLANNERS[numerics]
        self._row_multiple = _ROW_MULTIPLES[numerics]
        self._vocab_size: int = model.config.vocab_size

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [rows with a sampling, vocabulary]; with several ranks only rank 0's are whole.

        The keys and values of all rows are in the pool afterwards.
        """
        packed = pack(
            batch,
            page_size=self.pool.page_size,
            vocab_size=self._vocab_size,
            multiple=self._row_multiple,
            device=self.pool.device,
        )
        inputs = {
            "input_ids": packed.input_ids[None],
            "position_ids": packed.positions[None],
            "use_cache": False,
            "paged": AttentionContext(self.pool, packed, self._planner),
        }
        if not packed.wanted_count:
            # Nothing but prompt chunks: the decoder alone, without the largest product of a small model.
            self.model.base_model(**inputs)
            return packed.positions.new_empty((0, self._vocab_size), dtype=torch.float32)
        logits = self.model(**inputs, logits_to_keep=packed.wanted).logits[0]
        return logits[: packed.wanted_count].float()
