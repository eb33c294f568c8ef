"""The whole search: cosine's mask, greedy ways and evolution, and of what they find the best on held-out answers."""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmdrop_vllm import hf
from llmdrop_vllm.artifacts import Provenance
from llmdrop_vllm.data.growing import appended
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.mended import load_mended
from llmdrop_vllm.mask_file import Compared, Evidence, MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.judge import Judge, Weights
from llmdrop_vllm.search.methods import Found, backward, by_states, evolve, forward, ranked_alone
from llmdrop_vllm.search.plan import SearchPlan
from llmdrop_vllm.search.trials import EnoughError, Loss, Trial, Trials

# Generations without a mask that is better on held-out answers before an evolution ends.
PATIENCE = 4
BY_COSINE = "cosine"


def search(plan: SearchPlan, trials_file: Path, *, progress: bool = False) -> MaskFile:
    """The mask with the lowest KL on held-out answers among what was found, with its evidence.

    Every mask that was judged is kept in the trials file; a search that is asked again, after an interruption or for
    more masks, goes on with it. Raises OutputError for a file of another search, CheckpointError for weights that
    cannot be computed with.
    """
    with (
        tempfile.TemporaryDirectory(prefix="llmdrop-") as temporary,
        appended(trials_file, plan.header, Trial) as file,
        tqdm(total=plan.options.most, unit="mask", disable=not progress) as bar,
    ):
        masked = plan.checkpoint.under(plan.checkpoint.mask)
        weights = Weights(lambda: hf.load(masked, dtype=plan.dtype).to(plan.device).eval())
        judges = []
        for name, answers in (("answers", plan.answers), ("held-out", plan.held_out)):
            directory = Path(temporary) / name
            directory.mkdir()
            judges.append(Judge(weights, plan.checkpoint, masked.mask, answers, directory))
        trials = Trials(judges[0], judges[1], file, plan.options.most, plan.options.seconds, bar.update)
        run = _Run(plan, trials, bar)
        try:
            with suppress(EnoughError):
                run.go()
        except KeyboardInterrupt:
            if (best := run.best) is not None:
                judged, said = len(trials.asked), f"{best.mask.summary()}, KL {best.loss.mean:.4f}"
                bar.write(f"best so far, of {judged} masks: {said}; --masks {judged} writes the best of these")
            raise
        return run.chosen()


