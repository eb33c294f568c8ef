"""Quality and speed against the number of sublayers dropped: one engine per mask, every finished point kept at once."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmdrop_vllm.accounting import kept_layout
from llmdrop_vllm.artifacts import ModelIdentity, Provenance, Scores, read_record, write_record
from llmdrop_vllm.checkpoint import Checkpoint
from llmdrop_vllm.errors import OutputError
from llmdrop_vllm.evaluation.divergence import Reference
from llmdrop_vllm.evaluation.engine import Engine, EngineSettings, running
from llmdrop_vllm.evaluation.evaluate import Measures
from llmdrop_vllm.evaluation.harness import write_results
from llmdrop_vllm.evaluation.records import (
    Divergence,
    Point,
    Series,
    SpeedWorkload,
    Sweep,
    SweepRequest,
    mask_id,
    scores_id,
)
from llmdrop_vllm.hf import transformers_config
from llmdrop_vllm.locks import hold
from llmdrop_vllm.mask import DropMask
from llmdrop_vllm.surgery.inspection import count_parameters

SWEEP_FILE, HARNESS_DIRECTORY = "sweep.json", "lm-eval"
# The full model's speed is measured again after so many points, for machines drift.
POINTS_BETWEEN, NUM_ROUNDS = 5, 3


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
        harness = self.measures.harness
        return SweepRequest(
            fingerprint=self.checkpoint.fingerprint,
            scores_sha256=scores_id(self.scores),
            data=self.measures.text.identity,
            context=self.measures.context,
            divergence_tokens=self.measures.divergence_tokens,
            tasks=harness.tasks if harness else (),
            limit=self.measures.limit,
            workload=self.workload,
            dtype=self.settings.dtype,
        )

    def begin(self, out: Path) -> Sweep:
        """What a file has already, with this plan's series. Raises OutputError if it was measured otherwise."""
        fresh = Sweep(
            request=self.request,
            series=self.series,
            base=mask_id(self.checkpoint.mask),
            provenance=Provenance(
                model=ModelIdentity.of(self.checkpoint), data=self.scores.provenance.data, dtype=self.settings.dtype
            ),
        )
        if not out.exists():
            return fresh
        kept = read_record(Sweep, out)
        if kept.request != fresh.request:
            raise OutputError(f"{out} was measured otherwise: {_difference(kept.request, fresh.request)}")
        others = tuple(each for each in kept.series if each.name not in {own.name for own in self.series})
        return kept.model_copy(update={"series": (*self.series, *others)})


def measure_sweep(plan: SweepPlan, directory: Path, *, progress: bool = False) -> Sweep:
    """Measure what is not in the directory's file yet; the file is written anew after each point.

    Raises OutputError for a directory that another sweep is using, or has used for something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = hold(directory, "measuring into it")
    try:
        keeper = _Keeper(plan, directory)
        missing = [mask for name, mask in keeper.masks.items() if name not in keeper.found.points]
        divergences = _divergences(plan, missing)
        with tqdm(total=len(missing), unit="point", disable=not progress) as bar:
            for number, mask in enumerate(missing):
                bar.set_description(mask_title(mask))
                if number % POINTS_BETWEEN == 0:
                    keeper.measure_full()
                keeper.measure(mask, next(divergences))
                bar.update()
        if missing:
            keeper.measure_full()
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
        self.masks = {self.found.base: plan.checkpoint.mask} | dict(plan.masks)
        self.config = transformers_config(plan.checkpoint, DropMask(plan.checkpoint.mask.num_hidden_layers)).to_dict()

    def measure_full(self) -> None:
        """The full model's speed, before and after others'."""
        if self.plan.workload is not None:
            with self._running(self.plan.checkpoint.mask, harness=False) as engine:
                speed = engine.speed(self.plan.workload, num_rounds=NUM_ROUNDS)
            self.keep(full_speeds=(*self.found.full_speeds, speed))

    def measure(self, mask: DropMask, divergence: Divergence | None) -> None:
        """One point."""
        plan, harness = self.plan, self.plan.measures.harness
        with self._running(mask, harness=bool(harness and harness.tasks)) as engine:
            quality, raw = plan.measures.quality(engine, mask, divergence, bars=False)
            speed = None
            if plan.workload is not None:
                full_before = len(self.found.full_speeds) - 1
                speed = engine.speed(plan.workload, num_rounds=NUM_ROUNDS, full_before=full_before)
        if raw is not None:
            write_results(raw, self.directory / HARNESS_DIRECTORY / f"{mask_id(mask)}.json")
        stored, whole = (kept_layout(self.config, each).stored_layers for each in (mask, plan.checkpoint.mask))
        parameters = count_parameters(transformers_config(plan.checkpoint, mask))
        point = Point(quality=quality, speed=speed, kv_share=stored / whole, parameters=parameters)
        self.keep(points={**self.found.points, mask_id(mask): point})

    def keep(self, **changes: Any) -> Sweep:
        """Write what is new."""
        self.found = self.found.model_copy(update=changes)
        write_record(self.found, self.directory / SWEEP_FILE)
        return self.found

    def _running(self, mask: DropMask, *, harness: bool) -> AbstractContextManager[Engine]:
        return running(self.plan.checkpoint, mask, self.plan.settings, harness=harness)


def _divergences(plan: SweepPlan, masks: Sequence[DropMask]) -> Iterator[Divergence | None]:
    """Of all masks, before the first engine needs the memory: the full model is loaded once for it."""
    windows = plan.measures.divergence_windows
    if not windows or not masks:
        return itertools.repeat(None)
    reference = Reference(plan.checkpoint, plan.checkpoint.mask, windows, dtype=plan.settings.dtype)
    return iter([reference.under(mask) for mask in masks])


def _difference(kept: SweepRequest, asked: SweepRequest) -> str:
    name = next(key for key in type(kept).model_fields if getattr(kept, key) != getattr(asked, key))
    return f"{name} was {getattr(kept, name)} and is {getattr(asked, name)}; choose another directory"
