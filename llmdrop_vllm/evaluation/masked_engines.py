"""Engines for many masks: one in which masks are switched, or one that is built with each."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.evaluation.engine import Engine, EngineSettings, Masked, running, speeds_in_turns
from llmdrop_vllm.evaluation.records import Speed, SpeedWorkload
from llmdrop_vllm.masks.mask import DropMask

NUM_ROUNDS = 3


@dataclass(frozen=True)
class Plan:
    """What is to be measured: quality or not, with tasks or not, and speed where there is a workload."""

    checkpoint: Checkpoint
    settings: EngineSettings
    workload: SpeedWorkload | None
    quality: bool
    harness: bool


class Engines(Protocol):
    """How masks get their engines."""

    def under(self, mask: DropMask) -> AbstractContextManager[Engine]:
        """An engine that answers as under a mask within the context."""

    def speeds(self, engine: Engine, mask: DropMask) -> tuple[Speed, Speed] | None:
        """Of the mask, whose engine is given, and of the full model in turns; None where they cannot be told here."""


@dataclass(frozen=True)
class OneForAll:
    """On a GPU it tells no speed: engines are served compiled there, and one for switching is not."""

    plan: Plan
    engine: Engine

    @contextmanager
    def under(self, mask: DropMask) -> Iterator[Engine]:
        """The one, switched."""
        self.engine.put_on(mask)
        yield self.engine

    def speeds(self, engine: Engine, mask: DropMask) -> tuple[Speed, Speed] | None:
        """Switched between any two measurements."""
        if self.plan.workload is None or _gpu():
            return None
        pair = (Masked(engine, mask), Masked(engine, self.plan.checkpoint.mask))
        own, full = speeds_in_turns(pair, self.plan.workload, num_rounds=NUM_ROUNDS)
        return own, full


@dataclass(frozen=True)
class OneForEach:
    """`full` is the full model's engine, which runs beside each where speed is measured."""

    plan: Plan
    full: Engine | None

    def under(self, mask: DropMask) -> AbstractContextManager[Engine]:
        """A new one."""
        return running(self.plan.checkpoint, mask, self.plan.settings, harness=self.plan.harness)

    def speeds(self, engine: Engine, mask: DropMask) -> tuple[Speed, Speed] | None:
        """Of two engines."""
        if self.plan.workload is None or self.full is None:
            return None
        own, full = speeds_in_turns((engine, self.full), self.plan.workload, num_rounds=NUM_ROUNDS)
        return own, full


@contextmanager
def one_for_all(plan: Plan) -> Iterator[OneForAll | None]:
    """None where masks cannot be switched, or what is wanted cannot be told that way."""
    if _gpu() and not plan.quality:
        yield None
        return
    settings = replace(plan.settings, switching=True)
    with running(plan.checkpoint, plan.checkpoint.mask, settings, harness=plan.harness) as engine:
        yield OneForAll(plan, engine) if engine.can_switch() else None


@contextmanager
def one_for_each(plan: Plan) -> Iterator[OneForEach]:
    """With the full model's engine for as long as there are others."""
    if plan.workload is None:
        yield OneForEach(plan, None)
        return
    plan = replace(plan, settings=replace(plan.settings, engines=2))
    with running(plan.checkpoint, plan.checkpoint.mask, plan.settings, harness=False) as full:
        yield OneForEach(plan, full)


@contextmanager
def any_engines(plan: Plan) -> Iterator[Engines]:
    """The one in which masks are switched, where they can be."""
    with ExitStack() as stack:
        one = stack.enter_context(one_for_all(plan))
        if one is None:
            stack.close()  # its memory is needed
        yield one or stack.enter_context(one_for_each(plan))


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
