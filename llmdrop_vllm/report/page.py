"""The page: one HTML file without scripts, which fetches nothing."""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmdrop_vllm.artifacts import DataIdentity, Provenance
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
    complete = sum(len(curve.points) - 1 for curve in findings.curves)
    asked = sum(len(series.counts) for series in findings.sweep.series)
    return TEMPLATES.get_template("page.html").render(
        title=f"{findings.model}: what can be dropped",
        findings=findings,
        sweep=findings.sweep,
        asked=asked,
        missing=asked - complete,
        said=sentences(findings),
        judged=main_curve(findings),
        verdicts=verdicts,
        columns=columns(findings.sweep),
        nouns=NOUNS,
        pictures=pictures,
        inline=inline,
        sources=sources(findings),
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


def sources(findings: Findings) -> dict[str, dict[str, str]]:
    """What it takes to measure the sweep, and each calibration set, again: heading to entries."""
    request, provenance, full = findings.sweep.request, findings.sweep.provenance, findings.sweep.full.quality
    divergence = f"{request.divergence_tokens:,} tokens of {request.divergence_on}"
    speed = "not asked for"
    if (workload := request.workload) is not None:
        speed = (
            f"{workload.requests:,} requests at once, {workload.prompt_tokens:,} prompt tokens and "
            f"{workload.output_tokens:,} output tokens each; each mask in turns with the full model"
        )
    found = {
        "Sweep": {
            "model": provenance.model.path,
            "architecture": provenance.model.architecture,
            "fingerprint of the weights": provenance.model.fingerprint,
            "dropped before": full.mask.summary() if full.mask else "nothing",
            "held-out text": _data(request.data),
            "perplexity": f"{full.perplexity.tokens:,} tokens, in windows of {request.context:,}",
            "divergence": divergence if request.divergence_tokens else "not asked for",
            "tasks": ", ".join(f"{each.task} (by {each.prompting})" for each in full.tasks) or "none",
            "limit per task": "none" if request.limit is None else f"{request.limit:,} samples",
            "speed": speed,
            "precision": request.dtype,
            **_run(provenance),
        }
    }
    for name, scores in findings.calibrations.items():
        data, dtype = scores.provenance.data, scores.provenance.dtype
        found[f"Scores: {name}"] = {
            "calibration text": "unknown" if data is None else _data(data),
            "followed by the sweep": "yes" if scores_id(scores) == request.scores_sha256 else "no",
            **({"precision": dtype} if dtype else {}),
            **_run(scores.provenance),
        }
    return found


def _run(provenance: Provenance) -> dict[str, str]:
    versions = ", ".join(f"{package} {version}" for package, version in provenance.versions.items())
    device = {"device": provenance.device} if provenance.device else {}
    return {**device, "versions": versions, "command": provenance.command}


def _data(data: DataIdentity) -> str:
    length = "" if data.seq_len is None else f" of up to {data.seq_len:,}"
    return (
        f"{data.source}: {data.sequences:,} sequences{length}, {data.tokens:,} tokens, seed {data.seed}, "
        f"sha256 {data.sha256}"
    )
