"""Which layers do with a window: those without whose far sight least is lost, each alone, on long texts.

What layers lose alone tells nearly what they lose together, unlike with dropped ones: going on greedily with what is
windowed already gave nothing more, nor did texts that hide numbers (benchmarks/results/README.md, "Windows").
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from llmdrop_vllm import hf
from llmdrop_vllm.artifacts import DataIdentity, Provenance, Record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.growing import Growing, Header, appended
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.mask_file import Compared, Evidence, MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.judge import Judge, Weights
from llmdrop_vllm.search.states import takers, windowed
from llmdrop_vllm.search.trials import Loss

EVENLY, ALONE = "evenly spread", "least lost alone"


class WindowsHeader(Header):
    """What layers are judged by, whatever number of them is asked for."""

    kind: str = "llmdrop-windows"
    texts: DataIdentity
    held_out: DataIdentity
    window: int
    start: DropMask


class WindowTrial(Record):
    """Layers with windows; by text, the mean KL of its tokens that do not see all before them, in nats."""

    layers: tuple[int, ...]
    held_out: bool = False
    kl: dict[int, float]


@dataclass(frozen=True)
class WindowsPlan:
    """Windows of so many tokens in attention of a checkpoint, chosen by `texts` and compared on those held out.

    `enough` says of a mask whether it has as many as are wanted. Raises MaskError where no layer takes such a window,
    DataError for texts whose tokens all see everything.
    """

    checkpoint: Checkpoint
    window: int
    enough: Callable[[DropMask], bool]
    texts: Calibration
    held_out: Calibration
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def layers(self) -> list[int]:
        """Those that may have one. Raises MaskError where there is none."""
        return takers(self.checkpoint, self.window)

    def mask(self, layers: Sequence[int]) -> DropMask:
        """The checkpoint's, with windows there beside those that it has."""
        return windowed(self.checkpoint.mask, layers, self.window)

    def first_that_is_enough(self, ranking: Sequence[int]) -> list[int]:
        """The fewest of the first layers. Raises MaskError where all of them do not suffice."""
        for count in range(1, len(ranking) + 1):
            if self.enough(self.mask(ranking[:count])):
                return [*ranking[:count]]
        raise MaskError(f"windows in all {len(ranking)} layers that take one are not enough; ask for less")


def choose_windows(plan: WindowsPlan, trials_file: Path, *, progress: bool = False) -> MaskFile:
    """The checkpoint's mask with windows, and how they compare with as many that are evenly spread.

    What was judged is kept in the trials file; a run that is asked again, for more layers or after an interruption,
    goes on with it. Raises OutputError for a file of other texts.
    """
    layers = plan.layers
    plan.first_that_is_enough(layers)  # what all of them do not give is refused before anything slow
    header = WindowsHeader(
        texts=plan.texts.identity,
        held_out=plan.held_out.identity,
        window=plan.window,
        start=plan.checkpoint.mask,
        provenance=_provenance(plan),
    )
    with (
        tempfile.TemporaryDirectory(prefix="llmdrop-") as temporary,
        appended(trials_file, header, WindowTrial) as file,
    ):
        judges = _Judges(plan, file, Path(temporary))
        with tqdm(total=len(layers) + 2, unit="mask", disable=not progress) as bar:
            alone = []
            for layer in layers:
                bar.set_description(f"layer {layer} alone")
                alone.append(judges.loss([layer]).mean)
                bar.update()
            chosen = plan.first_that_is_enough([layers[place] for place in np.argsort(alone, kind="stable")])
            places = np.linspace(0, len(layers) - 1, len(chosen) + 2)[1:-1] if len(chosen) < len(layers) else ()
            spread = [layers[round(place)] for place in places] or chosen
            compared: list[Compared] = []
            for name, its in ((EVENLY, spread), (ALONE, chosen)):
                bar.set_description(name)
                compared.append(judges.compared(name, sorted(its), compared))
                bar.update()
    best = min(compared, key=lambda each: each.held_out_kl)
    evidence = Evidence(
        judged=len(layers) + 2,
        tokens=sum(plan.texts.predicted),
        held_out_prompts=len(plan.held_out.sequences),
        held_out_tokens=sum(plan.held_out.predicted),
        heal_aware=False,
        compared=tuple(compared),
    )
    return MaskFile.of(
        plan.mask(best.windows), f"windows by KL on long texts: {best.name}", _provenance(plan), evidence
    )


class _Judges:
    """One for the texts that layers are chosen by, and one for the others; what was judged is not judged again."""

    def __init__(self, plan: WindowsPlan, file: Growing[WindowsHeader, WindowTrial], directory: Path) -> None:
        self.plan, self.file = plan, file
        self.known = {(each.layers, each.held_out): each.kl for each in file.found}
        masked = plan.checkpoint.under(plan.checkpoint.mask)
        self.weights = Weights(lambda: hf.load(masked, dtype=plan.dtype).to(plan.device).eval())
        self.directory, self.made = directory, dict[bool, Judge]()

    def loss(self, layers: Sequence[int], *, held_out: bool = False) -> Loss:
        """Of windows in these layers."""
        asked = (tuple(layers), held_out)
        if asked not in self.known:
            kl = self._judge(held_out).divergences(self.plan.mask(layers))
            self.file.append([WindowTrial(layers=asked[0], held_out=held_out, kl=kl)])
            self.known[asked] = kl
        kl, tokens = self.known[asked], (self.plan.held_out if held_out else self.plan.texts).predicted
        return Loss(np.array([kl[number] for number in sorted(kl)]), np.array(tokens))

    def compared(self, name: str, layers: list[int], before: Sequence[Compared]) -> Compared:
        """On both; the difference is to the first that was compared."""
        chosen_by, judged = self.loss(layers), self.loss(layers, held_out=True)
        base = self.loss(before[0].windows, held_out=True) if before else judged
        return Compared(
            name=name,
            attention=self.plan.checkpoint.mask.attention,
            mlp=self.plan.checkpoint.mask.mlp,
            windows=tuple(layers),
            kl=chosen_by.mean,
            held_out_kl=judged.mean,
            held_out_interval=judged.interval(),
            difference=judged.interval(base),
        )

    def _judge(self, held_out: bool) -> Judge:
        if held_out not in self.made:
            directory = self.directory / str(held_out)
            directory.mkdir()
            plan = self.plan
            data = plan.held_out if held_out else plan.texts
            self.made[held_out] = Judge(self.weights, plan.checkpoint, plan.checkpoint.mask, data, directory)
        return self.made[held_out]


def _provenance(plan: WindowsPlan) -> Provenance:
    return Provenance.of(plan.checkpoint, data=plan.texts.identity, dtype=plan.dtype, device=plan.device)
