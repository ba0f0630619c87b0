"""The pictures of a report, as SVG: the time line, the times to the first token, and where prompt tokens came from.

Drawn by hand because a report must show without a network and without a script; every text in it is escaped, since
backends and servers wrote some of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from sglang_hicache.ctl.drill.load import Record
from sglang_hicache.ctl.drill.result import Mark, Result
from sglang_hicache.ctl.tables import printable

#: In pixels: the picture, and what is left and right of the plot.
_WIDTH, _LEFT, _RIGHT = 1000, 90, 20
_ROW, _PLOT_HEIGHT, _TOP = 22, 160, 22

_BARS = 60
_TIERS = ("device", "host", "storage", "computed")
#: Steps of a time axis.
_ROUND_S = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
_MOST_TICKS = 12
#: A first token is never seen sooner than this, and the axis of a drill without any ends here.
_SHORTEST_S, _LONGEST_S = 0.001, 0.1


def shown(text: str) -> str:
    """A text of anybody's as HTML: neither markup nor control characters."""
    return escape(printable(text))


class _Axis:
    """Seconds of the drill to pixels."""

    def __init__(self, end_s: float) -> None:
        self.end_s = max(end_s, 0.1)
        self._scale = (_WIDTH - _LEFT - _RIGHT) / self.end_s

    def x(self, at_s: float) -> float:
        """Pixels from the left."""
        return round(_LEFT + min(max(at_s, 0.0), self.end_s) * self._scale, 1)

    def ticks(self, height: float) -> Iterator[str]:
        """Times, below a picture of that height."""
        fits = (step for step in _ROUND_S if self.end_s / step <= _MOST_TICKS)
        step_s = next(fits, self.end_s / _MOST_TICKS)
        for number in range(int(self.end_s / step_s) + 1):
            at = self.x(number * step_s)
            yield f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{height}"/>'
            yield f'<text class="tick" x="{at}" y="{height + 14}">{number * step_s:g} s</text>'


def pictures(result: Result) -> Iterator[tuple[str, str]]:
    """Title and SVG of each."""
    ends = [record.end_s for record in result.records] + [sample.at_s for sample in result.samples]
    axis = _Axis(max(ends, default=0.0))
    yield "Time line", _timeline(result, axis)
    yield "Time to the first token (one dot per request; red: failed)", _first_tokens(result, axis)
    yield "Where prompt tokens came from", _sources(result, axis)


def _timeline(result: Result, axis: _Axis) -> str:
    """A band per row: what was the case from one look at the server to the next."""
    rows = {
        "state": [(sample.at_s, sample.state) for sample in result.samples],
        "backend": [(sample.at_s, sample.backend) for sample in result.samples],
        "breaker": [(sample.at_s, sample.breaker) for sample in result.samples],
        "ranks": [(sample.at_s, "differ" if sample.differs else "agree") for sample in result.samples],
    }
    height = _TOP + _ROW * len(rows)
    parts = list(axis.ticks(height))
    for number, (name, values) in enumerate(rows.items()):
        top = _TOP + number * _ROW
        parts.append(f'<text class="label" x="{_LEFT - 8}" y="{top + 15}">{shown(name)}</text>')
        for begin_s, end_s, value in _bands(values, axis.end_s):
            if value in ("", "off"):
                continue
            left, width = axis.x(begin_s), max(1.0, axis.x(end_s) - axis.x(begin_s))
            parts.append(
                f'<rect class="band {_class_of(value)}" x="{left}" y="{top + 2}" width="{width:.1f}" '
                f'height="{_ROW - 4}"><title>{shown(value)}, {begin_s:.1f} to {end_s:.1f} s</title></rect>'
            )
            if width > 7 * len(value):
                parts.append(f'<text class="value" x="{left + 4}" y="{top + 15}">{shown(value)}</text>')
    return _svg(height, parts + list(_steps(result.marks, axis, height)))


def _bands(values: Sequence[tuple[float, str]], end_s: float) -> Iterator[tuple[float, float, str]]:
    """Equal neighbours as one."""
    begin = 0
    for at in range(1, len(values) + 1):
        if at == len(values) or values[at][1] != values[begin][1]:
            yield values[begin][0], values[at][0] if at < len(values) else end_s, values[begin][1]
            begin = at


