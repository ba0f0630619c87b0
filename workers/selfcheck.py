"""Does this machine compute a token the same way whatever surrounds it?  Tried before a server promises it.

Exact numerics rest on how MKL, oneDNN and SDPA behave, which no library promises and which differs between
CPUs.  The model worker runs this once, after loading, on every rank together: the layers talk to each other.
It computes one sequence through the model's first layer and its last projection in one piece, then again in
every way that a server would (after a cached prefix, in chunks, token by token, among strangers, over other
pages), and compares bits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sglang_hicache.errors import UserError
from sglang_hicache.workers.attention.exact import ROW_MULTIPLE, ExactPlan
from sglang_hicache.workers.attention.interface import AttentionContext
from sglang_hicache.workers.attention.packing import PackedBatch, pack
from sglang_hicache.workers.attention.pool import DevicePool
from sglang_hicache.workers.batch import ForwardBatch, ForwardRow, KVLayout, RowSampling

#: Tokens of the sequence: past the end of the first block of 256 keys.
_LENGTH = 300
#: Tokens of each stranger, and how many there are: enough for batches of very different sizes.
_STRANGERS = (7, 90, 33)
#: Cuts of the sequence; the last tokens one by one.
_CHUNKED = (0, 19, 83, 150, 256, 270, 296, 297, 298, 299, _LENGTH)
_CACHED = (0, 256, _LENGTH)
_SHORT_TAIL = (0, _LENGTH - 2, _LENGTH)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a way of computing left: hidden states and logits of the sequence's tokens, and its pages."""

    hidden: Tensor
    logits: Tensor
    pages: Tensor

    def equals(self, other: _Outcome) -> bool:
        return (
            torch.equal(self.hidden, other.hidden)
            and torch.equal(self.logits, other.logits)
            and torch.equal(self.pages, other.pages)
        )


class _Trial:
    """One layer, a scratch pool, and made-up hidden states for a sequence and some strangers."""

    def __init__(self, model: PreTrainedModel, layout: KVLayout, device: torch.device) -> None:
        self._model = model
        self._layout = replace(layout, layers=1)
        self._device = device
        generator = torch.Generator().manual_seed(0)
        shape = (_LENGTH + sum(_STRANGERS), model.config.hidden_size)
        self._hidden = torch.randn(shape, generator=generator).to(device, model.dtype)
        self._pages_per_row = -(-_LENGTH // layout.page_size)

    def run(self, cuts: tuple[int, ...], *, strangers: int = 0, first_page: int = 1) -> _Outcome:
        """Compute the sequence piece by piece, each among the first `strangers` strangers."""
        rows = 1 + strangers
        pool = DevicePool(self._layout, first_page + rows * self._pages_per_row, self._device)
        own = self._pages(first_page, 0)
        # Backwards, so that order in the pool and order in the sequence differ.
        own.reverse()
        hidden, logits = [], []
        for start, end in zip(cuts, cuts[1:]):
            batch = [
                self._row(length, 0, self._pages(first_page, 1 + n)) for n, length in enumerate(_STRANGERS[:strangers])
            ]
            # In the middle: neither first nor last among the rows of a product.
            batch.insert(strangers // 2, self._row(end - start, start, own))
            at = sum(_STRANGERS[: strangers // 2])
            out, scores = self._forward(pool, ForwardBatch(batch), start, end, at)
            hidden.append(out)
            logits.append(scores)
        pages = pool.kv[:, 0, own].flatten(1, 2)[:, :_LENGTH]
        return _Outcome(torch.cat(hidden), torch.cat(logits), pages)

    def _pages(self, first_page: int, row: int) -> list[int]:
        start = first_page + row * self._pages_per_row
        return list(range(start, start + self._pages_per_row))

    def _row(self, length: int, prefix_len: int, pages: list[int]) -> ForwardRow:
        return ForwardRow([0] * length, prefix_len, pages, RowSampling())

    def _forward(self, pool: DevicePool, batch: ForwardBatch, start: int, end: int, at: int) -> tuple[Tensor, Tensor]:
        packed = pack(batch, page_size=pool.page_size, vocab_size=1, multiple=ROW_MULTIPLE, device=self._device)
        strange = self._hidden[_LENGTH : _LENGTH + packed.token_count - (end - start)]
        dummies = self._hidden.new_zeros((packed.padding, self._hidden.shape[1]))
        hidden = torch.cat([strange[:at], self._hidden[start:end], strange[at:], dummies])
        return self._layer(pool, packed, hidden, slice(at, at + end - start))

    def _layer(self, pool: DevicePool, packed: PackedBatch, hidden: Tensor, own: slice) -> tuple[Tensor, Tensor]:
        base = self._model.base_model
        positions = packed.positions[None]
        out = base.layers[0](
            hidden[None],
            attention_mask=None,
            position_ids=positions,
            position_embeddings=base.rotary_emb(hidden[None], position_ids=positions),
            paged=AttentionContext(pool, packed, ExactPlan),
        )[0]
        # The last projection of the last token only, on as many rows as a server would give it.
        last = base.norm(out)[own][-1:].expand(-(-len(packed.spans) // ROW_MULTIPLE) * ROW_MULTIPLE, -1)
        return out[own], self._model.lm_head(last)[:1]


@torch.inference_mode()
def self_check(model: PreTrainedModel, layout: KVLayout, device: torch.device) -> str:
    """Prove the arithmetic or raise; returns a fingerprint of it, equal on all ranks.

    Two machines whose fingerprints differ round differently, whatever their CPUs are called: they must not read
    each other's exact pages.
    """
    trial = _Trial(model, layout, device)
    # Thrown away.  Once in a thousand starts on a busy machine the very first products of a process differed from all
    # that came later, which agreed with each other; no request is ever served by those.
    trial.run((0, _LENGTH))
    whole = trial.run((0, _LENGTH))
    ways = {
        "after a cached prefix": trial.run(_CACHED),
        "after a longer cached prefix": trial.run(_SHORT_TAIL),
        "in chunks and token by token": trial.run(_CHUNKED, first_page=3),
        "among other sequences": trial.run((0, _LENGTH), strangers=2),
        "token by token among other sequences": trial.run(_SHORT_TAIL[:2] + (_LENGTH - 1, _LENGTH), strangers=3),
    }
    # Logits: of the last token, which every way computes last.
    wrong = [name for name, outcome in ways.items() if not _same_end(outcome, whole)]
    if wrong:
        raise UserError(
            f"--enable-deterministic-inference cannot be kept on this machine ({_machine(device)}): a token computed "
            f"{' or '.join(wrong)} differs in its last bits. On a CPU, set MKL_CBWR=AUTO,STRICT, as launch_server "
            "does, or OMP_NUM_THREADS=1; if that does not help, serve without the flag"
        )
    return hashlib.sha256(whole.hidden.float().cpu().numpy().tobytes()).hexdigest()[:12]


def _same_end(outcome: _Outcome, whole: _Outcome) -> bool:
    return _Outcome(outcome.hidden, outcome.logits[-1:], outcome.pages).equals(whole)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
