"""The page: one HTML file without scripts, which fetches nothing."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from llmdrop_vllm.artifacts import DataIdentity, Provenance
from llmdrop_vllm.evaluation.records import scores_id
from llmdrop_vllm.report.answers import answers_section
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.pictures import LeftOut, Picture
from llmdrop_vllm.report.summary import sentences
from llmdrop_vllm.report.tables import points_table, verdicts_table

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
            verdicts_table(findings),
            *(f"<p>{escape(each)}</p>" for each in more),
            "</section>",
            *([answers_section(findings.compared)] if findings.compared else []),
            '<section id="pictures"><h2>Pictures</h2>',
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


def provenance_section(findings: Findings) -> str:
    """The sweep, then each calibration set."""
    sweep, request = findings.sweep, findings.sweep.request
    mask, workload = sweep.full.quality.mask, request.workload
    perplexity = sweep.full.quality.perplexity
    asked = {
        "dropped before": mask.summary() if mask else "nothing",
        "held-out text": _data(request.data),
        "perplexity": f"{perplexity.tokens:,} tokens, in windows of {request.context:,}",
        "divergence": f"{request.divergence_tokens:,} tokens of {request.divergence_on}"
        if request.divergence_tokens
        else "not asked for",
        "tasks": ", ".join(f"{each.task} (by {each.prompting})" for each in sweep.full.quality.tasks) or "none",
        "limit per task": "none" if request.limit is None else f"{request.limit:,} samples",
        "speed": "not asked for"
        if workload is None
        else f"{workload.requests:,} requests at once, {workload.prompt_tokens:,} prompt tokens and "
        f"{workload.output_tokens:,} output tokens each; each mask in turns with the full model",
        "precision": request.dtype,
    }
    parts = ["<h3>Sweep</h3>", _list({**_model(sweep.provenance), **asked, **_run(sweep.provenance)})]
    for name, scores in findings.calibrations.items():
        followed = "yes" if scores_id(scores) == request.scores_sha256 else "no"
        data = scores.provenance.data
        entries = {"calibration text": "unknown" if data is None else _data(data), "followed by the sweep": followed}
        if scores.provenance.dtype:
            entries["precision"] = scores.provenance.dtype
        parts += [f"<h3>Scores: {escape(name)}</h3>", _list({**entries, **_run(scores.provenance)})]
    return "\n".join(parts)


def _model(provenance: Provenance) -> dict[str, str]:
    model = provenance.model
    return {"model": model.path, "architecture": model.architecture, "fingerprint of the weights": model.fingerprint}


def _run(provenance: Provenance) -> dict[str, str]:
    found = {"device": provenance.device} if provenance.device else {}
    versions = ", ".join(f"{package} {version}" for package, version in provenance.versions.items())
    return {**found, "versions": versions, "command": provenance.command}


def _data(data: DataIdentity) -> str:
    length = "" if data.seq_len is None else f" of up to {data.seq_len:,}"
    return (
        f"{data.source}: {data.sequences:,} sequences{length}, {data.tokens:,} tokens, seed {data.seed}, "
        f"sha256 {data.sha256}"
    )


def _list(entries: Mapping[str, str]) -> str:
    code = {"command", "fingerprint of the weights"}
    rows = []
    for name, value in entries.items():
        text = f"<code>{escape(value)}</code>" if name in code else escape(value)
        rows.append(f"<dt>{escape(name)}</dt><dd>{text}</dd>")
    return f"<dl>{''.join(rows)}</dl>"