def _class_of(value: str) -> str:
    """A colour for what is good, for what is on its way, and for what is not."""
    if value in ("attached", "closed", "agree"):
        return "good"
    if value in ("detached", "failed", "open", "differ", "unknown"):
        return "bad"
    return "moving" if value in ("attaching", "draining", "detaching", "half_open") else "plain"


def _steps(marks: Sequence[Mark], axis: _Axis, height: float) -> Iterator[str]:
    """A numbered line for each step; the table below the picture has their names."""
    for number, mark in enumerate(marks, 1):
        at = axis.x(mark.at_s)
        yield f'<line class="step" x1="{at}" x2="{at}" y1="{_TOP - 6}" y2="{height}"/>'
        yield f'<text class="number" x="{at}" y="{_TOP - 9}">{number}<title>{shown(mark.title)}</title></text>'


def _first_tokens(result: Result, axis: _Axis) -> str:
    height = _TOP + _PLOT_HEIGHT
    slowest_s = max((record.ttft_s for record in result.records), default=_LONGEST_S)
    low, high = math.log10(_SHORTEST_S), math.ceil(math.log10(max(slowest_s, _LONGEST_S)))

    def y(seconds: float) -> float:
        share = (math.log10(max(seconds, _SHORTEST_S)) - low) / (high - low)
        return round(height - share * _PLOT_HEIGHT, 1)

    parts = list(axis.ticks(height))
    for power in range(int(low), high + 1):
        at = y(10**power)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="label" x="{_LEFT - 8}" y="{at + 4}">{10**power:g} s</text>')
    for record in result.records:
        kind, at_s = ("failed", record.total_s) if record.error else ("dot", record.ttft_s)
        words = f"<title>{shown(record.error)}</title>" if record.error else ""
        parts.append(f'<circle class="{kind}" cx="{axis.x(record.start_s)}" cy="{y(at_s)}" r="2.5">{words}</circle>')
    return _svg(height, parts + list(_steps(result.marks, axis, height)))


def _sources(result: Result, axis: _Axis) -> str:
    height = _TOP + _PLOT_HEIGHT
    parts = list(axis.ticks(height))
    for share in (0.0, 0.5, 1.0):
        y = height - share * _PLOT_HEIGHT
        parts.append(f'<text class="label" x="{_LEFT - 8}" y="{y + 4}">{share:.0%}</text>')
    width_s = axis.end_s / _BARS
    for number in range(_BARS):
        begin_s, end_s = number * width_s, (number + 1) * width_s
        inside = [record for record in result.records if not record.error and begin_s <= record.end_s < end_s]
        bottom = float(height)
        for tier, share in zip(_TIERS, shares(inside)):
            tall = share * _PLOT_HEIGHT
            bottom -= tall
            parts.append(
                f'<rect class="{tier}" x="{axis.x(begin_s)}" y="{bottom:.1f}" height="{tall:.1f}" '
                f'width="{axis.x(end_s) - axis.x(begin_s):.1f}"><title>{tier} {share:.0%}</title></rect>'
            )
    legend = (
        f'<rect class="{tier}" x="{_LEFT + 110 * number}" y="{height + 22}" width="10" height="10"/>'
        f'<text class="value" x="{_LEFT + 110 * number + 15}" y="{height + 31}">{tier}</text>'
        for number, tier in enumerate(_TIERS)
    )
    return _svg(height + 16, [*parts, *legend, *_steps(result.marks, axis, height)])


def shares(records: Sequence[Record]) -> list[float]:
    """Of prompt tokens, by where they came from; nothing of nothing."""
    total = sum(record.prompt_tokens for record in records)
    if not total:
        return [0.0] * len(_TIERS)
    cached = [sum(record.cached.get(tier, 0) for record in records) / total for tier in _TIERS[:-1]]
    return [*cached, max(0.0, 1.0 - sum(cached))]


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height + 20:g}" role="img">{"".join(parts)}</svg>'
