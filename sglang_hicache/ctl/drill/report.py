"""What remains of a drill: a page for people, a JUnit file for the machine that runs it every night, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sglang_hicache.ctl.drill.plots import pictures, shown
from sglang_hicache.ctl.drill.result import Result, Verdict
from sglang_hicache.ctl.tables import printable
from sglang_hicache.errors import UserError
from sglang_hicache.private_file import write_private_blocking

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --faint: #8884; --good: #2e9e5b; --bad: #d64545;
  --moving: #d9a021; --plain: #5b8def; --device: #2e7d5b; --host: #7fb069; --storage: #5b8def; --computed: #c9c9cf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --paper: #17181a; --computed: #55565c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1040px; padding: 0 1rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .25rem .6rem;
  border-bottom: 1px solid var(--faint); vertical-align: top; } td { overflow-wrap: anywhere; }
td.figure { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.verdict { border-radius: 4px; padding: .1rem .5rem; color: #fff; background: var(--plain); }
.passed { background: var(--good); } .failed, .error { background: var(--bad); } .skipped { background: var(--moving); }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
.grid { stroke: var(--faint); } .step { stroke: var(--ink); stroke-dasharray: 2 3; opacity: .6; }
.label { text-anchor: end; } .tick, .number { text-anchor: middle; } .number { font-weight: bold; }
.band { opacity: .75; } .band.good { fill: var(--good); } .band.bad { fill: var(--bad); }
.band.moving { fill: var(--moving); } .band.plain { fill: var(--plain); }
.dot { fill: var(--plain); opacity: .6; } circle.failed { fill: var(--bad); }
.device { fill: var(--device); } .host { fill: var(--host); } .storage { fill: var(--storage); }
.computed { fill: var(--computed); }
"""


def write(folder: Path, results: Sequence[Result]) -> list[Path]:
    """A page for each drill and one JUnit file for all; their paths."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = {folder / f"{result.name}.html": page(result).encode() for result in results}
        files[folder / "junit.xml"] = junit(results)
        for path, content in files.items():  # errors of requests and stores are nobody else's business
            write_private_blocking(path, content)
        return list(files)
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder}: {error}") from error


def as_json(result: Result) -> dict[str, Any]:
    """For scripts."""
    return {
        "name": result.name,
        "verdict": result.verdict.value,
        "message": result.message,
        "where": result.where,
        "began": result.began,
        "took_s": round(result.took_s, 2),
        "assertions": [
            {"name": item.name, "verdict": item.verdict.value, "detail": item.detail} for item in result.assertions
        ],
        "steps": [
            {"at_s": round(mark.at_s, 2), "took_s": round(mark.took_s, 3), "step": mark.title, "detail": mark.detail}
            for mark in result.marks
        ],
        "figures": dict(result.figures()),
    }


def page(result: Result) -> str:
    """One file that needs nothing else: no script, no font, no picture from elsewhere."""
    facts = " · ".join(text for text in (result.where, result.began, f"{result.took_s:.1f} s") if text)
    parts = [
        f"<h1>{shown(result.name)} {_badge(result.verdict)}</h1>",
        f"<p>{shown(result.about)}</p>",
        f"<p>{shown(facts)}</p>",
        f"<p><b>{shown(result.message)}</b></p>" if result.message else "",
    ]
    parts += _table("Assertions", ("verdict", "what", "found"), [
        (_badge(item.verdict), shown(item.name), shown(item.detail)) for item in result.assertions
    ])  # fmt: skip
    if result.records:
        parts += [f"<h2>{shown(title)}</h2>{svg}" for title, svg in pictures(result)]
    parts += _table("Steps", ("", "at", "took", "step", "what came of it"), [
        (str(number), f"{mark.at_s:.2f} s", f"{mark.took_s:.2f} s", shown(mark.title), shown(mark.detail))
        for number, mark in enumerate(result.marks, 1)
    ])  # fmt: skip
    if result.records:
        figures = [(shown(name.replace("_", " ")), f"{value:g}") for name, value in result.figures().items()]
        parts += _table("The load", ("figure", "value"), figures)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Drill {shown(result.name)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells are HTML."""
    if not rows:
        return []
    head = "".join(f"<th>{shown(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return [f"<h2>{shown(title)}</h2><table><tr>{head}</tr>{body}</table>"]


def _badge(verdict: Verdict) -> str:
    return f'<span class="verdict {verdict.value}">{verdict.value}</span>'


def junit(results: Sequence[Result]) -> bytes:
    """A suite for each drill, a case for each assertion; a drill without any is one case."""
    root = ElementTree.Element("testsuites", name="drills")
    for result in results:
        cases = [(item.name, item.verdict, item.detail) for item in result.assertions]
        if result.outcome is not None:
            cases.append(("the drill", result.outcome, result.message))
        verdicts = [verdict for _, verdict, _ in cases]
        suite = ElementTree.SubElement(
            root, "testsuite", name=result.name, tests=str(len(cases)), time=f"{result.took_s:.2f}",
            failures=str(verdicts.count(Verdict.FAILED)), errors=str(verdicts.count(Verdict.ERROR)),
            skipped=str(verdicts.count(Verdict.SKIPPED)),
        )  # fmt: skip
        for name, verdict, detail in cases:
            case = ElementTree.SubElement(suite, "testcase", classname=f"drill.{result.name}", name=printable(name))
            kind = {Verdict.FAILED: "failure", Verdict.ERROR: "error", Verdict.SKIPPED: "skipped"}.get(verdict)
            if kind:
                ElementTree.SubElement(case, kind, message=printable(detail))
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
