"""What GET /metrics said, parsed by the client library's own parser and held to the form that Prometheus expects."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, frozenset[tuple[str, str]]]


class Scrape:
    """One answer."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families: dict[str, Metric] = {}
        for family in text_string_to_metric_families(text):
            assert family.name not in self.families, f"{family.name} is told twice"
            self.families[family.name] = family
        found = [sample for family in self.families.values() for sample in family.samples]
        self.values: dict[Key, float] = {(s.name, frozenset(s.labels.items())): s.value for s in found}
        assert len(self.values) == len(found), "a series is told twice"

    def value(self, name: str, **labels: str) -> float:
        """Of the one series that has this name and exactly these labels."""
        return self.values[name, frozenset(labels.items())]

    def by(self, label: str, name: str, **some: str) -> dict[str, float]:
        """Values of the series of this name that have `some` among their labels, by one label more."""
        return {labels[label]: value for labels, value in self._those(name, some)}

    def total(self, name: str, **some: str) -> float:
        """Sum over the series of this name that have `some` among their labels."""
        return sum(value for _, value in self._those(name, some))

    def _those(self, name: str, some: dict[str, str]) -> Iterator[tuple[dict[str, str], float]]:
        for (found, labels), value in self.values.items():
            if found == name and some.items() <= dict(labels).items():
                yield dict(labels), value

    def check_follows(self, before: Scrape) -> None:
        """The same series as before, and none that only grows has fallen."""
        assert self.values.keys() == before.values.keys()
        for family in self.families.values():
            for sample in family.samples if family.type != "gauge" else ():
                key = sample.name, frozenset(sample.labels.items())
                assert self.values[key] >= before.values[key], key

    def check_histograms(self) -> int:
        """Buckets rise to +Inf, which has all; how many histograms there are."""
        seen = 0
        for family in self.families.values():
            if family.type != "histogram":
                continue
            below: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    rest = frozenset(item for item in sample.labels.items() if item[0] != "le")
                    below.setdefault(rest, []).append((float(sample.labels["le"]), sample.value))
            for rest, buckets in below.items():
                assert buckets == sorted(buckets) and [n for _, n in buckets] == sorted(n for _, n in buckets)
                assert buckets[-1] == (math.inf, self.value(family.name + "_count", **dict(rest)))
                seen += 1
        return seen
