"""The page: one HTML file without scripts, which fetches nothing."""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from llmdrop_vllm.report.findings import NOUNS, Findings
from llmdrop_vllm.report.origin import provenance_section
from llmdrop_vllm.report.picture import LeftOut, Picture
from llmdrop_vllm.report.summary import main_curve, sentences, verdicts
from llmdrop_vllm.report.table import points_table

STYLE = Path(__file__).with_name("page.css")
HEAD = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
)


def render(findings: Findings, pictures: Sequence[Picture | LeftOut]) -> str:
    """All of it."""
    title = f"{findings.model}: what can be dropped"
    complete = sum(len(curve.points) - 1 for curve in findings.curves)
    asked = sum(len(series.counts) for series in findings.sweep.series)
    missing = f" {asked - complete} of {asked} points of the sweep are not measured yet." if complete < asked else ""
    said, *more = sentences(findings)
    return "\n".join(
        [
            f'<!DOCTYPE html>\n<html lang="en"><head>{HEAD}<title>{escape(title)}</title>',
            f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="muted">{escape(findings.sweep.provenance.model.architecture)}, {findings.depth} layers.'
            f"{missing}</p>",
            f'<section id="summary"><p class="lead">{escape(said)}</p>',
            _verdicts(findings),
            *(f"<p>{escape(each)}</p>" for each in more),
            '</section><section id="pictures"><h2>Pictures</h2>',
            *(_figure(each) for each in pictures),
            '</section><section id="points"><h2>All points</h2>',
            '<p class="muted">Value ± standard error. Speedup: median, and range over rounds. Points lost are of the '
            "average of all tasks, 0 to 100.</p>",
            points_table(findings),
            '</section><section id="provenance"><h2>Where the numbers come from</h2>',
            provenance_section(findings),
            "</section></main></body></html>\n",
        ]
    )


def _verdicts(findings: Findings) -> str:
    curve = main_curve(findings)
    if curve is None:
        return ""
    what = NOUNS[curve.series.what]
    head = ("full model", "limit", f"{what} that can go", "then", "with the next one gone")
    numeric = {"full model", head[2]}
    cells = "".join(f'<th scope="col"{_right(name in numeric)}>{escape(name)}</th>' for name in head)
    rows = []
    for each in verdicts(findings.sweep, curve):
        values = (each.measure.text(each.full), each.limit, str(each.n), each.then, each.beyond)
        if each.blind is not None:
            values = (*values[:2], "cannot tell", *values[3:])
        row = "".join(f"<td{_right(name in numeric)}>{escape(v)}</td>" for name, v in zip(head, values, strict=True))
        unit = "" if each.measure.kind is None else ", %"
        rows.append(f'<tr><th scope="row">{escape(each.measure.name)}{unit}</th>{row}</tr>')
    table = f'<table><thead><tr><th scope="col">measure</th>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="What can go">{table}</div>'


def _right(number: bool) -> str:
    return ' class="number"' if number else ""


def _figure(picture: Picture | LeftOut) -> str:
    if isinstance(picture, LeftOut):
        return f'<p class="muted" id="{picture.name}">Left out: {escape(picture.caption)} ({escape(picture.why)}.)</p>'
    svg = inline(picture.svg, picture.name, picture.alt)
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f'<figure id="{picture.name}"><div class="scroll" tabindex="0">{svg}</div>{caption}</figure>'


def inline(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of the page: in the page's colours, with ids that no other picture has."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\bid="', f'id="{name}-', element)
    element = re.sub(r'href="#', f'href="#{name}-', element).replace("url(#", f"url(#{name}-")
    element = element.replace("#1a1d1f", "currentColor").replace("#ffffff", "var(--panel)")
    opening, rest = element.split(">", 1)
    width = re.search(r' width="([^"]*)"', opening)
    largest = f' style="max-width: {width[1]}"' if width else ""
    opening = re.sub(r' (?:width|height|version|xmlns(?::\w+)?)="[^"]*"', "", opening).replace("xlink:href", "href")
    rest = rest.replace("xlink:href", "href")
    return f'{opening}{largest} role="img" aria-label="{escape(alt)}">{rest.strip()}'