class _Run:
    """The ways one after another; `finalists` by name are what held-out answers decide between."""

    def __init__(self, plan: SearchPlan, trials: Trials, bar: "tqdm[Any]") -> None:
        self.plan, self.trials, self.bar = plan, trials, bar
        self.finalists: dict[str, DropMask] = {BY_COSINE: plan.by_cosine}
        self.best: Found | None = None

    def go(self) -> None:
        """Greedy ways, then an evolution of the best mask so far; where each step is healed, forward alone."""
        trials = self.trials
        best = self._best_mix([Found(mask, trials.on_answers(mask)) for mask in self.plan.first_by_cosine][-1])
        plan = self.plan
        if plan.to_heal is not None:
            self._last("greedy forward, healed at each step", forward(plan.space, trials, accepted=self._heal))
            return
        for name, way in self._ways():
            if (found := self._last(name, way)) is not None:
                best = min(best, found, key=lambda each: each.loss.mean)
        self._evolve(best.mask)

    def _ways(self) -> Iterator[tuple[str, Iterator[Found]]]:
        """The short ones first: where there is little time they are all that there is."""
        plan, trials = self.plan, self.trials
        self.bar.set_description("each sublayer alone")
        if plan.states is not None:
            yield from by_states(plan.states, trials)
            return
        ranking = ranked_alone(plan.space, trials)
        alone = plan.space.more(ranking, 0)
        if plan.space.allows(alone):
            yield "least lost alone", iter([Found(alone, trials.on_answers(alone))])
        more = plan.space.more(ranking, plan.options.extra)
        yield "greedy backward from these", backward(plan.space, trials, more)
        yield "greedy backward from cosine's", backward(plan.space, trials, plan.next_by_cosine)
        yield "greedy forward", forward(plan.space, trials, beam=plan.options.beam)

    def _best_mix(self, best: Found) -> Found:
        """Go on in the space whose mask by cosine loses least."""
        for space, mask in self.plan.mixes:
            found = Found(mask, self.trials.on_answers(mask))
            better = found.loss.mean < best.loss.mean
            if better or self.plan.to_heal is None:  # a finalist is healed, which takes long
                self.finalists[f"{BY_COSINE}, {len(mask.attention)} attentions and {len(mask.mlp)} MLPs"] = mask
            if better:
                best, self.plan = found, replace(self.plan, space=space, by_cosine=mask)
        return best

    def chosen(self) -> MaskFile:
        """The best of the finalists."""
        losses = {name: self._losses(mask) for name, mask in self.finalists.items()}
        _, by_cosine = losses[BY_COSINE]
        compared = tuple(
            Compared(
                name=name,
                attention=mask.attention,
                mlp=mask.mlp,
                windows=tuple(sorted(dict({*mask.windows} - {*self.plan.space.start.windows}))),
                kl=losses[name][0].mean,
                held_out_kl=losses[name][1].mean,
                held_out_interval=losses[name][1].interval(),
                difference=losses[name][1].interval(by_cosine),
            )
            for name, mask in self.finalists.items()
        )
        best = min(compared, key=lambda each: each.held_out_kl)
        plan, trials = self.plan, self.trials
        evidence = Evidence(
            judged=len(trials.asked),
            tokens=int(trials.judge.tokens.sum()),
            held_out_prompts=len(trials.held_out.tokens),
            held_out_tokens=int(trials.held_out.tokens.sum()),
            heal_aware=plan.to_heal is not None,
            compared=compared,
        )
        provenance = Provenance.of(plan.checkpoint, data=plan.answers.identity, dtype=plan.dtype, device=plan.device)
        judged_by = "answers" if plan.states is None else "long texts"
        method = f"search by KL on {judged_by}: {best.name}"
        return MaskFile.of(self.finalists[best.name], method, provenance, evidence)

    def _losses(self, mask: DropMask) -> tuple[Loss, Loss]:
        """On both kinds of answers, once it is healed where that is asked."""
        if self.plan.to_heal is not None:
            self._heal(mask)
        return self.trials.on_answers(mask, anyway=True), self.trials.on_held_out(mask)

    def _last(self, name: str, way: Iterator[Found]) -> Found | None:
        """A way to its end, which is a finalist if it is what was asked for."""
        self.bar.set_description(name)
        found = None
        for found in way:
            if self.plan.space.is_whole(found.mask):
                self.finalists[name] = found.mask
            self._say(found, gone=len(found.mask.attention) + len(found.mask.mlp))
        return found if name in self.finalists else None

    def _say(self, found: Found, **others: object) -> None:
        """Beside the time that is left: what is at hand, and the best of what was asked for."""
        if self.plan.space.is_whole(found.mask):
            self.best = min(self.best or found, found, key=lambda each: each.loss.mean)
        best = {} if self.best is None else {"best": f"{self.best.loss.mean:.4f}"}
        self.bar.set_postfix(kl=f"{found.loss.mean:.4f}", **best, **others)

    def _evolve(self, parent: DropMask) -> None:
        """As long as held-out answers see it become better now and then."""
        self.bar.set_description("evolution")
        trials, idle = self.trials, 0
        least = min(trials.on_held_out(each).mean for each in self.finalists.values())
        for found in evolve(self.plan.space, trials, parent, seed=self.plan.options.seed):
            idle += 1
            if (now := trials.on_held_out(found.mask).mean) < least:
                least, idle = now, 0
                self.finalists["evolution"] = found.mask
            self._say(found, held_out=f"{least:.4f}")
            if idle == PATIENCE:
                break

    def _heal(self, mask: DropMask) -> None:
        """Let the judges go on with what a mask leaves, healed; that is done when they need it."""
        plan, data = self.plan, self.plan.to_heal
        assert data is not None

        def load() -> Any:
            checkpoint = plan.checkpoint
            student, teacher = checkpoint.under(mask), checkpoint.under(checkpoint.mask)
            with healed(student, teacher, data, device=str(plan.device), dtype=plan.dtype_name) as found:
                return load_mended(student, found.tensors, dtype=plan.dtype, device=plan.device)

        self.trials.judge.weights.change(load)
        self.trials.mended = mask
        for judge in (self.trials.judge, self.trials.held_out):
            judge.rebase(mask)
