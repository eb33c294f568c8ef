"""What a report is made of: a sweep, the scores next to it, and how its series are told apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmdrop_vllm.artifacts import Scores
from llmdrop_vllm.data.comparison import Comparison
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.evaluation.records import Evaluation, Point, Quality, Series, Sweep, scores_id
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.trials import Searched

BY_IMPORTANCE = "by importance"


@dataclass(frozen=True)
class Curve:
    """A series as far as it was measured: (number dropped, point), the full model first as number 0."""

    series: Series
    points: tuple[tuple[int, Point], ...]

    @property
    def by_importance(self) -> bool:
        """Least important first."""
        return self.series.order == BY_IMPORTANCE

    @property
    def random(self) -> bool:
        """One of the controls that differ by their seed alone."""
        return "random" in self.series.order


@dataclass(frozen=True)
class Findings:
    """Records that belong together. `scores` may be of several calibration sets, or none; `evaluations` are of the
    sweep's masks, healed, and of others; `searched` is what a search judged, `compared` what was answered in full,
    dropped and healed.

    Raises InputError for scores, a search or answers of another model, for evaluations of masks that the sweep does not
    have or with other measures, and for a sweep without a point.
    """

    sweep: Sweep
    scores: Sequence[Scores] = ()
    evaluations: Sequence[Evaluation] = ()
    searched: Searched | None = None
    compared: Comparison | None = None

    def __post_init__(self) -> None:
        depth = self.depth  # asked first: there is none without a point
        for name, scores in self.calibrations.items():
            model, layers = scores.provenance.model, scores.num_hidden_layers
            self._check_weights(f"the scores on {name} are of {model.path}", model.fingerprint)
            if layers != depth:
                raise InputError(f"the scores on {name} are for {layers} layers, the sweep for {depth}")
        if self.searched is not None:
            model = self.searched.header.provenance.model
            self._check_weights(f"the search is of {model.path}", model.fingerprint)
        if self.compared is not None:
            self._check_weights("the answers are of a full model", self.compared.forms[0].fingerprint)
        others = any("searched" in curve.series.name for curve in self.mended)
        if others and any(len({*each.kinds}) > 1 for each in self.scores):
            raise InputError(
                "masks that the sweep does not have differ in KV cache where layers do; sweep them as well"
            )

    def _check_weights(self, said: str, fingerprint: str) -> None:
        own, path = self.sweep.request.fingerprint, self.sweep.provenance.model.path
        if fingerprint != own:
            raise InputError(f"{said} with the weights {fingerprint}; the sweep is of {path} with the weights {own}")

    @cached_property
    def calibrations(self) -> Mapping[str, Scores]:
        """By the name of their data, numbered where the same was used twice; what the sweep followed comes first."""
        found: dict[str, Scores] = {}
        ordered = sorted(self.scores, key=lambda each: scores_id(each) != self.sweep.request.scores_sha256)
        for place, each in enumerate(ordered, 1):
            data = each.provenance.data
            name = f"calibration set {place}" if data is None else data.source
            found[f"{name} ({place})" if name in found else name] = each
        return found

    @cached_property
    def mended(self) -> list[Curve]:
        """What became of the sweep's masks: a curve for each way of healing a series' masks, and for other masks of as
        many sublayers. What is healed has the shape, and so the speed, of its mask; other masks have those of the
        series' where all layers are of one kind.
        """
        found: dict[str, tuple[Series, dict[int, Point]]] = {}
        for each in self.evaluations:
            series, n, point, how = _place(self.sweep, each)
            _check_alike(point, each)
            entries = {"name": f"{series.name}, {how}", "order": f"{series.order}, {how}"}
            _, points = found.setdefault(entries["name"], (series.model_copy(update=entries), {}))
            if n in points:
                raise InputError(f"two evaluations are of {series.name} {n}, {how}; a report shows one of them")
            points[n] = point.model_copy(update={"quality": each.quality})
        full = self.sweep.full
        return [Curve(series, ((0, full), *sorted(points.items()))) for series, points in found.values()]

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return self.sweep.full.quality.mask.num_hidden_layers

    @property
    def model(self) -> str:
        """What people call it: the last part of its path, or the hub id whose snapshot the path is."""
        path = Path(self.sweep.provenance.model.path)
        if path.parent.name == "snapshots":
            return path.parent.parent.name.removeprefix("models--").replace("--", "/")
        # A directory that is called like every other says little.
        return str(Path(path.parent.name, path.name)) if path.name == "model" else path.name or str(path)

    @property
    def curves(self) -> list[Curve]:
        """Every series of which something was measured."""
        found = [Curve(series, tuple(self.sweep.of(series))) for series in self.sweep.series]
        return [curve for curve in found if len(curve.points) > 1]

    @property
    def by_importance(self) -> list[Curve]:
        """The series that drop the least important first."""
        return [curve for curve in self.curves if curve.by_importance]

    @property
    def names(self) -> dict[str, str]:
        """Mask id to what a picture calls it, by the first series that reaches it."""
        found = {self.sweep.base: "full model"}
        for series in self.sweep.series:
            for n, mask in series.steps.items():
                found.setdefault(mask, f"{series.name} {n}")
        return found


def _place(sweep: Sweep, evaluation: Evaluation) -> tuple[Series, int, Point, str]:
    """The series, the number dropped, the point of it, and how the evaluated model came from there. Raises InputError
    where no series has so many, and for a mask of the sweep itself that was not healed.
    """
    mask, healed = evaluation.quality.mask, evaluation.healed
    places = [(series, n, point) for series in sweep.series for n, point in sweep.of(series)[1:]]
    same = [place for place in places if place[2].quality.mask.effect == mask.effect]
    if same and healed:
        return *same[0], healed
    for series, n, point in places:
        if not same and series.order == BY_IMPORTANCE and sizes(point.quality.mask) == sizes(mask):
            return series, n, point, f"searched, {healed}" if healed else "searched"
    what = "is not of a healed model, and the sweep has its mask" if same else "drops other numbers of sublayers"
    raise InputError(
        f"the evaluation of {evaluation.provenance.model.path} {what}; expected a healed point of it, or another mask "
        "of as many sublayers"
    )


def sizes(mask: DropMask) -> list[int]:
    """How many attention and MLP sublayers are gone."""
    return [*map(len, mask.dropped)]


def _check_alike(point: Point, evaluation: Evaluation) -> None:
    def measured(quality: Quality) -> list[tuple[str, object]]:
        apart = quality.divergence
        return [
            ("perplexity", quality.perplexity.data.sha256),
            ("divergence", apart and (apart.on, apart.data and apart.data.sha256)),
            *((f"task {each.task}", (each.task, each.metric, each.samples)) for each in quality.tasks),
        ]

    ours, its = measured(point.quality), measured(evaluation.quality)
    if ours != its:
        where = next((name for (name, one), (_, other) in zip(ours, its, strict=False) if one != other), "tasks")
        raise InputError(
            f"the evaluation of {evaluation.provenance.model.path} was measured otherwise than the sweep ({where}); "
            "evaluate it with the sweep's own options"
        )
