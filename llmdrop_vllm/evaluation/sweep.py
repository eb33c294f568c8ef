"""Quality and speed against the number of sublayers dropped, every finished point kept at once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmdrop_vllm.artifacts import Provenance, Scores, hold, make_directory, read_record, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import OutputError
from llmdrop_vllm.evaluation.divergence import Answers, own_answers
from llmdrop_vllm.evaluation.engine import Engine, EngineSettings, running
from llmdrop_vllm.evaluation.evaluate import Measures
from llmdrop_vllm.evaluation.harness import write_results
from llmdrop_vllm.evaluation.masked_engines import Engines, Plan, any_engines
from llmdrop_vllm.evaluation.records import Point, Series, SpeedWorkload, Sweep, SweepRequest, mask_id, scores_id
from llmdrop_vllm.hf import on_meta, transformers_config
from llmdrop_vllm.masks.mask import DropMask

SWEEP_FILE, SCORES_FILE, ANSWERS_FILE, HARNESS_DIRECTORY = "sweep.json", "scores.json", "answers.json", "lm-eval"
ELSEWHERE = "choose another directory"


@dataclass(frozen=True)
class SweepPlan:
    """All that a sweep measures, and with what."""

    checkpoint: Checkpoint
    scores: Scores
    series: tuple[Series, ...]
    masks: Mapping[str, DropMask]
    measures: Measures
    settings: EngineSettings
    workload: SpeedWorkload | None

    @property
    def request(self) -> SweepRequest:
        """What a file must have been made with for this sweep to go on in it."""
        return SweepRequest(
            fingerprint=self.checkpoint.fingerprint,
            scores_sha256=scores_id(self.scores),
            data=self.measures.text.identity,
            context=self.measures.context,
            divergence_tokens=self.measures.divergence_tokens,
            tasks=self.measures.harness.tasks,
            limit=self.measures.harness.limit,
            workload=self.workload,
            dtype=self.settings.dtype,
            prompting=self.measures.harness.prompting,
            divergence_on=self.measures.divergence_on,
            divergence_data=self.measures.divergence_data,
        )

    def begin(self, out: Path) -> Sweep:
        """What a file has already, with this plan's series. Raises OutputError if it was measured otherwise."""
        request, base = self.request, mask_id(self.checkpoint.mask)
        if not out.exists():
            provenance = Provenance.of(self.checkpoint, data=self.scores.provenance.data, dtype=self.settings.dtype)
            return Sweep(request=request, series=self.series, base=base, provenance=provenance)
        kept = read_record(Sweep, out)
        # A sweep of quality alone may get its speeds later, and one with speeds go on without.
        request = request.model_copy(update={"workload": self.workload or kept.request.workload})
        if kept.request.model_copy(update={"workload": kept.request.workload or self.workload}) != request:
            raise OutputError(f"{out} was measured otherwise: {_difference(kept.request, request)}")
        if kept.base != base:  # a config may say another mask for the same weights
            raise OutputError(f"{out} begins with mask {kept.base}, and the model has {base}; {ELSEWHERE}")
        before = {each.name: each for each in kept.series}
        own = [_united(before.pop(each.name, each), each) for each in self.series]
        return kept.model_copy(update={"request": request, "series": (*own, *before.values())})


def measure_sweep(plan: SweepPlan, directory: Path, *, progress: bool = False) -> Sweep:
    """Measure what is not in the directory's file yet; the file is written anew after each point, the scores beside it.

    Raises OutputError for a directory that another sweep is using, or has used for something else.
    """
    make_directory(directory)
    lock = hold(directory, "measuring into it")
    try:
        keeper = _Keeper(plan, directory)
        with tqdm(total=len(keeper.missing), unit="point", disable=not progress) as bar:
            while left := keeper.missing:  # again for the speeds that engines for quality cannot tell
                with any_engines(keeper.engines) as engines:
                    for name, mask in left.items():
                        bar.set_description(mask_title(mask))
                        keeper.measure(name, engines)
                        bar.update(name not in keeper.missing)
        return keeper.keep()
    finally:
        os.close(lock)


