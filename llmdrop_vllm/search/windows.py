"""Which layers do with a window: those without whose far sight least is lost, each alone, on long texts.

What layers lose alone tells nearly what they lose together, unlike with dropped ones: going on greedily with what is
windowed already gave nothing more, nor did texts that hide numbers (benchmarks/results/README.md, "Windows").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llmdrop_vllm.artifacts import DataIdentity, sha256
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.answers import is_answers
from llmdrop_vllm.data.calibration import EMBEDDED, load_calibration
from llmdrop_vllm.data.growing import Header, appended
from llmdrop_vllm.data.tokens import Calibration, TokenIds
from llmdrop_vllm.errors import DataError, MaskError
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.masks.stretches import STRETCH, span
from llmdrop_vllm.search.judge import Judging
from llmdrop_vllm.search.states import takers, windowed
from llmdrop_vllm.search.trials import Trial, Trials, verdict

EVENLY, ALONE = "evenly spread", "least lost alone"
LONG_TEXTS, TIMES_THE_WINDOW = 6, 4


class WindowsHeader(Header):
    """What layers are judged by, whatever number of them is asked for."""

    kind: str = "llmdrop-windows"
    texts: DataIdentity
    held_out: DataIdentity
    window: int
    start: DropMask


@dataclass(frozen=True)
class WindowsPlan:
    """Windows of so many tokens in attention of a checkpoint, chosen by some texts and compared on those held out.

    `enough` says of a mask whether it has as many as are wanted. Raises MaskError where no layer takes such a window,
    DataError for texts whose tokens all see everything.
    """

    judging: Judging
    window: int
    enough: Callable[[DropMask], bool]

    @cached_property
    def layers(self) -> list[int]:
        """Those that may have one. Raises MaskError where there is none."""
        return takers(self.judging.checkpoint, self.window)

    def mask(self, layers: Sequence[int]) -> DropMask:
        """The checkpoint's, with windows there beside those that it has."""
        return windowed(self.judging.checkpoint.mask, layers, self.window)

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
    layers, its = plan.layers, plan.judging
    plan.first_that_is_enough(layers)  # what all of them do not give is refused before anything slow
    header = WindowsHeader(
        texts=its.answers.identity,
        held_out=its.held_out.identity,
        window=plan.window,
        start=its.checkpoint.mask,
        provenance=its.provenance,
    )
    with (
        appended(trials_file, header, Trial) as file,
        its.judges() as judges,
        tqdm(total=len(layers) + 2, unit="mask", disable=not progress) as bar,
    ):
        trials = Trials(*judges, file)
        alone = []
        for layer in layers:
            bar.set_description(f"layer {layer} alone")
            alone.append(trials.on_answers(plan.mask([layer])).mean)
            bar.update()
        chosen = plan.first_that_is_enough([layers[place] for place in np.argsort(alone, kind="stable")])
        places = np.linspace(0, len(layers) - 1, len(chosen) + 2)[1:-1] if len(chosen) < len(layers) else ()
        spread = [layers[round(place)] for place in places] or chosen
        losses = {}
        for name, windows in ((EVENLY, spread), (ALONE, chosen)):
            bar.set_description(name)
            losses[name] = trials.on_answers(plan.mask(windows)), trials.on_held_out(plan.mask(windows))
            bar.update()
    return verdict(losses, its, "windows by KL on long texts", len(layers) + 2)


def long_texts(
    checkpoint: Checkpoint,
    data: str | None,
    window: int,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
) -> tuple[Calibration, Calibration]:
    """Those to choose by, and the last third: of text as long ones as show what is out of sight; token ids and answers
    as they are. The tokens that count are those that do not see everything.

    Raises DataError for one text, and for texts that are shorter than what is seen.
    """
    data = data or EMBEDDED
    if not (data.endswith(".json") or is_answers(Path(data))):
        enough = max(TIMES_THE_WINDOW * window, 3 * (STRETCH + span(window)))
        samples, seq_len = samples or LONG_TEXTS, seq_len or min(enough, checkpoint.context or enough)
    texts = load_calibration(checkpoint, data, samples=samples, seq_len=seq_len, seed=seed)
    if len(texts.sequences) < 2:
        raise DataError("one text was given; layers are chosen by some, and compared on others")
    seen = _seen_in_full(checkpoint, window)
    if (shortest := min(map(len, texts.sequences))) <= seen + 1:
        raise DataError(f"texts of {shortest} tokens see everything under windows of {window}; take longer")
    held_out = -(-len(texts.sequences) // 3)

    def part(sequences: tuple[TokenIds, ...]) -> Calibration:
        hashed = sha256(each.tolist() for each in sequences)
        tokens = {"sequences": len(sequences), "tokens": sum(map(len, sequences)), "sha256": hashed}
        return Calibration(sequences, texts.identity.model_copy(update=tokens), starts=(seen,) * len(sequences))

    return part(texts.sequences[:-held_out]), part(texts.sequences[-held_out:])


def _seen_in_full(checkpoint: Checkpoint, window: int) -> int:
    """Tokens at a text's beginning that see everything, whichever layer has the window."""
    masks = {layer: windowed(checkpoint.mask, [layer], window) for layer in takers(checkpoint, window)}
    layouts = ((layer, mask, checkpoint.decoder.layout(mask)) for layer, mask in masks.items())
    kinds = (layout.kinds[mask.kept_attention.index(layer)] for layer, mask, layout in layouts)
    return max((kind.seen_in_full or 0 for kind in kinds), default=0)
