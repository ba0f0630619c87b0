"""A model without arithmetic: the worker of fast tests, dry runs and big simulations.  No torch.

Keys and values of a token depend on the token and on everything before it.  So do the contents here: a page
holds a digest chained over all tokens from the start of its sequence, and the next id is a function of that
digest.  A page that is read back from the wrong slot, too early, or as another sequence's middle therefore
does not fit the page before it, and the forward raises an IntegrityError that names it.  A whole prefix that
belongs to another prompt fits, but gives other ids than `reference`, which computes them without any cache.

Used like any `Worker`, by its scheduler on one thread.  Host pages hold real bytes when there is a `HostPool`,
the whole page filled and sealed, so that storage processes move something that can be torn or mistaken.  With
`holds_copies` a copy is finished only when a test says so, the oldest first: like on a device, the forward already
works with what was loaded, while the host pages still belong to the copy.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sglang_hicache.errors import IntegrityError
from sglang_hicache.workers.batch import DUMMY_PAGE, ForwardBatch, ForwardRow, KVLayout, RowSampling
from sglang_hicache.workers.staging import StagedWeights

if TYPE_CHECKING:
    from sglang_hicache.cache.pools import HostPool

_DIGEST_BYTES = 16
_HEAD_DIM = 8


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=_DIGEST_BYTES).digest()


def _chained(before: bytes, tokens: Sequence[int]) -> bytes:
    return _digest(before, array("q", tokens).tobytes())


class PageContent(NamedTuple):
    """What one page stands for."""

    #: Digest of all tokens before the page, and of those up to its last written one.
    before: bytes
    after: bytes
    #: Positions written.
    count: int


@dataclass(slots=True)
class _DevicePage:
    content: PageContent
    #: The tokens behind a page that is not full yet; digests cannot be continued in the middle of a page.
    tokens: list[int] = field(default_factory=list)


class _Copy(NamedTuple):
    is_out: bool
    host_pages: tuple[int, ...]
    contents: tuple[PageContent, ...]


class _HostMemory:
    """Host pages: sealed bytes in a pool, or a mere list without one."""

    def __init__(self, identity: bytes, layout: KVLayout, pool: HostPool | None) -> None:
        self.identity = identity
        self._layout = layout
        self._pool = pool
        self._contents: dict[int, PageContent] = {}

    def write(self, page: int, content: PageContent) -> None:
        if self._pool is None:
            self._contents[page] = content
        else:
            self._pool.page(page)[:] = self.sealed(content)

    def read(self, page: int) -> PageContent:
        if self._pool is None:
            content = self._contents.get(page)
            if content is None:
                raise IntegrityError(f"host page {page} is read, but nothing was ever written there")
            return content
        data = bytes(self._pool.page(page))
        before, after = (data[start : start + _DIGEST_BYTES] for start in (_DIGEST_BYTES, 2 * _DIGEST_BYTES))
        content = PageContent(before, after, self._layout.page_size)
        if data != self.sealed(content):
            raise IntegrityError(f"host page {page} holds wrong bytes: torn, unwritten, or of another rank or model")
        return content

    def sealed(self, content: PageContent) -> bytes:
        """Seal, before, after, repeated to the end of the page."""
        unit = _digest(self.identity, content.before, content.after) + content.before + content.after
        size_bytes = self._layout.page_bytes
        return (unit * -(-size_bytes // len(unit)))[:size_bytes]


class SyntheticWorker:
    """The hands of one rank, with digests in the place of tensors."""

    def __init__(
        self, *, rank: int = 0, tp_size: int = 1, seed: int = 0, vocab_size: int = 1000, holds_copies: bool = False
    ) -> None:
        self.vocab_size = vocab_size
        #: Forwards, and tokens they computed: what a cache is there to save.
        self.forwards = 0
        self.computed_tokens = 0
        self._rank = rank
        self._tp_size = tp_size
        self._holds_copies = holds_copies
        self._architecture = json.dumps({"model": "synthetic", "seed": seed})
        #: These weights are a digest: there is nothing to read.
        self.next_weights = StagedWeights(lambda path, digest, check: digest, self._use_weights)
        self._layout: KVLayout | None = None
        self._device_pages = 0
        self._device: dict[int, _DevicePage] = {}
        self._host: _HostMemory | None = None
        self._held: dict[int, _Copy] = {}
        self._finished: list[int] = []
        self._use_weights("")

    def __repr__(self) -> str:
        rank = f"{self._rank}/{self._tp_size}"
        return f"<SyntheticWorker rank {rank} computed_tokens={self.computed_tokens} held_copies={len(self._held)}>"

    @property
    def layout(self) -> KVLayout:
        if self._layout is None:
            raise IntegrityError("the layout of a worker was asked for before it was loaded")
        return self._layout

    def load_blocking(self, page_size: int) -> None:
        """One layer, one head per rank; a page of one token still has room for its seal."""
        self._layout = KVLayout(
            layers=1,
            page_size=page_size,
            kv_heads_local=1,
            head_dim=_HEAD_DIM,
            dtype="float32",
            head_start=self._rank,
            head_end=self._rank + 1,
            kv_heads_total=self._tp_size,
            writes=True,
            architecture=self._architecture,
            numerics_class="fast",
        )

    def allocate(self, device_pages: int, host: HostPool | None) -> None:
        self._device_pages = device_pages
        self._host = _HostMemory(self._identity, self.layout, host)

    def forward_blocking(self, batch: ForwardBatch) -> list[int]:
        """Check every row's prefix, then write the new positions and choose the next ids."""
        for row in batch.rows:
            self._check_prefix(row)
        self._check_writes(batch)
        self.forwards += 1
        self.computed_tokens += sum(len(row.token_ids) for row in batch.rows)
        ends = [self._write(row) for row in batch.rows]
        return [
            self._choose(end, row.sampling)
            for end, row in zip(ends, batch.rows, strict=True)
            if row.sampling is not None
        ]

    def copy_out(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        contents = tuple(self._full_page(page) for page in device_pages)
        self._start(op_id, _Copy(True, tuple(host_pages), contents))

    def copy_in(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        # Queued behind the copies out that are under way, which fill their pages first.
        landing: dict[int, PageContent] = {}
        for copy in self._held.values():
            if copy.is_out:
                landing |= dict(zip(copy.host_pages, copy.contents, strict=True))
        contents = tuple(landing.get(page) or self._host.read(page) for page in host_pages)
        for page, content in zip(device_pages, contents, strict=True):
            self._check_device_page(page)
            self._device[page] = _DevicePage(content)
        self._start(op_id, _Copy(False, tuple(host_pages), contents))

    def finished_copies(self) -> list[int]:
        finished, self._finished = self._finished, []
        return finished

    def _use_weights(self, weights_digest: str) -> None:
        """Everything that is computed, and so every page, depends on them."""
        self._root = _digest(self._architecture.encode(), weights_digest.encode())
        #: Part of every sealed page: another rank's page has other heads, whatever its tokens.
        self._identity = _digest(self._root, b"%d/%d" % (self._rank, self._tp_size))
        if self._host is not None:
            self._host.identity = self._identity

    def held_copies(self) -> list[int]:
        """Ids of the copies that wait for `finish_copy`, oldest first."""
        return list(self._held)

    def finish_copy(self, op_id: int) -> None:
        """Let a held copy finish."""
        copy = self._held.pop(op_id)
        for page, content in zip(copy.host_pages, copy.contents, strict=True):
            if copy.is_out:
                self._host.write(page, content)
            elif self._host.read(page) != content:
                raise IntegrityError(f"host page {page} was given away while copy {op_id} was reading it")
        self._finished.append(op_id)

    def host_content(self, page: int) -> PageContent:
        """What a host page holds: for a played storage, which writes it away."""
        return self._host.read(page)

    def put_host_content(self, page: int, content: PageContent) -> None:
        """Fill a host page: for a played storage, which has read it."""
        self._host.write(page, content)

    def close(self) -> None:
        self._device.clear()
        self._held.clear()
        self._host = None
        self.next_weights.close_blocking()

    def reference(self, tokens: Sequence[int], count: int, sampling: RowSampling | None = None) -> list[int]:
        """The next `count` ids after these tokens, computed from the tokens alone; greedy without a sampling."""
        sequence, size = list(tokens), self.layout.page_size
        end, full = self._root, 0
        for _ in range(count):
            while len(sequence) - full > size:
                end, full = _chained(end, sequence[full : full + size]), full + size
            sampled = sampling or RowSampling()
            here = RowSampling(
                temperature=sampled.temperature, top_k=sampled.top_k, seed=sampled.seed, position=len(sequence)
            )
            sequence.append(self._choose(_chained(end, sequence[full:]), here))
        return sequence[len(tokens) :]

    def reference_page(self, tokens: Sequence[int]) -> bytes:
        """The host page that ends with these tokens, whole pages, computed from the tokens alone."""
        size, before, after = self.layout.page_size, self._root, self._root
        for start in range(0, len(tokens), size):
            before, after = after, _chained(after, tokens[start : start + size])
        return self._host.sealed(PageContent(before, after, size))

    # ---- forward

    def _check_prefix(self, row: ForwardRow) -> None:
        size = self.layout.page_size
        before = self._root
        for index, page in enumerate(row.pages[: -(-row.prefix_len // size)]):
            self._check_device_page(page)
            held = self._device.get(page)
            wanted = min(size, row.prefix_len - index * size)
            if held is None or held.content.before != before or held.content.count != wanted:
                state = f"{held.content.count} positions of another sequence or place" if held else "nothing"
                if held and held.content.before == before:
                    state = f"{held.content.count} positions"
                raise IntegrityError(
                    f"device page {page}, page {index} of a row with prefix {row.prefix_len}, "
                    f"must hold {wanted} positions that follow the page before it, but holds {state}"
                )
            before = held.content.after

    def _check_writes(self, batch: ForwardBatch) -> None:
        """No page is written by two rows, or written by one and read by another."""
        size = self.layout.page_size
        read = {page for row in batch.rows for page in row.pages[: row.prefix_len // size]}
        written: set[int] = set()
        for row in batch.rows:
            end = row.prefix_len + len(row.token_ids)
            if not row.token_ids or end > len(row.pages) * size:
                raise IntegrityError(f"a row computes positions {row.prefix_len}..{end} on {len(row.pages)} pages")
            for page in row.pages[row.prefix_len // size : -(-end // size)]:
                self._check_device_page(page)
                if page in read or page in written:
                    raise IntegrityError(f"device page {page} is written by one row and used by another")
                written.add(page)

    def _write(self, row: ForwardRow) -> bytes:
        """Fill in the new positions; the digest of the whole sequence."""
        size, position, tokens = self.layout.page_size, row.prefix_len, row.token_ids
        end = position + len(tokens)
        before = self._device[row.pages[position // size - 1]].content.after if position >= size else self._root
        while position < end:
            page, offset = row.pages[position // size], position % size
            taken = tokens[position - row.prefix_len : position - row.prefix_len + size - offset]
            inside = self._device[page].tokens[:offset] + taken if offset else taken
            after = _chained(before, inside)
            # A full page is never continued: what it was made of need not be kept.
            kept = inside if len(inside) < size else []
            self._device[page] = _DevicePage(PageContent(before, after, len(inside)), kept)
            before, position = after, position + len(taken)
        return before

    def _choose(self, end: bytes, sampling: RowSampling) -> int:
        choice = b"greedy" if sampling.is_greedy else b"%d at %d" % (sampling.seed, sampling.position)
        return int.from_bytes(_digest(end, choice)[:8], "little") % self.vocab_size

    # ---- copies

    def _start(self, op_id: int, copy: _Copy) -> None:
        if len(copy.host_pages) != len(copy.contents):
            raise IntegrityError(
                f"copy {op_id} pairs {len(copy.contents)} device with {len(copy.host_pages)} host pages"
            )
        if op_id in self._held:
            raise IntegrityError(f"copy {op_id} was started twice")
        for other_id, other in self._held.items():
            shared = set(copy.host_pages) & set(other.host_pages)
            if shared and copy.is_out:
                raise IntegrityError(f"host page {min(shared)} of copy {op_id} still belongs to copy {other_id}")
        self._held[op_id] = copy
        if not self._holds_copies:
            self.finish_copy(op_id)

    def _check_device_page(self, page: int) -> None:
        if page == DUMMY_PAGE or not 0 <= page < self._device_pages:
            raise IntegrityError(f"device page {page} belongs to nobody (the pool has 1..{self._device_pages - 1})")

    def _full_page(self, page: int) -> PageContent:
        self._check_device_page(page)
        held = self._device.get(page)
        if held is None or held.content.count != self.layout.page_size:
            count = held.content.count if held else 0
            raise IntegrityError(f"device page {page} is copied out with {count} of {self.layout.page_size} positions")
        return held.content
