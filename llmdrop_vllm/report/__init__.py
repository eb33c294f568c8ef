"""The page and the pictures of a sweep. matplotlib is imported when a report is written, not before."""

from collections.abc import Sequence
from pathlib import Path

from llmdrop_vllm.artifacts import Scores, make_directory, write_atomically
from llmdrop_vllm.data.comparison import Comparison
from llmdrop_vllm.evaluation.records import Evaluation, Sweep
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.search.trials import Searched


def write_report(
    sweep: Sweep,
    scores: Sequence[Scores],
    out: Path,
    evaluations: Sequence[Evaluation] = (),
    searched: Searched | None = None,
    compared: Comparison | None = None,
) -> list[Path]:
    """Write OUT/report.html and OUT/pictures/NAME.svg and .png, each whole or not at all, and say which.

    `scores` may be of several calibration sets, or none; `evaluations` are of the sweep's masks, healed; `searched` is
    what a search judged, `compared` what was answered in full, dropped and healed. A picture that the records have
    nothing for is left out, the page says why, and an earlier report's file of that name goes.

    Raises InputError for records that do not belong together and for a sweep without a point, OutputError for a place
    that cannot be written to.
    """
    findings = Findings.of(sweep, scores, evaluations, searched, compared)
    from llmdrop_vllm.report.page import render
    from llmdrop_vllm.report.pictures import Picture, draw

    drawn = draw(findings)
    page = render(findings, drawn)
    folder = out / "pictures"
    make_directory(folder)
    written = []
    for each in drawn:
        for suffix in ("svg", "png"):
            path = folder / f"{each.name}.{suffix}"
            if isinstance(each, Picture):
                write_atomically(path, each.svg if suffix == "svg" else each.png)
                written.append(path)
            else:
                path.unlink(missing_ok=True)
    # Last: a page that is there has its pictures.
    write_atomically(out / "report.html", page)
    return [out / "report.html", *written]
