"""The page: one HTML file without scripts, which fetches nothing."""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmdrop_vllm.evaluation.records import scores_id
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.measures import columns
from llmdrop_vllm.report.pictures import Picture
from llmdrop_vllm.report.summary import main_curve, sentences, verdicts
from llmdrop_vllm.selection.candidates import NOUNS

# Whatever a record or a model says is text there: it is escaped where it is put in.
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(findings: Findings, pictures: Sequence[Picture]) -> str:
    """All of it."""
    asked = sum(len(series.counts) for series in findings.sweep.series)
    tools = {"number": "{:,}".format, "nouns": NOUNS, "verdicts": verdicts, "scores_id": scores_id, "inline": inline}
    return TEMPLATES.get_template("page.html", globals=tools).render(
        findings=findings,
        pictures=pictures,
        asked=asked,
        missing=asked - sum(len(curve.points) - 1 for curve in findings.curves),
        said=sentences(findings),
        judged=main_curve(findings),
        columns=columns(findings.sweep),
    )


def inline(svg: str, name: str, alt: str) -> Markup:
    """An SVG file as an element of the page: in the page's colours, with ids that no other picture has."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\bid="', f'id="{name}-', element)
    element = re.sub(r'href="#', f'href="#{name}-', element).replace("url(#", f"url(#{name}-")
    element = element.replace("#1a1d1f", "currentColor").replace("#ffffff", "var(--panel)")
    opening, rest = element.replace("xlink:href", "href").split(">", 1)
    width = re.search(r' width="([^"]*)"', opening)
    largest = f' style="max-width: {width[1]}"' if width else ""
    opening = re.sub(r' (?:width|height|version|xmlns(?::\w+)?)="[^"]*"', "", opening)
    return Markup(f'{opening}{largest} role="img" aria-label="{escape(alt)}">{rest.strip()}')
