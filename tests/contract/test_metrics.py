"""GET /metrics: what a scrape says, to whom, and that no series comes, goes or falls while storages come and go."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.cache import measures
from sglang_hicache.cache.loss import Loss
from sglang_hicache.config import CacheConfig
from sglang_hicache.errors import STOP_CODES
from sglang_hicache.observe import LEVELS
from sglang_hicache.storage import registry
from sglang_hicache.storage.attachment_events import State
from sglang_hicache.storage.backend import OpenContext
from sglang_hicache.tokenizer import metrics
from sglang_hicache.tokenizer.metrics_table import INCIDENTS, PROCESS_COUNTERS, UNFULFILLED, VERDICTS
from tests.contract.fake_server import FakeServer, make_config
from tests.house.source import ROOT
from tests.processes.metrics_scrape import Scrape

Serve = Callable[..., FakeServer]


@pytest.fixture
def server(serve: Serve) -> FakeServer:
    """Two ranks, with metrics."""
    made = serve(enable_metrics=True)
    made.answer_status = lambda rank: STATUS
    return made


#: What a rank with some work behind it says of itself.
STATUS: dict[str, Any] = {
    "state": "attached", "epoch": 3, "backend": "file", "in_flight": {"read": 2}, "queued_backups": 5,
    "quarantined_pages": 1, "backend_stats": {"used_bytes": 700, "max_bytes": 1000},
    "counters": {
        "ticks": 77, "served_prompt_tokens": 1000, "served_generation_tokens": 30, "served_cached_host_tokens": 640,
        "cache_evicted_tokens": 128, "cache_backup_tokens": 256, "cache_dropped_host_pressure_tokens": 64,
        "storage_stopped_no_space": 2, "storage_stopped_wrong moon": 3,
    },
    "totals": {
        "file": {"prefetch_prefetched_tokens": 192, "prefetch_deadline_tokens": 64, "backup_backuped_tokens": 320,
                 "lost_tokens": 96, "lost_no_space_tokens": 64, "lost_shutdown_tokens": 32, "evicted_pages": 9},
        "memory": {"backup_backuped_tokens": 4096},
    },
    "histograms": {
        "load_back_duration_seconds": wire.Histogram(
            bounds=measures.LOAD_BACK_SECONDS, counts=(1, *[0] * 8, 2, 3), total=9.5),
        "backup_pgs/file": wire.Histogram(bounds=measures.PAGES, counts=(1, 2, 0, 0, 0, 1), total=211.0),
    },
    "load": {"device_pages": 64, "device_pages_free": 32, "device_pages_evictable": 16, "host_pages": 128,
             "host_pages_free": 28, "page_bytes": 1000, "running-req": 4, "queue-req": 6,
             "latest_prompt_tokens": 200, "latest_cached_tokens": 50},
}  # fmt: skip

SCHEDULER = {"model_name": "org/tiny", "engine_type": "unified", "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
CACHE = {"cache_type": "PrefixTree", "tp_rank": "0", "pp_rank": "0", "dp_rank": "0"}
STORAGE = {"storage_backend": "FileBackend", "tp_rank": "0", "dp_rank": "0", "pp_rank": "0", "pp_size": "1",
           "attn_cp_rank": "0", "attn_cp_size": "1"}  # fmt: skip


def scraped(server: FakeServer) -> Scrape:
    """One answer, parsed."""
    reply = server.call("GET", "/metrics")
    assert reply.status_code == 200
    return Scrape(reply.text)


def test_values_and_labels_are_those_that_dashboards_know(server: FakeServer) -> None:
    scrape = scraped(server)
    for name, value in {
        "num_running_reqs": 4, "num_queue_reqs": 6, "cache_hit_rate": 0.25, "token_usage": 0.25,
        "full_token_usage": 0.25, "kv_available_tokens": 2048, "kv_evictable_tokens": 1024, "kv_used_tokens": 1024,
        "num_used_tokens": 1024, "hicache_host_used_tokens": 6400, "hicache_host_total_tokens": 8192,
        "prompt_tokens_total": 1000, "generation_tokens_total": 30,
    }.items():  # fmt: skip
        assert scrape.value("sglang:" + name, **SCHEDULER) == value, name
    assert scrape.value("sglang:cached_tokens_total", cache_source="host", **SCHEDULER) == 640
    assert scrape.value("sglang:evicted_tokens_total", **CACHE) == 128
    assert scrape.value("sglang:hicache_backup_tokens_total", pool="kv", **CACHE) == 256
    assert scrape.value("sglang:hicache_dropped_tokens_total", reason="host_pressure", pool="kv", **CACHE) == 64
    assert scrape.value("sglang:prefetched_tokens_total", **STORAGE) == 192
    assert scrape.value("sglang:backuped_tokens_total", **STORAGE) == 320
    assert scrape.value("sglang:backuped_tokens_total", **STORAGE | {"storage_backend": "MemoryBackend"}) == 4096
    assert scrape.value("sglang:hicache_backup_dropped_tokens_total", **STORAGE) == 96
    unfulfilled = scrape.by("reason", "sglang:storage_prefetch_unfulfilled_tokens_total", **STORAGE)
    assert unfulfilled == dict.fromkeys(UNFULFILLED, 0) | {"deadline": 64}
    # Bytes differ from rank to rank, so each tells its own.
    assert scrape.value("sglang:hicache_backup_bytes_total", **CACHE) == 4000
    assert scrape.value("sglang:hicache_backup_bytes_total", **CACHE | {"tp_rank": "1"}) == 4000


def test_plug_ins_with_names_of_their_own_count_as_one_backend(server: FakeServer) -> None:
    """Otherwise each of eleven names would have every series, or a series would come and go with what is attached."""
    names = registry.names()
    totals = {"eic": {"lost_tokens": 5, "evicted_pages": 1}, "dynamic": {"lost_tokens": 7}, "file": {"lost_tokens": 9}}
    eic = wire.Histogram(bounds=measures.PAGES, counts=(1, 2, 0, 0, 0, 1), total=211.0)
    dynamic = wire.Histogram(bounds=measures.PAGES, counts=(0, 1, 0, 0, 0, 0), total=4.0)
    histograms = {"backup_pgs/eic": eic, "backup_pgs/dynamic": dynamic, "prefetch_pgs/eic": eic}
    server.answer_status = lambda rank: STATUS | {"backend": "eic", "totals": totals, "histograms": histograms}
    scrape, labels = scraped(server), STORAGE | {"storage_backend": "DynamicBackend"}
    assert scrape.value("sglang:hicache_backup_dropped_tokens_total", **labels) == 12
    assert scrape.value("sglang:hicache_backup_dropped_tokens_total", **STORAGE) == 9
    assert scrape.value("sglang:backup_pgs_count", **labels) == 5
    assert scrape.value("sglang:backup_pgs_sum", **labels) == 215
    assert scrape.value("sglang:prefetch_pgs_count", **labels) == 4
    assert len(scrape.by("storage_backend", "sglang:prefetched_tokens_total")) == len(names)


def test_histograms_are_cumulative(server: FakeServer) -> None:
    scrape = scraped(server)
    assert scrape.value("sglang:load_back_duration_seconds_count", **CACHE) == 6
    assert scrape.value("sglang:load_back_duration_seconds_sum", **CACHE) == 9.5
    assert scrape.value("sglang:load_back_duration_seconds_bucket", le="0.001", **CACHE) == 1
    assert scrape.value("sglang:load_back_duration_seconds_bucket", le="1.0", **CACHE) == 3
    assert scrape.value("sglang:load_back_duration_seconds_bucket", le="+Inf", **CACHE) == 6
    assert scrape.value("sglang:backup_pgs_bucket", le="5.0", **STORAGE) == 3
    assert scrape.check_histograms() > 10


def test_the_slot_of_each_rank(server: FakeServer) -> None:
    server.answer_status = lambda rank: STATUS | ({"state": "failed", "epoch": 4} if rank else {})
    scrape = scraped(server)
    for number, state in (("0", "attached"), ("1", "failed")):
        states = scrape.by("state", "sglang_hicache:attachment_state", tp_rank=number)
        assert states == {each.value: each.value == state for each in State}
    rank = {"model_name": "org/tiny", "tp_rank": "1"}
    assert scrape.value("sglang_hicache:attachment_epoch", **rank) == 4
    assert scrape.value("sglang_hicache:ticks_total", **rank) == 77
    assert scrape.value("sglang_hicache:queued_backups", **rank) == 5
    assert scrape.value("sglang_hicache:quarantined_pages", **rank) == 1
    assert scrape.value("sglang_hicache:storage_ops_in_flight", kind="read", **rank) == 2
    assert scrape.value("sglang_hicache:store_used_bytes", **rank) == 700
    assert scrape.value("sglang_hicache:store_max_bytes", **rank) == 1000
    assert scrape.value("sglang_hicache:storage_evicted_pages_total", storage_backend="FileBackend", **rank) == 9


def test_whether_storage_is_trusted(server: FakeServer) -> None:
    """What all ranks have alike is told once; a state that was never reached has its 0 seconds."""
    breaker = wire.BreakerStatus(
        state="half_open", level="failover", total_s={"closed": 90.5, "open": 8.0, "half_open": 1.5}, trips=3,
        serving="standby 1", failovers=2, failbacks=1,
    )  # fmt: skip
    server.answer_status = lambda rank: STATUS | {"breaker": breaker}
    scrape, labels = scraped(server), {"model_name": "org/tiny", "tp_rank": "0"}
    states = scrape.by("state", "sglang_hicache:breaker_state")
    assert states == {"off": 0, "closed": 0, "open": 0, "half_open": 1}
    seconds = scrape.by("state", "sglang_hicache:breaker_seconds_total")
    assert seconds == {"off": 0, "closed": 90.5, "open": 8.0, "half_open": 1.5}
    for name, value in (("breaker_trips", 3), ("failovers", 2), ("failbacks", 1)):
        assert scrape.value(f"sglang_hicache:{name}_total", **labels) == value, name
    assert scrape.value("sglang_hicache:standby_serves", **labels) == 1


def test_what_it_cost_that_storage_was_missed(server: FakeServer) -> None:
    counters = {"incidents_outage": 2, "reprefilled_outage_tokens": 640, "reprefill_outage_us": 1_500_000}
    incidents = [
        wire.Incident(number=1, kind="refusal", cause="wrong_host: who?", began_s_ago=90.0, ended_s_ago=80.0),
        wire.Incident(number=2, kind="outage", cause="hung: the store hangs", began_s_ago=5.0),
    ]
    totals = {"file": {"prefetch_gate_recompute_tokens": 128}}
    server.answer_status = lambda rank: STATUS | {"counters": counters, "incidents": incidents, "totals": totals}
    scrape = scraped(server)
    for name, value in {
        "incident_lasts": 1, "incidents_total": 2, "reprefilled_tokens_total": 640, "reprefill_seconds_total": 1.5,
    }.items():  # fmt: skip
        kinds = scrape.by("kind", "sglang_hicache:" + name)
        assert kinds == {"outage": value, "refusal": 0, "cold_start": 0}, name
    verdicts = scrape.by("verdict", "sglang_hicache:gate_tokens_total", storage_backend="FileBackend")
    assert verdicts == {"fetch": 0, "recompute": 128, "probe": 0}
    # A value that only one of the two knows would be counted and never shown, or shown and never counted.
    assert get_args(get_type_hints(wire.Incident)["kind"]) == INCIDENTS
    assert get_args(get_type_hints(wire.FetchDecision)["verdict"]) == VERDICTS


def test_every_reason_is_told_from_the_start_and_no_fault_makes_a_new_one(server: FakeServer) -> None:
    """An alert on a series that does not exist yet never fires; a series per error text fills the database."""
    scrape = scraped(server)
    lost = scrape.by("reason", "sglang_hicache:lost_tokens_total", storage_backend="FileBackend")
    assert lost == dict.fromkeys([loss.value for loss in Loss], 0) | {"no_space": 64, "shutdown": 32}
    stopped = scrape.by("reason", "sglang_hicache:storage_stopped_ops_total", tp_rank="0")
    assert stopped == dict.fromkeys(STOP_CODES, 0) | {"no_space": 2}


def test_twenty_attachments_neither_add_nor_lose_nor_lower_a_series(server: FakeServer) -> None:
    server.answer_status = lambda rank: {"state": "detached", "epoch": 0}
    before = scraped(server)
    for epoch in range(1, 21):
        counted = {"backup_backuped_tokens": epoch * 64, "evicted_pages": epoch}
        attached = STATUS | {
            "epoch": epoch, "backend": ("file", "memory")[epoch % 2],
            "totals": {"file": counted} if epoch == 1 else {"file": counted, "memory": counted},
            "histograms": {"backup_pgs/file": wire.Histogram(bounds=measures.PAGES, counts=(epoch, 0, 0, 0, 0, 0))},
            "counters": {"ticks": epoch * 10, f"storage_stopped_new {epoch}": epoch},
        }  # fmt: skip
        for answer in (attached, attached | {"state": "detached", "backend": "", "backend_stats": {}}):
            server.answer_status = lambda rank, answer=answer: answer
            scrape = scraped(server)
            scrape.check_follows(before)
            before = scrape


def test_names_and_types_are_in_order(server: FakeServer) -> None:
    scrape = scraped(server)
    for family in scrape.families.values():
        assert re.fullmatch(r"sglang(_hicache)?:[a-z][a-z_]+", family.name)
        assert family.type in ("gauge", "counter", "histogram") and family.documentation.endswith(".")
        assert family.samples, f"{family.name} has no series"
        if family.type == "counter":
            assert {sample.name for sample in family.samples} == {family.name + "_total"}
    assert "# TYPE sglang:evicted_tokens_total counter" in scrape.text
    classes = scrape.by("storage_backend", "sglang:prefetched_tokens_total")
    assert classes.keys() == {registry.spec(name).class_name for name in registry.names()}


def rows_of_the_page(begin: str) -> dict[str, list[str]]:
    """Lines of the tables of docs/metrics.md that begin so: their first cell, and the others."""
    lines = (ROOT / "docs/metrics.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(begin)]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: row[1:] for row in rows}


def test_the_page_says_what_a_scrape_gives(server: FakeServer) -> None:
    scrape, rows = scraped(server), rows_of_the_page("| `sglang")
    sets = {name: set(re.findall(r"`(\w+)`", cells[0])) for name, cells in rows_of_the_page("| set ").items()}
    names = {name + ("_total" if family.type == "counter" else ""): family for name, family in scrape.families.items()}
    assert [name.strip("`") for name in rows] == list(names)
    for (kind, label_names, ranks, meaning), family in zip(rows.values(), names.values()):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        said = sets["set " + label_names.split(",")[0]] | set(re.findall(r"`(\w+)`", label_names))
        told_by = {sample.labels["tp_rank"] for sample in family.samples}
        assert (kind, said, meaning) == (family.type, labels, family.documentation), family.name
        assert ranks == ("each" if told_by == {"0", "1"} else "0"), family.name


def test_everything_that_a_storage_process_counts_is_told_or_is_a_level(tmp_path: Path) -> None:
    """1. A backend counts something new. 2. It is in GET for whoever looks, and no alert can ever see it."""
    names = set()
    for backend, config in (("file", {"file_storage_path": str(tmp_path / "store")}), ("memory", {})):
        _, settings = registry.validate_extra_config(backend, json.dumps(config))
        opened = registry.create(backend, settings, OpenContext(rank=0, namespace="ab" * 32, page_bytes=64))
        opened.open_blocking()
        names |= opened.stats().keys()
        opened.close_blocking()
    names |= {"direct_pages", "staged_pages"}  # of a store that cannot be opened without its servers
    for path in Path(registry.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        names |= set(re.findall(r'counters\.add\("(\w+)"', text))
        names |= {f"{kind}_requests" for kind in re.findall(r'self\._count\("(\w+)"\)', text)}
    assert names - LEVELS == {name for name, _ in PROCESS_COUNTERS}


def test_without_a_host_tier_its_gauges_are_not_there(model: Path) -> None:
    config = make_config(model, enable_metrics=True)
    server = FakeServer(msgspec.structs.replace(config, cache=CacheConfig()))
    try:
        assert not [name for name in scraped(server).families if "hicache_host" in name]
    finally:
        server.close()


class TestSilence:
    """A rank that hangs."""

    def test_its_counters_stay_and_it_is_down(self, server: FakeServer) -> None:
        before = scraped(server)
        server.answer_status = lambda rank: None if rank == 1 else STATUS
        after = scraped(server)
        assert after.by("tp_rank", "sglang_hicache:rank_up") == {"0": 1, "1": 0}
        lost = before.values.keys() - after.values.keys()
        assert lost and {dict(labels)["tp_rank"] for _, labels in lost} == {"1"}
        gauges = {name for name, family in before.families.items() if family.type == "gauge"}
        assert {name for name, _ in lost} <= gauges
        assert after.value("sglang_hicache:ticks_total", model_name="org/tiny", tp_rank="1") == 77

    def test_all_of_them(self, server: FakeServer) -> None:
        server.answer_status = lambda rank: None
        assert scraped(server).by("tp_rank", "sglang_hicache:rank_up") == {"0": 0, "1": 0}


class TestAccess:
    """Who may ask, and what it costs."""

    def test_off_says_how_to_switch_it_on(self, serve: Serve) -> None:
        reply = serve(api_key="k1").call("GET", "/metrics")
        assert reply.status_code == 404 and "--enable-metrics" in reply.text

    def test_server_info_tells_the_switch(self, serve: Serve) -> None:
        for switch in (False, True):
            assert serve(enable_metrics=switch).call("GET", "/server_info").json()["enable_metrics"] is switch

    def test_needs_no_key_and_shows_none(self, serve: Serve) -> None:
        server = serve(enable_metrics=True, api_key="first-key", admin_api_key="second-key")
        secret = {"extra_config_json": '{"access_key": "third-key"}', "last_error": "third-key was refused"}
        server.answer_status = lambda rank: STATUS | secret
        text = scraped(server).text
        assert "-key" not in text

    def test_the_format_is_the_one_that_keeps_the_names(self, server: FakeServer) -> None:
        reply = server.call("GET", "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "sglang:num_running_reqs{" in reply.text

    def test_scrapes_that_meet_share_one_question(self, server: FakeServer) -> None:
        async def many() -> list[int]:
            replies = await asyncio.gather(*(server.request("GET", "/metrics") for _ in range(10)))
            return [reply.status_code for reply in replies]

        assert server.run(many()) == [200] * 10
        assert len(server.commands(wire.QueryStatus)) == 2, "one for each rank"
        scraped(server)
        assert len(server.commands(wire.QueryStatus)) == 4


def test_scrapes_of_strangers_leave_the_loop_to_others(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key is asked for, and one text costs as much as twenty other answers: some dozens a second would be all that
    the process does.  Whoever comes meanwhile gets the text that is being written."""
    cost_s = iter(range(1000))
    monkeypatch.setattr(metrics.time, "thread_time", lambda: 0.05 * next(cost_s))
    written: list[float] = []

    def watched(found: Any) -> bytes:
        written.append(asyncio.get_running_loop().time())
        return b"text"

    monkeypatch.setattr(metrics, "generate_latest", watched)

    async def scrapes() -> list[str]:
        replies = []
        for _ in range(3):
            together = await asyncio.gather(*[server.request("GET", "/metrics") for _ in range(20)])
            replies += [reply.text for reply in together]
        return replies

    assert server.run(scrapes()) == ["text"] * 60
    assert len(written) == 3
    assert all(later - earlier >= 0.9 * metrics.REST * 0.05 for earlier, later in zip(written, written[1:]))
