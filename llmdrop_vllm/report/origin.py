"""Where the numbers come from, as HTML."""

from collections.abc import Mapping
from html import escape

from llmdrop_vllm.artifacts import DataIdentity, Provenance
from llmdrop_vllm.evaluation.records import scores_id
from llmdrop_vllm.report.findings import Findings


def provenance_section(findings: Findings) -> str:
    """The sweep, then each calibration set."""
    sweep, request = findings.sweep, findings.sweep.request
    mask, workload = sweep.full.quality.mask.mask, request.workload
    perplexity = sweep.full.quality.perplexity
    asked = {
        "dropped before": mask.summary() if mask else "nothing",
        "held-out text": _data(request.data),
        "perplexity": f"{perplexity.tokens:,} tokens, in windows of {request.context:,}",
        "divergence": f"{request.divergence_tokens:,} tokens" if request.divergence_tokens else "not asked for",
        "tasks": ", ".join(request.tasks) or "none",
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
