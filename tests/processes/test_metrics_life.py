"""The series of a real server while storages come and go: none comes, none goes, none falls."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.metrics_scrape import Scrape
from tests.processes.server import Server, cached

FLAGS = (
    "--enable-deterministic-inference", "--page-size", "16", "--max-total-tokens", "8192",
    "--enable-hierarchical-cache", "--enable-metrics",
)  # fmt: skip
PROMPT = "Return a list of the names of all the modules in the given directory, sorted by name and by size. " * 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), *FLAGS) as running:
        yield running


def scraped_now(server: Server) -> Scrape:
    reply = server.http.get("/metrics")  # without a key
    assert reply.status_code == 200, reply.text
    return Scrape(reply.text)


def scraped(server: Server) -> Scrape:
    """With an answer of the rank: on a busy machine it may need more than the 1.5 s that it gets."""
    for _ in range(20):
        scrape = scraped_now(server)
        if scrape.total("sglang_hicache:rank_up") == 1:
            return scrape
    raise AssertionError("the rank never answered")


def detach(server: Server) -> None:
    server.quiesce()
    reply = server.admin("DELETE", "/hicache/storage-backend")
    assert reply.status_code == 200, reply.text


def test_twenty_attachments_and_what_they_did(server: Server, tmp_path: Path) -> None:
    """1. Attach, detach. 2. The exporter registers the next attachment's series again, or drops those of the last one:
    the scrape fails, or rates turn negative, and a restart is the only way out."""
    before = scraped(server)
    for round_number in range(20):
        backend = ("file", "memory")[round_number % 2]
        reply = server.attach(tmp_path / "store") if backend == "file" else server.admin(
            "PUT", "/hicache/storage-backend", json={"hicache_storage_backend": "memory"}
        )  # fmt: skip
        assert reply.status_code == 200, reply.text
        if round_number < 4:
            server.generate(f"{PROMPT} {round_number}", max_new_tokens=1)
        scrape = scraped(server)
        scrape.check_follows(before)
        assert scrape.by("state", "sglang_hicache:attachment_state")["attached"] == 1
        detach(server)
        before = scraped(server)
        before.check_follows(scrape)
    assert before.by("state", "sglang_hicache:attachment_state")["detached"] == 1
    assert before.total("sglang_hicache:attachment_epoch") == 20
    assert before.check_histograms() > 10
    for name in ("FileBackend", "MemoryBackend"):
        assert before.total("sglang:backuped_tokens_total", storage_backend=name) > 0, name


def test_the_way_of_a_prompt_through_the_tiers_is_counted(server: Server, tmp_path: Path) -> None:
    server.flush()
    start = scraped(server)
    server.attach(tmp_path / "store")
    first = server.generate(PROMPT)
    server.quiesce()
    server.flush()
    again = server.generate(PROMPT)
    from_storage = cached(again)["storage"]
    assert from_storage > 60 and again["output_ids"] == first["output_ids"]
    detach(server)
    end = scraped(server)
    end.check_follows(start)

    def grown(name: str, **labels: str) -> float:
        return end.total(name, **labels) - start.total(name, **labels)

    prompt = first["meta_info"]["prompt_tokens"]
    assert grown("sglang:prompt_tokens_total") == 2 * prompt
    assert grown("sglang:generation_tokens_total") == 32
    assert grown("sglang:cached_tokens_total", cache_source="storage") == from_storage
    assert grown("sglang:uncached_prompt_tokens_histogram_count") == 2
    file = {"storage_backend": "FileBackend"}
    for name in ("prefetched_tokens", "backuped_tokens", "storage_prefetch_hit_tokens"):
        assert grown(f"sglang:{name}_total", **file) >= from_storage, name
        assert grown(f"sglang:{name}_total", storage_backend="MemoryBackend") == 0
    for name in ("load_back_tokens", "hicache_backup_tokens", "load_back_bytes", "hicache_backup_bytes"):
        assert grown(f"sglang:{name}_total") >= from_storage, name
    page_bytes = grown("sglang:load_back_bytes_total") / (grown("sglang:load_back_tokens_total") / 16)
    assert grown("sglang_hicache:storage_read_bytes_total", **file) == page_bytes * from_storage / 16
    assert grown("sglang_hicache:storage_written_bytes_total", **file) > 0
    for kind in ("lookup", "read", "write", "load_back", "write_through"):
        assert grown("sglang_hicache:op_duration_seconds_count", kind=kind) > 0, kind
    assert grown("sglang:prefetch_pgs_sum", **file) == from_storage / 16
    assert grown("sglang:backup_pgs_count", **file) > 0


def test_a_rank_that_hangs_is_down_and_its_counters_stay(server: Server) -> None:
    before = scraped(server)
    (rank,) = server.pids("scheduler rank 0")
    os.kill(rank, signal.SIGSTOP)
    try:
        hung = scraped_now(server)
    finally:
        os.kill(rank, signal.SIGCONT)
    assert hung.by("tp_rank", "sglang_hicache:rank_up") == {"0": 0}
    gone = {name for name, _ in before.values.keys() - hung.values.keys()}
    assert gone == {name for name, family in before.families.items() if family.type == "gauge"} - {
        "sglang_hicache:rank_up"
    }
    assert hung.total("sglang_hicache:ticks_total") >= before.total("sglang_hicache:ticks_total") > 0
    scraped(server).check_follows(before)
