"""The device pages of requests: taken at admission, handed to the tree as they fill, given back at the end.

The one place that knows which pages a request owns and which the tree owns for it, so a retraction, an abort at
any stage and an ordinary end free exactly the same way.  Replicated; called inside `SchedulerCore.apply`.
"""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.backup import BackupQueue
from sglang_hicache.cache.controller import CacheController
from sglang_hicache.cache.page import encode_tokens
from sglang_hicache.cache.tree import Match
from sglang_hicache.scheduler.request import Request


class RequestPages:
    """Moves pages between requests, the tree and the free list."""

    def __init__(self, controller: CacheController, backup: BackupQueue, page_size: int, reuse: bool) -> None:
        self._controller = controller
        self._backup = backup
        self._page_size = page_size
        self._reuse = reuse

    def key(self, request: Request) -> bytes:
        """Flat key of the longest prefix that may come from a cache: whole pages, and one token left to compute."""
        if not self._reuse or request.is_probe:
            return b""
        return encode_tokens(request.tokens[: (len(request.tokens) - 1) // self._page_size * self._page_size])

    def match(self, request: Request) -> Match:
        return self._controller.tree.match(request.seed, self.key(request))

    def take(self, request: Request, load_back_threshold: int, reserve_pages: int, tick: int) -> Match | None:
        """Give the request pages for all of its tokens, cached ones first; None (and nothing taken) if they do
        not fit now with `reserve_pages` to spare."""
        tree, page_size = self._controller.tree, self._page_size
        match = self.match(request)
        # Locked before anything is evicted: the victim could be the very prefix that was just found.
        tree.lock_device(match.device_node)
        tree.lock_host(match.host_node)
        total = -(-len(request.tokens) // page_size)
        loads = match.host_len if match.host_len >= load_back_threshold else 0
        node, pages = match.device_node, list(match.device_pages)
        if total - len(pages) + reserve_pages > self._controller.device_pages_available():
            tree.unlock_host(match.host_node)
            tree.unlock_device(match.device_node)
            return None
        if loads:
            loaded = self._controller.load_back(match)
            if loaded is not None:
                tree.lock_device(match.host_node)
                tree.unlock_device(match.device_node)
                node, pages = match.host_node, pages + loaded
        cached_pages = len(pages)
        own = self._controller.allocate_device(total - cached_pages)
        tree.unlock_host(match.host_node)
        if own is None:
            tree.unlock_device(node)
            return None
        request.node, request.locked_pages = node, cached_pages
        request.pages, request.computed = pages + own, cached_pages * page_size
        tree.touch(node, tick)
        return match

    def grow(self, request: Request) -> bool:
        """One more token: take a page if it starts one.  False if there is none."""
        if len(request.tokens) <= len(request.pages) * self._page_size:
            return True
        page = self._controller.allocate_device(1)
        if page is None:
            return False
        request.pages += page
        return True

    def share(self, request: Request, tick: int) -> None:
        """Hand the computed full pages to the tree, so that others find them."""
        full = request.computed // self._page_size
        # Not locked_pages alone: a prompt that was cached whole is a hit all the same.  Not counted_pages alone: what
        # a retracted request computes again is counted, but may have left the tree meanwhile.
        if not self._reuse or request.is_probe or full <= min(request.locked_pages, request.counted_pages):
            return
        tree = self._controller.tree
        inserted = self._controller.insert(
            request.seed, encode_tokens(request.tokens[: full * self._page_size]), request.pages[:full],
            tick, request.priority, request.counted_pages,
        )
        request.pages[:full] = inserted.pages
        tree.lock_device(inserted.node)
        if request.node is not None:
            tree.unlock_device(request.node)
        request.node, request.locked_pages = inserted.node, full
        request.counted_pages = max(full, request.counted_pages)
        self._backup.offer(inserted.path)

    def give_back(self, request: Request, tick: int) -> None:
        """Leave: what is computed stays in the tree, unlocked; the rest is free."""
        self.share(request, tick)
        self._controller.device.free(request.pages[request.locked_pages :])
        if request.node is not None:
            self._controller.tree.unlock_device(request.node)
        request.pages, request.node = [], None
        request.locked_pages = request.computed = 0

    def cached_tokens(
        self, request: Request, match: Match, storage_span: tuple[int, int], backend: str
    ) -> wire.CachedTokens:
        """Where the cached prefix came from: device + host + storage = tokens that are not computed."""
        device = match.device_len
        end = request.computed
        storage = max(0, min(end, storage_span[1]) - max(device, storage_span[0]))
        return wire.CachedTokens(device=device, host=end - device - storage, storage=storage, storage_backend=backend)
