"""Engines for many masks: one in which masks are switched, or one that is built with each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.evaluation.engine import Engine, EngineSettings, default_device, running, speeds_in_turns
from llmdrop_vllm.evaluation.records import Speed, SpeedWorkload
from llmdrop_vllm.masks.mask import DropMask


@dataclass(frozen=True)
class Plan:
    """What is to be measured: quality or not, with tasks or not, and speed where there is a workload."""

    checkpoint: Checkpoint
    settings: EngineSettings
    workload: SpeedWorkload | None
    quality: bool
    harness: bool


@dataclass(frozen=True)
class Engines:
    """How masks get their engines: in `one` they are switched; without it each gets its own, beside which that of the
    `full` model runs where speed is measured.
    """

    plan: Plan
    one: Engine | None = None
    full: Engine | None = None

    @contextmanager
    def under(self, mask: DropMask) -> Iterator[Engine]:
        """An engine that answers as under a mask within the context."""
        if self.one is None:
            with running(self.plan.checkpoint, mask, self.plan.settings, harness=self.plan.harness) as engine:
                yield engine
        else:
            self.one.put_on(mask)
            yield self.one

    def speeds(self, engine: Engine, mask: DropMask) -> list[Speed] | None:
        """Of the mask, whose engine is given, and of the full model in turns. None where they cannot be told here: on a
        GPU engines are served compiled, and one for switching is not.
        """
        other = self.full or (self.one if default_device() == "cpu" else None)
        if other is None or self.plan.workload is None:
            return None
        return speeds_in_turns(((engine, mask), (other, self.plan.checkpoint.mask)), self.plan.workload)


@contextmanager
def any_engines(plan: Plan, *, switching: bool = True) -> Iterator[Engines]:
    """One in which masks are switched, where they can be and what is wanted can be told that way; else one for each,
    and the full model's for as long as there are others.
    """
    if switching and (plan.quality or default_device() != "cuda"):
        settings = replace(plan.settings, switching=True)
        with running(plan.checkpoint, plan.checkpoint.mask, settings, harness=plan.harness) as engine:
            if engine.can_switch():
                yield Engines(plan, one=engine)
                return
    if plan.workload is None:
        yield Engines(plan)
        return
    plan = replace(plan, settings=replace(plan.settings, engines=2))
    with running(plan.checkpoint, plan.checkpoint.mask, plan.settings, harness=False) as full:
        yield Engines(plan, full=full)