def mask_title(mask: DropMask) -> str:
    """A few words: `attention -4, MLP -2`."""
    parts = [f"{name} -{len(layers)}" for name, layers in (("attention", mask.attention), ("MLP", mask.mlp)) if layers]
    return ", ".join(parts) or "full model"


class _Keeper:
    """The sweep so far, on disk and in memory."""

    def __init__(self, plan: SweepPlan, directory: Path) -> None:
        self.plan, self.directory = plan, directory
        self.found = plan.begin(directory / SWEEP_FILE)
        write_record(plan.scores, directory / SCORES_FILE)
        self.masks = {self.found.base: plan.checkpoint.mask} | dict(plan.masks)
        # Before the first engine of a mask needs the memory.
        dtype = plan.settings.dtype
        self.divergences = plan.measures.divergences(plan.checkpoint, self.unknown, self._answers, dtype=dtype)

    @property
    def unknown(self) -> dict[str, DropMask]:
        """Masks of which nothing was measured yet, by id."""
        return {name: mask for name, mask in self.masks.items() if name not in self.found.points}

    @property
    def missing(self) -> dict[str, DropMask]:
        """Those, and masks that are to be timed."""
        if self.plan.workload is None:
            return self.unknown
        timed = {name for name, point in self.found.points.items() if point.speed is not None}
        return {name: mask for name, mask in self.masks.items() if name not in timed}

    @property
    def engines(self) -> Plan:
        """For what is missing."""
        plan, quality = self.plan, bool(self.unknown)
        harness = quality and bool(plan.measures.harness.tasks)
        return Plan(plan.checkpoint, plan.settings, plan.workload, quality=quality, harness=harness)

    def _answers(self) -> Answers:
        """The full model's, the same ones for all points: kept for a sweep that goes on."""
        path = self.directory / ANSWERS_FILE
        if not path.exists():
            base, settings = self.plan.checkpoint, self.plan.settings
            with running(base, base.mask, settings, harness=False) as engine:
                write_record(own_answers(engine, self.plan.measures.divergence_tokens), path)
        return read_record(Answers, path)

    def measure(self, name: str, engines: Engines) -> None:
        """One point, or its speed alone where its quality is there already."""
        mask = self.masks[name]
        with engines.under(mask) as engine:
            if (point := self.found.points.get(name)) is None:
                point = self._point(engine, name)
            if (speeds := engines.speeds(engine, mask)) is not None:
                point = point.model_copy(update=dict(zip(("speed", "full_speed"), speeds, strict=True)))
        self.keep(points={**self.found.points, name: point})

    def _point(self, engine: Engine, name: str) -> Point:
        checkpoint, mask = self.plan.checkpoint, self.masks[name]
        quality, raw = self.plan.measures.quality(engine, mask, bars=False)
        quality = quality.model_copy(update={"divergence": self.divergences.get(name)})
        if raw is not None:
            write_results(raw, self.directory / HARNESS_DIRECTORY / f"{name}.json")
        masked, base = checkpoint.under(mask), checkpoint.under(checkpoint.mask)
        kv_share = float(masked.layout.token_values / base.layout.token_values)
        parameters = int(on_meta(transformers_config(masked)).num_parameters())
        return Point(quality=quality, speed=None, full_speed=None, kv_share=kv_share, parameters=parameters)

    def keep(self, **changes: Any) -> Sweep:
        """Write what is new."""
        self.found = self.found.model_copy(update=changes)
        write_record(self.found, self.directory / SWEEP_FILE)
        return self.found


def _united(kept: Series, asked: Series) -> Series:
    """One series with the counts of both: what was measured before stays in its curve."""
    steps = dict(sorted((kept.steps | asked.steps).items()))
    return asked.model_copy(update={"counts": tuple(steps), "masks": tuple(steps.values())})


def _difference(kept: SweepRequest, asked: SweepRequest) -> str:
    name = next(key for key in type(kept).model_fields if getattr(kept, key) != getattr(asked, key))
    return f"{name} was {getattr(kept, name)} and is {getattr(asked, name)}; {ELSEWHERE}"
