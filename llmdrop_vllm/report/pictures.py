"""All pictures of a report, each as SVG and PNG."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from llmdrop_vllm.report import layers, quality, speed
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.style import NothingToShow, as_png, as_svg, styled

Paint = Callable[[Findings], tuple[Figure, str]]
PICTURES: tuple[tuple[str, str, Paint], ...] = (
    ("quality", "Quality against the number dropped; bars and bands are standard errors.", quality.quality),
    ("divergence", "The next token against the full model's: see below on what.", quality.divergence),
    (
        "speedup",
        "Quality against speedup; bars, of the series by importance, are the range over rounds and the standard error.",
        speed.speedup,
    ),
    ("kv_cache", "KV cache as vLLM stores it, padding included.", speed.kv_cache),
    ("controls", "Controls: as many sublayers in another order.", quality.controls),
    ("search", "Every mask that a search judged by the model's answers, and cosine's beside them.", quality.search),
    ("importance", "Importance by layer and calibration set.", layers.importance),
    ("drop_order", "The masks: a row for each number dropped.", layers.drop_order),
    ("redundancy", "Diagnostics of the intact model's sublayers, by layer.", layers.redundancy),
)


@dataclass(frozen=True)
class Picture:
    """`svg` and `png` are whole files, `text` is for those who cannot see them. Of what the records have nothing for
    there are none, and `text` says why.
    """

    name: str
    caption: str
    text: str
    svg: str = ""
    png: bytes = b""


def draw(findings: Findings) -> list[Picture]:
    """In the order of the page."""
    found = []
    with styled():
        for name, caption, paint in PICTURES:
            try:
                figure, alt = paint(findings)
            except NothingToShow as error:
                found.append(Picture(name, caption, str(error)))
            else:
                found.append(Picture(name, caption, alt, as_svg(figure), as_png(figure)))
    return found
