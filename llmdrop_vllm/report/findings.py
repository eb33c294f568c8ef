"""What a report is made of: a sweep, the scores next to it, and how its series are told apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

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
    """Records that belong together. `calibrations` are by the name of their data, what the sweep followed first;
    `mended` are what became of its masks by healing or search, as curves; `searched` is what a search
    judged, `compared` what was answered in full, dropped and healed.
    """

    sweep: Sweep
    calibrations: Mapping[str, Scores]
    mended: Sequence[Curve] = ()
    searched: Searched | None = None
    compared: Comparison | None = None

    @classmethod
    def of(
        cls,
        sweep: Sweep,
        scores: Sequence[Scores],
        evaluations: Sequence[Evaluation] = (),
        searched: Searched | None = None,
        compared: Comparison | None = None,
    ) -> Self:
        """Raises InputError for scores, a search or answers of another model, for evaluations of masks that the sweep
        does not have or with other measures, and for a sweep without a point.
        """
        depth = sweep.full.quality.mask.num_hidden_layers
        for name, each in zip(_names(scores), scores, strict=True):
            model = each.provenance.model
            _check_weights(sweep, f"the scores on {name} are of {model.path}", model.fingerprint)
            if each.num_hidden_layers != depth:
                raise InputError(f"the scores on {name} are for {each.num_hidden_layers} layers, the sweep for {depth}")
        ordered = sorted(scores, key=lambda each: scores_id(each) != sweep.request.scores_sha256)
        if searched is not None:
            model = searched.header.provenance.model
            _check_weights(sweep, f"the search is of {model.path}", model.fingerprint)
        if compared is not None:
            _check_weights(sweep, "the answers are of a full model", compared.forms[0].fingerprint)
        mended = _mended(sweep, evaluations)
        if any("searched" in curve.series.name for curve in mended) and any(len({*each.kinds}) > 1 for each in scores):
            raise InputError(
                "masks that the sweep does not have differ in KV cache where layers do; sweep them as well"
            )
        return cls(sweep, dict(zip(_names(ordered), ordered, strict=True)), mended, searched, compared)

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
    def mended_points(self) -> dict[str, tuple[Curve, Point]]:
        """By what a picture calls it."""
        return {f"{curve.series.name} {n}": (curve, point) for curve in self.mended for n, point in curve.points[1:]}

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


def _mended(sweep: Sweep, evaluations: Sequence[Evaluation]) -> tuple[Curve, ...]:
    """A curve for each way of healing a series' masks, and for other masks of as many sublayers. What is healed has the
    shape, and so the speed, of its mask; other masks have those of the series' where all layers are of one kind.
    """
    found: dict[tuple[str, str], dict[int, Point]] = {}
    for each in evaluations:
        owner, n, own = _place(sweep, each)
        point = sweep.points[owner.steps[n]]
        _check_alike(point, each)
        how = ", ".join(word for word in (None if own else "searched", each.healed) if word)
        points = found.setdefault((owner.name, how), {})
        if n in points:
            raise InputError(f"two evaluations are of {owner.name} {n}, {how}; a report shows one of them")
        points[n] = point.model_copy(update={"quality": each.quality})
    series = {each.name: each for each in sweep.series}
    return tuple(
        Curve(
            series[name].model_copy(update={"name": f"{name}, {how}", "order": f"{series[name].order}, {how}"}),
            ((0, sweep.full), *sorted(points.items())),
        )
        for (name, how), points in found.items()
    )


def _place(sweep: Sweep, evaluation: Evaluation) -> tuple[Series, int, bool]:
    """The series, the number dropped, and whether its mask is the series' own. Raises InputError where none has so
    many, and for a mask of the sweep itself that was not healed.
    """
    mask = evaluation.quality.mask
    places = [
        (series, n, sweep.points[id_].quality.mask)
        for series in sweep.series
        for n, id_ in series.steps.items()
        if id_ in sweep.points
    ]
    same = [(series, n) for series, n, its in places if its.effect == mask.effect]
    if same and evaluation.healed is not None:
        return *same[0], True
    alike = [(series, n) for series, n, its in places if series.order == BY_IMPORTANCE and _sizes(its) == _sizes(mask)]
    if alike and not same:
        return *alike[0], False
    what = "is not of a healed model, and the sweep has its mask" if same else "drops other numbers of sublayers"
    raise InputError(
        f"the evaluation of {evaluation.provenance.model.path} {what}; expected a healed point of it, or another mask "
        "of as many sublayers"
    )


def _sizes(mask: DropMask) -> tuple[int, int]:
    return len(mask.attention), len(mask.mlp)


def _check_alike(point: Point, evaluation: Evaluation) -> None:
    def measured(quality: Quality) -> list[object]:
        apart = quality.divergence
        on = None if apart is None else (apart.on, apart.data and apart.data.sha256)
        return [quality.perplexity.data.sha256, on, *((task.task, task.metric, task.samples) for task in quality.tasks)]

    names = ("perplexity", "divergence", *(f"task {task.task}" for task in point.quality.tasks))
    ours, its = measured(point.quality), measured(evaluation.quality)
    if ours != its:
        where = next((n for n, one, other in zip(names, ours, its, strict=False) if one != other), "tasks")
        raise InputError(
            f"the evaluation of {evaluation.provenance.model.path} was measured otherwise than the sweep ({where}); "
            "evaluate it with the sweep's own options"
        )


def _check_weights(sweep: Sweep, said: str, fingerprint: str) -> None:
    """Raise InputError for what was measured of others."""
    if fingerprint != (expected := sweep.request.fingerprint):
        raise InputError(
            f"{said} with the weights {fingerprint}; "
            f"the sweep is of {sweep.provenance.model.path} with the weights {expected}"
        )


def _names(scores: Sequence[Scores]) -> list[str]:
    """What each was measured on, numbered where the same text was used twice."""
    found: list[str] = []
    for place, each in enumerate(scores, 1):
        data = each.provenance.data
        name = f"calibration set {place}" if data is None else data.source
        found.append(f"{name} ({place})" if name in found else name)
    return found
