"""Engines for many masks: one in which masks are switched, or one that is built with each."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.evaluation.engine import Engine, EngineSettings, Masked, default_device, running, speeds_in_turns
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
            plan = self.plan
            with running(plan.checkpoint, mask, plan.settings, harness=plan.harness) as engine:
                yield engine
        else:
            self.one.put_on(mask)
            yield self.one

    def speeds(self, engine: Engine, mask: DropMask) -> tuple[Speed, Speed] | None:
        """Of the mask, whose engine is given, and of the full model in turns. None where they cannot be told here: on a
        GPU engines are served compiled, and one for switching is not.
        """
        pair: tuple[Engine | Masked, Engine | Masked]
        if self.one is not None and default_device() == "cpu":
            pair = Masked(self.one, mask), Masked(self.one, self.plan.checkpoint.mask)
        elif self.full is not None:
            pair = engine, self.full
        else:
            return None
        if self.plan.workload is None:
            return None
        own, full = speeds_in_turns(pair, self.plan.workload, num_rounds=NUM_ROUNDS)
        return own, full


@contextmanager
def one_for_all(plan: Plan) -> Iterator[Engines | None]:
    """None where masks cannot be switched, or what is wanted cannot be told that way."""
    if default_device() == "cuda" and not plan.quality:
        yield None
        return
    settings = replace(plan.settings, switching=True)
    with running(plan.checkpoint, plan.checkpoint.mask, settings, harness=plan.harness) as engine:
        yield Engines(plan, one=engine) if engine.can_switch() else None


@contextmanager
def one_for_each(plan: Plan) -> Iterator[Engines]:
    """With the full model's engine for as long as there are others."""
    if plan.workload is None:
        yield Engines(plan)
        return
    plan = replace(plan, settings=replace(plan.settings, engines=2))
    with running(plan.checkpoint, plan.checkpoint.mask, plan.settings, harness=False) as full:
        yield Engines(plan, full=full)


@contextmanager
def any_engines(plan: Plan) -> Iterator[Engines]:
    """The one in which masks are switched, where they can be."""
    with ExitStack() as stack:
        one = stack.enter_context(one_for_all(plan))
        if one is None:
            stack.close()  # its memory is needed
        yield one or stack.enter_context(one_for_each(plan))
