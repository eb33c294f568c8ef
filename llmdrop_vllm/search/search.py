"""The whole search: cosine's mask, greedy ways and evolution, and of what they find the best on held-out answers."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmdrop_vllm.artifacts import Provenance, Scores
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.growing import appended
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import DataError
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.mended import load_mended
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.judge import Judging
from llmdrop_vllm.search.methods import backward, by_states, evolve, forward, ranked_alone
from llmdrop_vllm.search.space import KINDS, Space
from llmdrop_vllm.search.states import StateSpace
from llmdrop_vllm.search.trials import EnoughError, Loss, SearchHeader, Trial, Trials, verdict
from llmdrop_vllm.selection.candidates import Candidates
from llmdrop_vllm.selection.orders import LeastImportant
from llmdrop_vllm.selection.selection import Ranked

# Generations without a mask that is better on held-out answers before an evolution ends.
PATIENCE = 4
BY_COSINE = "cosine"


@dataclass(frozen=True)
class SearchOptions:
    """`most` masks are judged at most, in at most `seconds`; `beam` masks are kept by the greedy way at each step, and
    the other one begins with `extra` sublayers more than are to go. Raises DataError for what cannot be.
    """

    most: int = 400
    seconds: float = inf
    beam: int = 1
    extra: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"masks to judge": self.most, "masks kept at each step": self.beam, "seconds": self.seconds}
        for name, value in least.items():
            if not value >= 1:
                raise DataError(f"{name}: {value:g} asked; expected 1 or more")


@dataclass(frozen=True)
class SearchPlan:
    """`by_cosine` is the mask that scores choose, `ranking` what they would drop first. With `to_heal`, what was lost
    is healed on that in closed form after each greedy step.

    `mixes` are other spaces that are as good an answer to what was asked, each with its mask by cosine.
    """

    judging: Judging
    space: Space
    by_cosine: DropMask
    ranking: tuple[tuple[str, int], ...]
    to_heal: Calibration | None
    options: SearchOptions
    mixes: tuple[tuple[Space, DropMask], ...] = ()

    @property
    def states(self) -> StateSpace | None:
        """The space, where windows are looked for too."""
        return self.space if isinstance(self.space, StateSpace) else None

    @property
    def first_by_cosine(self) -> list[DropMask]:
        """With one attention gone, two and so on; then with MLPs; the last is its whole mask."""
        whole, start = self.by_cosine, self.space.start
        if self.states is not None:  # the others take long, and nobody asked for them
            return [whole]
        attention = range(len(start.attention) + 1, len(whole.attention) + 1)
        mlp = range(len(start.mlp) + 1, len(whole.mlp) + 1)
        found = [replace(whole, attention=whole.attention[:count], mlp=start.mlp) for count in attention]
        return [*found, *(replace(whole, mlp=whole.mlp[:count]) for count in mlp)]

    @property
    def next_by_cosine(self) -> DropMask:
        """With `extra` sublayers of each kind more than are to go."""
        first = [(kind, layer) for kind in KINDS for layer in getattr(self.by_cosine, kind)]
        return self.space.more([*first, *self.ranking], self.options.extra)


def plan_search(
    scores: Scores, judging: Judging, spaces: Sequence[Space], options: SearchOptions, to_heal: Calibration | None
) -> SearchPlan:
    """With the masks that scores of the same weights give; what is looked for may lie in any of the spaces.

    Raises MaskError where too few sublayers may go.
    """
    candidates = Candidates(scores, spaces[0].start, spaces[0].protect)
    units = LeastImportant().arrange(candidates.units("joint"), scores.num_hidden_layers)
    ranking = tuple(("attention" if unit.attention else "mlp", unit.layer) for unit in units)
    spaces = [replace(each, donors=candidates.donors) for each in spaces]
    (space, by_cosine), *mixes = [with_cosine(each, candidates, judging.checkpoint) for each in spaces]
    return SearchPlan(judging, space, by_cosine, ranking, to_heal, options, tuple(mixes))


def with_cosine(space: Space, candidates: Candidates, checkpoint: Checkpoint) -> tuple[Space, DropMask]:
    """And cosine's mask in it. Where layers store unlike keys and values none must store more than that one, which is
    ranked with an eye on padding.
    """
    for kind in KINDS:
        if count := getattr(space, kind):
            candidates = Ranked(kind, count).pick(candidates)
    by_cosine, asked = candidates.mask, space.meets
    if len({*candidates.scores.kinds}) == 1 or isinstance(space, StateSpace):  # whose goal sees it
        return space, by_cosine
    most = checkpoint.under(by_cosine).layout.token_values

    def meets(mask: DropMask) -> bool:
        return asked(mask) and checkpoint.under(mask).layout.token_values <= most

    return replace(space, meets=meets), by_cosine


def search(plan: SearchPlan, trials_file: Path, *, progress: bool = False) -> MaskFile:
    """The mask with the lowest KL on held-out answers among what was found, with its evidence.

    Every mask that was judged is kept in the trials file; a search that is asked again, after an interruption or for
    more masks, goes on with it. Raises OutputError for a file of another search, CheckpointError for weights that
    cannot be computed with.
    """
    its = plan.judging
    header = SearchHeader(
        answers=its.answers.identity,
        tokens=its.answers.predicted,
        held_out=its.held_out.identity,
        to_heal=None if plan.to_heal is None else plan.to_heal.identity,
        start=its.checkpoint.mask,
        provenance=Provenance.of(its.checkpoint, dtype=its.dtype, device=its.device),
    )
    with (
        appended(trials_file, header, Trial) as file,
        its.judges() as judges,
        tqdm(total=plan.options.most, unit="mask", disable=not progress) as bar,
    ):
        for each in judges:  # before healing puts the full model aside, and before time is counted
            each.targets  # noqa: B018
        trials = Trials(*judges, file, plan.options.most, plan.options.seconds, bar.update)
        run = _Run(plan, trials, bar)
        try:
            with suppress(EnoughError):
                run.go()
        except KeyboardInterrupt:
            if (best := run.best) is not None:
                judged, said = len(trials.asked), f"{best.mask.summary()}, KL {best.mean:.4f}"
                bar.write(f"best so far, of {judged} masks: {said}; --masks {judged} writes the best of these")
            raise
        return run.chosen()


class _Run:
    """The ways one after another; `finalists` by name are what held-out answers decide between."""

    def __init__(self, plan: SearchPlan, trials: Trials, bar: "tqdm[Any]") -> None:
        self.plan, self.trials, self.bar = plan, trials, bar
        self.finalists: dict[str, DropMask] = {BY_COSINE: plan.by_cosine}
        self.best: Loss | None = None

    def go(self) -> None:
        """Greedy ways, then an evolution of the best mask so far; where each step is healed, forward alone."""
        best = self._best_mix([self.trials.on_answers(mask) for mask in self.plan.first_by_cosine][-1])
        if self.plan.to_heal is not None:
            self._last("greedy forward, healed at each step", forward(self.plan.space, self.trials))
            return
        for name, way in self._ways():
            if (found := self._last(name, way)) is not None:
                best = min(best, found)
        self._evolve(best.mask)

    def _ways(self) -> Iterator[tuple[str, Iterator[Loss]]]:
        """The short ones first: where there is little time they are all that there is."""
        plan, trials = self.plan, self.trials
        self.bar.set_description("each sublayer alone")
        if plan.states is not None:
            yield from by_states(plan.states, trials)
            return
        ranking = ranked_alone(plan.space, trials)
        alone = plan.space.more(ranking, 0)
        if plan.space.allows(alone):
            yield "least lost alone", iter([trials.on_answers(alone)])
        more = plan.space.more(ranking, plan.options.extra)
        yield "greedy backward from these", backward(plan.space, trials, more)
        yield "greedy backward from cosine's", backward(plan.space, trials, plan.next_by_cosine)
        yield "greedy forward", forward(plan.space, trials, beam=plan.options.beam)

    def _best_mix(self, best: Loss) -> Loss:
        """Go on in the space whose mask by cosine loses least."""
        for space, mask in self.plan.mixes:
            found = self.trials.on_answers(mask)
            if found < best or self.plan.to_heal is None:  # a finalist is healed, which takes long
                self.finalists[f"{BY_COSINE}, {len(mask.attention)} attentions and {len(mask.mlp)} MLPs"] = mask
            if found < best:
                best, self.plan = found, replace(self.plan, space=space, by_cosine=mask)
        return best

    def chosen(self) -> MaskFile:
        """The best of the finalists."""
        plan = self.plan
        return verdict(
            {name: self._losses(mask) for name, mask in self.finalists.items()},
            plan.judging,
            f"search by KL on {'answers' if plan.states is None else 'long texts'}",
            len(self.trials.asked),
            heal_aware=plan.to_heal is not None,
        )

    def _losses(self, mask: DropMask) -> tuple[Loss, Loss]:
        """On both kinds of answers, once it is healed where that is asked."""
        self._heal(mask)
        return self.trials.on_answers(mask, anyway=True), self.trials.on_held_out(mask)

    def _last(self, name: str, way: Iterator[Loss]) -> Loss | None:
        """A way to its end, which is a finalist if it is what was asked for."""
        self.bar.set_description(name)
        found = None
        for found in way:
            self._heal(found.mask)
            if self.plan.space.is_whole(found.mask):
                self.finalists[name] = found.mask
            self._say(found, gone=len(found.mask.attention) + len(found.mask.mlp))
        return found if name in self.finalists else None

    def _say(self, found: Loss, **others: object) -> None:
        """Beside the time that is left: what is at hand, and the best of what was asked for."""
        if self.plan.space.is_whole(found.mask):
            self.best = min(self.best or found, found)
        best = {} if self.best is None else {"best": f"{self.best.mean:.4f}"}
        self.bar.set_postfix(kl=f"{found.mean:.4f}", **best, **others)

    def _evolve(self, parent: DropMask) -> None:
        """As long as held-out answers see it become better now and then."""
        self.bar.set_description("evolution")
        trials, idle = self.trials, 0
        least = min(map(trials.on_held_out, self.finalists.values()))
        for found in evolve(self.plan.space, trials, parent, seed=self.plan.options.seed):
            idle += 1
            if (now := trials.on_held_out(found.mask)) < least:
                least, idle = now, 0
                self.finalists["evolution"] = found.mask
            self._say(found, held_out=f"{least.mean:.4f}")
            if idle == PATIENCE:
                break

    def _heal(self, mask: DropMask) -> None:
        """Where it is asked, let the judges go on with what a mask leaves, healed; that is done when they need it."""
        if (data := self.plan.to_heal) is None:
            return
        its = self.plan.judging
        student, teacher = its.checkpoint.under(mask), its.checkpoint.under(its.checkpoint.mask)

        def load() -> Any:
            dtype = str(its.dtype).removeprefix("torch.")
            with healed(student, teacher, data, device=str(its.device), dtype=dtype) as found:
                return load_mended(student, found.tensors, dtype=its.dtype, device=its.device)

        self.trials.judge.weights.change(load)
        self.trials.mended = mask
        for judge in (self.trials.judge, self.trials.held_out):
            judge.rebase(mask)
