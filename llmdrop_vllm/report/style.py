"""How every picture looks: for a talk, for print, for the colour-blind, and the same bytes each time."""

import io
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from llmdrop_vllm.selection.candidates import Kind

# The page exchanges these two for its own, so that a picture follows its light or dark theme.
INK, PAPER = "#1a1d1f", "#ffffff"
GREY = "#808080"
SETTINGS: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.labelsize": 13,
    "figure.titlesize": 16,
    "figure.titleweight": "bold",
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.dpi": 150,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "svg.fonttype": "path",  # letters as drawn here, whatever fonts the reader has
    "svg.hashsalt": "llmdrop",
    "text.parse_math": False,  # names from files may hold a $
}


class NothingToShow(Exception):
    """The records lack what a picture is of; the message says what."""


@dataclass(frozen=True)
class Look:
    """Colours of Okabe and Ito, which colour-blind people tell apart; markers and lines say the same again."""

    color: str
    marker: str
    linestyle: Any

    def line(self, label: str, width: int = 44) -> dict[str, Any]:
        """For `plot` and `errorbar`. Markers are hollow, so that one curve shows through another."""
        hollow = {"markersize": 7, "markerfacecolor": "none", "markeredgewidth": 1.8}
        return {**asdict(self), **hollow, "linewidth": 2, "label": label_of(label, width)}


LOOKS = (
    Look("#0072B2", "o", "-"),
    Look("#D55E00", "^", "--"),
    Look("#009E73", "s", "-."),
    Look("#CC79A7", "D", ":"),
    Look("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
    Look("#56B4E9", "P", (0, (3, 1))),
    Look(INK, "X", (0, (1, 1))),
    Look("#7F5F2A", "*", (0, (6, 2))),  # beyond their palette's readable seven: a brown
)
LOOK_OF: dict[Kind, Look] = {"attention": LOOKS[0], "mlp": LOOKS[1], "blocks": LOOKS[2], "joint": LOOKS[3]}


def look(place: int) -> Look:
    """The one at a place; they start again when they are used up."""
    return LOOKS[place % len(LOOKS)]


@contextmanager
def styled() -> Iterator[None]:
    """These settings and no others, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def panels(title: str, model: str, count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each `size` inches, and wide enough for its title and the model's name under it."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(9.0, columns * size[0]), rows * size[1] + 1.4), layout="constrained")
    figure.suptitle(f"{title}\n{textwrap.shorten(model, 60)}", x=0.01, ha="left")
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    for each in axes:
        each.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return figure, axes


def label_of(name: str, width: int = 44) -> str:
    """A long one in several lines; matplotlib leaves names that start with an underscore out of its legends."""
    return textwrap.fill(f" {name}" if name.startswith("_") else name, width, drop_whitespace=False)


def scale(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic y axis with plain numbers, where the values are far apart."""
    values = list(values)
    if min(values) <= 0 or max(values) < 3 * min(values):
        return
    axes.set_yscale("log")
    narrow = max(values) < 30 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1, 2, 5), numticks=20))
    if max(values) > 1000 * min(values):
        axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e5 else f"{value:.0e}"))


def legend(figure: Figure, columns: int = 4, title: str | None = None) -> None:
    """Below the panels, where it hides nothing; what several panels show stands there once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        longest = max(len(line) for label in found for line in label.splitlines())
        room = int(figure.get_figwidth() * 72 / (8 * (longest + 8)))  # a letter is about 8 points wide
        ncols = max(1, min(columns, len(found), room))
        spacing: dict[str, Any] = {"alignment": "left", "handlelength": 3.2, "columnspacing": 1.4}
        figure.legend([*found.values()], [*found], loc="outside lower left", ncols=ncols, title=title, **spacing)


def as_svg(figure: Figure) -> str:
    """Without the date, which would make every file another one."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def as_png(figure: Figure) -> bytes:
    """The same picture for slides, once `as_svg` has laid it out."""
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
