"""What a scheduler hands to a worker, and what a worker promises: plain records, no torch.

Owned by the workers; built and read by the scheduler on its one thread, so that everything that decides can be
imported, simulated and tested without a tensor library.  Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sglang_hicache.cache.pools import HostPool

#: Bytes of one element, by the name that ModelConfig.dtype uses.
DTYPE_SIZES_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

#: The page of the device pool that belongs to nobody: padding rows are written to it, and read from it masked.
DUMMY_PAGE = 0


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How the next token of one row is chosen.

    Randomness is a function of (seed, position) and of nothing else: a request that was retracted and computed
    again, in another batch, must repeat itself.
    """

    #: 0 is greedy.
    temperature: float = 0.0
    #: Keep the k most probable tokens; 0 or less: all.
    top_k: int = -1
    #: Keep the smallest set of most probable tokens that reaches this mass; 1: all.
    top_p: float = 1.0
    #: Drop tokens less probable than this share of the most probable one; 0: none.
    min_p: float = 0.0
    seed: int = 0
    #: Place, counted from 0, that the new token takes in its sequence.
    position: int = 0

    @property
    def is_greedy(self) -> bool:
        """The most probable token wins; no random number is drawn."""
        return self.temperature == 0 or self.top_k == 1


@dataclass(frozen=True, slots=True)
class ForwardRow:
    """One sequence's share of a forward: some tokens, the cached ones before them, and where both live."""

    #: Tokens to compute, at positions prefix_len, prefix_len + 1, ...; never empty.
    token_ids: list[int]
    #: Tokens before them whose keys and values the device pool already holds.
    prefix_len: int
    #: Device pages of the sequence in order, from position 0 on; they cover prefix and new tokens.  More is allowed.
    pages: list[int]
    #: None in the middle of a chunked prompt: no token is wanted.
    sampling: RowSampling | None = None


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The rows of one forward, in the same order on every rank."""

    rows: list[ForwardRow]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and meaning of one page of one rank: everything the pools, keys and storage need to know."""

    layers: int
    page_size: int
    #: KV heads that this rank holds: [head_start, head_end).
    kv_heads_local: int
    head_dim: int
    #: "float32", "bfloat16" or "float16".
    dtype: str
    head_start: int
    head_end: int
    kv_heads_total: int
    #: This rank is the lowest of those that hold this head range: the one that writes it to storage.
    writes: bool
    #: Canonical JSON of the model config's fields that shape keys and values.
    architecture: str
    #: "fast", or "exact:<tp>:<device>:<torch>:<isa>": exact pages are only equal within one such class.
    numerics_class: str

    @property
    def page_bytes(self) -> int:
        """Bytes of one host page: [2 (key, value), layers, page_size, kv_heads_local, head_dim], contiguous."""
        elements = 2 * self.layers * self.page_size * self.kv_heads_local * self.head_dim
        return elements * DTYPE_SIZES_BYTES[self.dtype]


class NextWeights(Protocol):
    """Other weights of the model that runs: none, being read, or ready to be taken."""

    def stage(self, model_path: str, weights_digest: str) -> None:
        """Begin to read this rank's share of them, beside those in use and on a thread of its own."""
        ...

    def outcome(self) -> str | None:
        """None while they are being read, "" when they are ready, else why they cannot be taken."""
        ...

    def commit_blocking(self) -> None:
        """Compute with them from the next forward on."""
        ...

    def drop(self) -> None:
        """Forget them.  Harmless when there are none."""
        ...


class Worker(Protocol):
    """The hands of one rank, called by its scheduler on one thread, in this order: load, allocate, work, close.

    Within a tick copies out are issued first, then copies in, then the forward.  Each sees the effects of those
    before it, so a freed device page may be refilled, and a loaded page computed on, in the same tick.
    """

    @property
    def layout(self) -> KVLayout:
        """Known after `load_blocking`."""
        ...

    @property
    def next_weights(self) -> NextWeights:
        """Other weights of the same model, to be taken while serving.  `layout` may name another class after that."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids of requests are below this.  Known after `load_blocking`."""
        ...

    def load_blocking(self, page_size: int) -> None:
        """Join the other ranks, read this rank's share of the weights, prove the arithmetic if it must be exact."""
        ...

    def allocate(self, device_pages: int, host: HostPool | None) -> None:
        """Make the device pool.  `device_pages` counts the dummy page, page 0."""
        ...

    def forward_blocking(self, batch: ForwardBatch) -> list[int]:
        """Compute the rows; one token id per row that has a `sampling`, in row order, the same on all ranks."""
        ...

    def copy_out(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Copy device pages to host pages, pairwise."""
        ...

    def copy_in(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Copy host pages to device pages, pairwise."""
        ...

    def finished_copies(self) -> list[int]:
        """Ids of the copies that have finished since the last call: their host pages may be used or freed."""
        ...

    def close(self) -> None:
        """Give everything back; the worker is not used again."""
        ...
