"""What must hold in the world of the storage machine: cheap promises after every step, all of them now and then.

The cheap ones compare counters and walk only what is small: running requests, ops, nodes.  The full ones compute every
key and every byte again from the tokens of the requests.
"""

from __future__ import annotations

from sglang_hicache.cache.check import check_residency
from sglang_hicache.cache.page import page_keys
from sglang_hicache.storage.page_format import HEADER_BYTES, ROOT_PARENT, PageName, is_whole, parse_header
from tests.machines.storage_world import NAMESPACE, Server
from tests.ranks.world import PAGE

#: Faults with which a store loses, or never gets, pages that it has spoken of.
LOSING = ("flip", "short", "disappear", "duplicate")


class Checks:
    """The promises of one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._digest = -1
        self._ended = 0
        #: Key to what a page of it holds, for every prefix that a request ever had.
        self._pages: dict[bytes, tuple[bytes, int, bytes, bytes]] = {}
        self._known: dict[str, int] = {}
        #: The store may lose pages, or has room for a few only.
        self.has_holes = False

    # -------------------------------------------------------------------------------- after every step

    def quick(self) -> None:
        """After every step: what counters and short walks can tell."""
        core = self._server.core
        self._server.free_pages.check()
        self._check_ends()
        if core.digest == self._digest:
            return
        self._digest = core.digest
        core.check_counts()
        check_residency(core.tiers.controller.tree)
        core.tiers.backup.check()
        for request in core.admission.running:
            node, pages = request.node, 0
            while node is not None and node.parent is not None:
                assert node.device_pages is not None and node.device_locks, f"{request!r} holds {node!r}"
                pages, node = pages + node.page_count, node.parent
            assert pages == request.locked_pages, f"{request!r} counts {request.locked_pages} locked pages of {pages}"

    def _check_ends(self) -> None:
        """The text of a request that has ended is that of a server without a cache."""
        ends = self._server.ends
        if len(ends) == self._ended:
            return
        for rid in list(ends)[self._ended :]:
            prompt, _ = self._server.prompts[rid]
            text = self._server.texts[rid]
            assert text == self._server.worker.reference(prompt, len(text)), f"{rid}: another text than without cache"
        self._ended = len(ends)

    # ------------------------------------------------------------------------------------ now and then

    def full(self) -> None:
        """Everything, from scratch."""
        self._server.core.check()
        self._learn()
        self._check_host()
        memory, objects = self._server.memory, self._server.memory._objects
        used = memory.stats()["used_bytes"]
        assert used == sum(map(len, objects.values())), f"the store counts {used} bytes"
        for name, stored in objects.items():
            if len(stored) != HEADER_BYTES + self._server.pool.page_bytes:
                continue  # cut short, or of a self-test that went wrong
            self._check_object(name, stored)
            if not self.has_holes:
                parent = self._pages[name.key][0]
                assert parent == ROOT_PARENT or name._replace(key=parent) in objects, f"{name} hangs in the air"

    def _learn(self) -> None:
        """Keys and contents of every prefix of every request, from the tokens alone."""
        server = self._server
        for rid, (prompt, seed) in server.prompts.items():
            tokens = prompt + server.texts[rid]
            if len(tokens) // PAGE == self._known.get(rid):
                continue
            self._known[rid] = len(tokens) // PAGE
            parent = ROOT_PARENT
            for depth, key in enumerate(page_keys(tokens[: len(tokens) // PAGE * PAGE], PAGE, seed)):
                if key not in self._pages:
                    content = server.worker.reference_page(tokens[: (depth + 1) * PAGE])
                    self._pages[key] = parent, depth, seed, content
                parent = key

    def _check_host(self) -> None:
        """Every host page of the tree whose copy has landed holds what the model computes for its prefix."""
        pool = self._server.pool
        for node in self._server.core.tiers.controller.tree.nodes():
            if node.host_pages is not None and not node.landing:
                for key, page in zip(node.page_keys(), node.host_pages, strict=True):
                    assert pool.page(page) == self._pages[key][3], f"host page {page} of {node!r} holds something else"

    def _check_object(self, name: PageName, stored: bytes) -> None:
        """Key, header and bytes of one stored object; damage is allowed where a reader would notice it."""
        assert name.namespace == NAMESPACE
        header = parse_header(stored)
        if header is None or header.key != name.key or not is_whole(stored, [stored[HEADER_BYTES:]]):
            assert self.has_holes, f"{name} is damaged and nobody damaged it"
            return
        assert name.key in self._pages, f"{name} is no prefix of any request"
        parent, depth, seed, content = self._pages[name.key]
        assert (header.parent, header.depth) == (parent, depth), f"{name} has another parent or depth than its prefix"
        assert header.tenant == seed[:12].ljust(12, b"\0"), f"{name} has another tenant"
        assert stored[HEADER_BYTES:] == content, f"{name} holds another prefix, and its checksum says that it is right"

    def at_rest(self) -> None:
        """Nothing is under way."""
        core = self._server.core
        assert not core.commands.blockers(), core.commands.blockers()
        assert not core.tiers.quarantine.pages
        assert len(self._server.ends) == len(self._server.prompts), "a request did not end"
        assert not self._server.worker.held_copies()
        alive = [epoch for epoch, process in self._server.processes.items() if not process.exited()]
        assert alive == ([core.tiers.slot.epoch] if core.tiers.slot.gate() else [])
