"""One metric and how it is read, and how all of them become what Prometheus scrapes.

Pure: `families` turns status answers into metric families, and keeps nothing.  So a series cannot be registered twice,
and none can vanish: whatever is attached, each metric has the same label values as at the first scrape, 0 where nothing
has happened.  Series by backend are there for every backend that this server knows; plug-ins that have names of their
own all count as `dynamic`.  `metrics_table.py` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from sglang_hicache.config import ServerConfig
from sglang_hicache.storage import registry
from sglang_hicache.wire import Histogram, StatusAnswer

#: Names that clients of SGLang know, and those that only this server has.
KNOWN, OWN = "sglang:", "sglang_hicache:"

#: Of the one gauge that is told of a silent rank.
RANK_UP = OWN + "rank_up"


@dataclass(frozen=True, slots=True)
class View:
    """One rank as far as a series is concerned."""

    config: ServerConfig
    rank: int
    answer: StatusAnswer
    is_up: bool
    #: Name of a backend, for series that are told by backend.
    backend: str = ""
    #: Value of the label that tells series of one metric apart, where there is one.
    case: str = ""

    def counter(self, name: str) -> int:
        return self.answer.counters.get(name, 0)

    def total(self, name: str) -> int:
        """Since the start, of one backend."""
        totals = self.answer.totals.items()
        return sum(counted.get(name, 0) for backend, counted in totals if registry.family(backend) == self.backend)

    def load(self, name: str) -> int:
        return self.answer.load.get(name, 0)

    def tokens(self, *names: str) -> int:
        """Pages of a pool, in tokens; those whose name has a minus are taken away."""
        pages = sum(-self.load(name[1:]) if name[0] == "-" else self.load(name) for name in names)
        return pages * self.config.pool.page_size

    def bytes_of(self, tokens: int) -> int:
        return tokens // self.config.pool.page_size * self.load("page_bytes")

    def histogram(self, name: str, bounds: tuple[float, ...]) -> Histogram:
        """`name` without a backend, or with one behind a slash."""
        kind, _, backend = name.partition("/")
        counts, total = [0] * (len(bounds) + 1), 0.0
        for told, found in self.answer.histograms.items():
            told_kind, _, told_backend = told.partition("/")
            if told_kind == kind and registry.family(told_backend) == backend:
                counts = list(map(sum, zip(counts, found.counts, strict=True)))
                total += found.total
        return Histogram(bounds=bounds, counts=tuple(counts), total=total)


class Scope(Enum):
    """Label sets: the value of a label is fixed, or read from the view."""

    SCHEDULER = ("model_name", "engine_type", "tp_rank", "pp_rank", "moe_ep_rank")
    CACHE = ("cache_type", "tp_rank", "pp_rank", "dp_rank")
    STORAGE = ("storage_backend", "tp_rank", "dp_rank", "pp_rank", "pp_size", "attn_cp_rank", "attn_cp_size")
    RANK = ("model_name", "tp_rank")
    RANK_STORAGE = ("model_name", "tp_rank", "storage_backend")


_BY_BACKEND = (Scope.STORAGE, Scope.RANK_STORAGE)

#: Labels that are the same for all series: there is one pipeline stage, one data-parallel rank, one kind of engine.
_FIXED = {
    "engine_type": "unified", "cache_type": "PrefixTree", "pp_rank": "0", "moe_ep_rank": "0", "dp_rank": "0",
    "pp_size": "1", "attn_cp_rank": "0", "attn_cp_size": "1", "pool": "kv",
}  # fmt: skip

Value = int | float | Histogram


@dataclass(frozen=True, slots=True)
class Series:
    """One metric: name, type, labels, meaning, and how its values are read."""

    name: str
    kind: str
    scope: Scope
    meaning: str
    read: Callable[[View], Value]
    #: Labels beside those of the scope: the one that `cases` are the values of comes first.
    extra: tuple[str, ...] = ()
    cases: tuple[str, ...] = ("",)
    #: Every rank tells its own; otherwise rank 0 speaks for all.
    each_rank: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        return self.scope.value + self.extra


def gauge(name: str, scope: Scope, meaning: str, read: Callable[[View], Value]) -> Series:
    """Something that goes up and down."""
    return Series(name, "gauge", scope, meaning, read)


def counter(name: str, scope: Scope, meaning: str, read: Callable[[View], Value]) -> Series:
    """Something that only grows."""
    return Series(name, "counter", scope, meaning, read)


def histogram(name: str, scope: Scope, meaning: str, bounds: tuple[float, ...], key: str = "") -> Series:
    """`key` is the name in the status answer, where it is not the metric's own; {} is the case or the backend."""
    found = key or name.partition(":")[2]
    return Series(name, "histogram", scope, meaning, lambda v: v.histogram(found.format(v.case or v.backend), bounds))


def by(label: str, cases: Sequence[str], series: Series) -> Series:
    """One value for each case."""
    return replace(series, extra=(label, *series.extra), cases=tuple(cases))


def pool(series: Series) -> Series:
    """With the label that tells kinds of pools apart; there is one."""
    return replace(series, extra=(*series.extra, "pool"))


def each(series: Series) -> Series:
    """Told by every rank."""
    return replace(series, each_rank=True)


def families(
    table: Sequence[Series], config: ServerConfig, answers: Sequence[StatusAnswer], is_up: Sequence[bool]
) -> Iterator[Metric]:
    """What a scrape shows.  `answers` has each rank's latest; a gauge of a rank that is silent now is left out."""
    backends = registry.names()
    for series in table:
        family = _FAMILIES[series.kind](series.name, series.meaning, labels=series.labels)
        for rank in range(len(answers)) if series.each_rank else (0,):
            view = View(config, rank, answers[rank], is_up[rank])
            if series.kind == "gauge" and not view.is_up and series.name != RANK_UP:
                continue
            for backend in backends if series.scope in _BY_BACKEND else ("",):
                for case in series.cases:
                    _add(family, series, replace(view, backend=backend, case=case))
        yield family


_FAMILIES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "histogram": HistogramMetricFamily}


def _add(family: Metric, series: Series, view: View) -> None:
    labels = [_label(name, series, view) for name in series.labels]
    value = series.read(view)
    if not isinstance(value, Histogram):
        family.add_metric(labels, float(value))
        return
    buckets, below = [], 0
    for bound, count in zip((*value.bounds, float("inf")), value.counts, strict=True):
        below += count
        buckets.append((floatToGoString(bound), below))
    family.add_metric(labels, buckets, value.total)


def _label(name: str, series: Series, view: View) -> str:
    if series.cases != ("",) and name == series.extra[0]:
        return view.case
    match name:
        case "model_name":
            return view.config.model.served_name
        case "tp_rank":
            return str(view.rank)
        case "storage_backend":
            return registry.spec(view.backend).class_name
    return _FIXED[name]
