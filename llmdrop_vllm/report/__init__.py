"""The page and the pictures of a sweep. matplotlib is imported when a report is written, not before."""

from pathlib import Path

from llmdrop_vllm.artifacts import make_directory, write_atomically
from llmdrop_vllm.report.findings import Findings


def write_report(findings: Findings, out: Path) -> list[Path]:
    """Write OUT/report.html and OUT/pictures/NAME.svg and .png, each whole or not at all, and say which.

    A picture that the records have nothing for is left out, the page says why, and an earlier report's file of that
    name goes. Raises OutputError for a place that cannot be written to.
    """
    from llmdrop_vllm.report.page import render
    from llmdrop_vllm.report.pictures import draw

    drawn = draw(findings)
    page = render(findings, drawn)
    folder = out / "pictures"
    make_directory(folder)
    written = []
    for each in drawn:
        for suffix, content in (("svg", each.svg), ("png", each.png)):
            path = folder / f"{each.name}.{suffix}"
            if content:
                write_atomically(path, content)
                written.append(path)
            else:
                path.unlink(missing_ok=True)
    # Last: a page that is there has its pictures.
    write_atomically(out / "report.html", page)
    return [out / "report.html", *written]
