"""How a command scores, and the mask that it chooses by scores."""

import glob
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from llmdrop_vllm.artifacts import ModelIdentity, Provenance, Scores, read_record, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.calibration import EMBEDDED, load_calibration
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import InputError, MaskError
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.orders import Deepest, MostImportant, Random
from llmdrop_vllm.selection.selection import Consecutive, KVBudget, Method, Ranked, Selection, iterative, select


@dataclass(frozen=True)
class Scoring:
    """How a command scores; what it has done already lies beside `out` if it is interrupted."""

    checkpoint: Checkpoint
    calibration: Calibration
    out: Path
    device: str | None
    dtype: str | None
    after_healing: bool

    @classmethod
    def asked(cls, checkpoint: Checkpoint, args: Namespace, out: Path, data: Calibration | None = None) -> Self:
        """As the arguments say, on other data than theirs if some is given."""
        if data is None:
            amount = {"samples": args.samples, "seq_len": args.seq_len, "seed": args.seed}
            data = load_calibration(checkpoint, args.data or EMBEDDED, **amount)
        return cls(checkpoint, data, out, args.device, args.dtype, args.after_healing)

    def run(self, mask: DropMask | None = None) -> Scores:
        """Score under a mask, by default the model's own."""
        from llmdrop_vllm.healing.importance import after_healing, check_can_heal
        from llmdrop_vllm.scoring.scoring import score as score_checkpoint

        what = (self.checkpoint, self.calibration)
        how: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "progress": True}
        if self.after_healing:
            check_can_heal(*what)  # refused before the scores, which may take hours
            scores = replace(self, after_healing=False).kept("before-healing", mask)
            return after_healing(scores, *what, scratch=beside(self.out, "healing-scores"), **how)
        return score_checkpoint(*what, mask=mask, scratch=beside(self.out, "scratch"), **how)

    def kept(self, name: str, mask: DropMask | None = None) -> Scores:
        """The scores that an earlier run of the same command left, or new ones, which are left there."""
        path = beside(self.out, f"{name}.json")
        with suppress(InputError):
            if self._gave(found := read_record(Scores, path), self.checkpoint.mask if mask is None else mask):
                return found
        found = self.run(mask)
        write_record(found, path)
        return found

    def _gave(self, scores: Scores, gone: DropMask) -> bool:
        from llmdrop_vllm.scoring.scoring import precision

        origin, (_, dtype) = scores.provenance, precision(self.checkpoint, self.device, self.dtype)
        found = (origin.model.fingerprint, origin.data, f"torch.{origin.dtype}", scores.dropped, scores.after_healing)
        weights, data = self.checkpoint.fingerprint, self.calibration.identity
        return found == (weights, data, str(dtype), gone, self.after_healing)


def beside(out: Path, what: str) -> Path:
    """A hidden place next to `out` for what an interrupted command has done already."""
    return out.absolute().with_name(f".{out.name}.llmdrop-{what}")


def forget(out: Path) -> None:
    """Remove the scores that were kept beside `out`, once the command has come to its end."""
    for path in out.absolute().parent.glob(f".{glob.escape(out.name)}.llmdrop-*.json*"):
        path.unlink()


def methods_of(args: Namespace) -> list[Method]:
    """The methods that the command line asks for, in the order of its help."""
    ranked = partial(Ranked, args.kind or "attention")
    padding = not args.allow_padding
    asked: list[tuple[Any, Callable[[Any], Method]]] = [
        (args.attention, partial(Ranked, "attention", avoid_padding=padding)),
        (args.mlp, partial(Ranked, "mlp", avoid_padding=padding)),
        (args.blocks, partial(Ranked, "blocks", avoid_padding=padding)),
        (args.consecutive, Consecutive),
        (args.joint, partial(Ranked, "joint")),
        (args.last, partial(ranked, order=Deepest(args.keep_last_layer))),
        (args.random, partial(ranked, order=Random(args.seed))),
        (args.least, partial(ranked, order=MostImportant())),
        (args.kv_budget, partial(KVBudget.parse, avoid_padding=padding)),
    ]
    found = [method(value) for value, method in asked if value is not None]
    if args.iterative and not all(isinstance(method, Ranked) for method in found):
        raise MaskError("--iterative drops one at a time; --consecutive and --kv-budget cannot")
    if args.kind is not None and args.last is args.random is args.least is None:
        raise MaskError("--kind says what --last, --random or --least drop, and none of them is given")
    if args.keep_last_layer and args.last is None:
        raise MaskError("--keep-last-layer belongs to --last, which is not given")
    return found


def selected(scores: Scores, args: Namespace) -> Selection:
    """The mask that the arguments ask for, by one set of scores."""
    return select(scores, *methods_of(args), protect=args.protect, mixers=args.mixers)


def selection_of(scores: Scores, args: Namespace, scoring: Scoring | None = None) -> Selection:
    """The mask that the arguments ask for; with --iterative scored anew on the way, by default as the scores were."""
    chosen = selected(scores, args)
    if not args.iterative:
        return chosen
    again = scoring or _scoring_of(scores, args)

    def rescore(mask: DropMask) -> Scores:
        return again.kept(f"without-{len(mask.attention) + len(mask.mlp)}", mask)

    ranked = (each for each in methods_of(args) if isinstance(each, Ranked))
    return iterative(scores, rescore, *ranked, protect=args.protect, mixers=args.mixers)


def checked(scores: Scores, checkpoint: Checkpoint) -> Scores:
    """The same. Raises MaskError for scores of other weights."""
    scored = scores.provenance.model.fingerprint
    if checkpoint.fingerprint != scored:
        raise MaskError(f"{checkpoint.directory} has the weights {checkpoint.fingerprint}; the scores are of {scored}")
    return scores


def other_weights(theirs: ModelIdentity, checkpoint: Checkpoint) -> str:
    """For an error: whose weights something is of, and that the checkpoint has others."""
    own = f"{checkpoint.directory} has other weights ({checkpoint.fingerprint})"
    return f"{theirs.path} (weights {theirs.fingerprint}), and {own}"


def _scoring_of(scores: Scores, args: Namespace) -> Scoring:
    """How the scores of a file were measured. Raises MaskError where that cannot be repeated."""
    origin = scores.provenance
    checkpoint = Checkpoint.open(args.model or origin.model.path)
    checked(scores, checkpoint)
    if (data := origin.data) is None:
        raise MaskError("the scores do not say which data they were measured on, so they cannot be measured again")
    again = load_calibration(checkpoint, data.source, samples=data.sequences, seq_len=data.seq_len, seed=data.seed)
    if again.identity.sha256 != data.sha256:
        raise MaskError(f"{data.source} gives other tokens than when the scores were measured")
    return Scoring(checkpoint, again, args.out, args.device, origin.dtype, scores.after_healing)


def mask_file(mask: DropMask, method: str, measured: Provenance) -> MaskFile:
    """A mask with the provenance of what it was chosen by."""
    return MaskFile.of(mask, method, Provenance(model=measured.model, data=measured.data))
