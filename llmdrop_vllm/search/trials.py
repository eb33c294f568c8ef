"""Masks that were judged, each once, and kept in a file, so that a search that is asked again takes the way it took."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from llmdrop_vllm.artifacts import DataIdentity, Record
from llmdrop_vllm.data.growing import Growing, Header, read_grown
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.judge import Judge

RESAMPLES = 2000


class SearchHeader(Header):
    """What masks are judged by, whatever is searched for and with what seed. `tokens` are those of each answer."""

    kind: str = "llmdrop-search"
    answers: DataIdentity
    tokens: tuple[int, ...]
    held_out: DataIdentity
    to_heal: DataIdentity | None
    start: DropMask

    def differs_in(self, other: Self) -> str:
        """The same tokens are the same answers, wherever their file is."""
        named = {}
        for name in ("answers", "held_out", "to_heal"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours and theirs:
                named[name] = ours.model_copy(update={"source": theirs.source})
        return Header.differs_in(self.model_copy(update=named), other)


class Trial(Record):
    """A mask that was judged: by sequence, the mean KL of its answer's tokens to the full model's, in nats. `mended`:
    the mask whose loss had been healed before.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    windows: tuple[tuple[int, int], ...] = ()
    mended: DropMask | None = None
    held_out: bool = False
    kl: dict[int, float]


@dataclass(frozen=True)
class Loss:
    """KL by sequence and the tokens of each, [sequences]."""

    kl: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Per token."""
        return float(self.kl @ self.tokens / self.tokens.sum())

    def interval(self, other: "Loss | None" = None) -> tuple[float, float]:
        """95% of the mean, or of its difference to another's on the same sequences, by bootstrap over these."""
        kl = self.kl if other is None else self.kl - other.kl
        rng = np.random.default_rng(0)
        drawn = rng.integers(len(kl), size=(RESAMPLES, len(kl)))
        means = (kl * self.tokens)[drawn].sum(1) / self.tokens[drawn].sum(1)
        low, high = np.quantile(means, (0.025, 0.975))
        return float(low), float(high)


@dataclass(frozen=True)
class Searched:
    """What a file of trials says of the masks that were judged on all answers: mask and KL, in nats per token."""

    header: SearchHeader
    masks: tuple[tuple[DropMask, float], ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises DataError naming the line that cannot be used."""
        header, trials = read_grown(path, SearchHeader, Trial, "llmdrop search")
        known: dict[tuple[object, ...], dict[int, float]] = {}
        masks = {}
        for each in trials:
            if not (each.held_out or each.mended):
                known.setdefault(_key(each), {}).update(each.kl)
                masks[_key(each)] = replace(header.start, attention=each.attention, mlp=each.mlp, windows=each.windows)
        tokens = np.array(header.tokens)
        whole = {key: kl for key, kl in known.items() if len(kl) == len(tokens)}
        means = {key: Loss(np.array([kl[n] for n in range(len(tokens))]), tokens).mean for key, kl in whole.items()}
        return cls(header, tuple((masks[key], mean) for key, mean in means.items()))


class EnoughError(Exception):
    """As many masks were judged, or as much time has passed, as a search was given."""


@dataclass
class Trials:
    """What two judges say, one of them on held-out answers; nothing that the file has is computed again.

    Raises EnoughError for another mask when `most` were judged, or one that is not in the file after `seconds`.
    """

    judge: Judge
    held_out: Judge
    file: Growing[SearchHeader, Trial]
    most: int
    seconds: float = math.inf
    on_trial: Callable[[], object] = lambda: None
    mended: DropMask | None = None
    asked: set[tuple[object, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.known: dict[tuple[object, ...], dict[int, float]] = {}
        for each in self.file.found:
            self.known.setdefault(_key(each), {}).update(each.kl)

    def on_answers(self, mask: DropMask, every: int = 1, *, anyway: bool = False) -> Loss:
        """By the answers to learn from, or by one chunk of them in so many; `anyway`: though there were enough."""
        return self._loss(self.judge, mask, every, held_out=False, anyway=anyway)

    def on_held_out(self, mask: DropMask) -> Loss:
        """By the answers that nothing is learnt from."""
        return self._loss(self.held_out, mask, 1, held_out=True, anyway=True)

    def _loss(self, judge: Judge, mask: DropMask, every: int, *, held_out: bool, anyway: bool) -> Loss:
        trial = Trial(
            attention=mask.attention,
            mlp=mask.mlp,
            windows=mask.windows,
            mended=self.mended,
            held_out=held_out,
            kl={},
        )
        key, chunks = _key(trial), judge.batches.chunks
        kl = self.known.setdefault(key, {})
        numbers = range(0, len(chunks), every)
        missing = [number for number in numbers if chunks[number].first_sequence not in kl]
        if not anyway and key not in self.asked:
            if len(self.asked) == self.most or (missing and time.monotonic() > self.end):
                raise EnoughError
            self.asked.add(key)
            self.on_trial()
        if missing:
            found = judge.divergences(mask, missing)
            kl.update(found)
            self.file.append([trial.model_copy(update={"kl": found})])
        sequences = [chunks[number].first_sequence + row for number in numbers for row in range(chunks[number].batch)]
        return Loss(np.array([kl[each] for each in sequences]), judge.tokens[sequences])


def _key(trial: Trial) -> tuple[object, ...]:
    """Masks that drop the same in another order are one."""
    gone = frozenset(trial.attention), frozenset(trial.mlp)
    return trial.held_out, trial.mended and trial.mended.dropped, *gone, trial.windows
