"""What a report is made of: a sweep, the scores next to it, and how its series are told apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from llmdrop_vllm.artifacts import Scores
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.evaluation.records import Point, Series, Sweep, scores_id

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
    """Records that belong together. `calibrations` are by the name of their data, what the sweep followed first."""

    sweep: Sweep
    calibrations: Mapping[str, Scores]

    @classmethod
    def of(cls, sweep: Sweep, scores: Sequence[Scores]) -> Self:
        """Raises InputError for scores of another model and for a sweep without a point."""
        depth = sweep.full.quality.mask.num_hidden_layers
        for name, each in zip(_names(scores), scores, strict=True):
            model = each.provenance.model
            if model.fingerprint != sweep.request.fingerprint:
                raise InputError(
                    f"the scores on {name} are of {model.path} with the weights {model.fingerprint}; "
                    f"the sweep is of {sweep.provenance.model.path} with the weights {sweep.request.fingerprint}"
                )
            if each.num_hidden_layers != depth:
                raise InputError(f"the scores on {name} are for {each.num_hidden_layers} layers, the sweep for {depth}")
        ordered = sorted(scores, key=lambda each: scores_id(each) != sweep.request.scores_sha256)
        return cls(sweep, dict(zip(_names(ordered), ordered, strict=True)))

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


def _names(scores: Sequence[Scores]) -> list[str]:
    """What each was measured on, numbered where the same text was used twice."""
    found: list[str] = []
    for place, each in enumerate(scores, 1):
        data = each.provenance.data
        name = f"calibration set {place}" if data is None else data.source
        found.append(f"{name} ({place})" if name in found else name)
    return found
