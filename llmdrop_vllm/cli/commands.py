"""The commands of `llmdrop`: each makes values of its arguments, calls the library and prints."""

import glob
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tqdm import tqdm

from llmdrop_vllm.artifacts import (
    MASK_FILE,
    SCORES_FILE,
    MaskFile,
    ModelIdentity,
    Provenance,
    Record,
    Scores,
    read_record,
    write_record,
)
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli.console import show_inspection, show_scores, show_selection
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import InputError, MaskError, OutputError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.orders import Deepest, MostImportant, Random
from llmdrop_vllm.selection.selection import Consecutive, KVBudget, Method, Ranked, Selection, iterative
from llmdrop_vllm.selection.selection import select as select_mask
from llmdrop_vllm.writing.plan import SurgeryPlan, plan_surgery
from llmdrop_vllm.writing.staging import check_free
from llmdrop_vllm.writing.write import check_destination, write_checkpoint

OWN_ANSWERS = "answers"  # of `--heal`: the full model is asked


def fetch(args: Namespace) -> None:
    """`llmdrop fetch`."""
    from llmdrop_vllm.fetching.fetch import fetch as fetch_model

    found = fetch_model(args.what, args.out, overwrite=args.overwrite)
    print(f"{found} is a checkpoint; next: llmdrop drop {args.what if args.out is None else found} OUT --attention 4")


def score(args: Namespace) -> None:
    """`llmdrop score`."""
    check_new(args.out, args.overwrite)
    checkpoint = Checkpoint.open(args.model)
    scores = run_scoring(checkpoint, calibration_of(checkpoint, args), args, args.out)
    write_record(scores, args.out)
    show_scores(scores)
    print(f"written to {args.out}; next: llmdrop select {args.out} --attention 4 --out mask.json")


def select(args: Namespace) -> None:
    """`llmdrop select`."""
    check_new(args.out, args.overwrite)
    scores = read_record(Scores, args.scores)
    chosen = _select(scores, args)
    write_record(_chosen_file(chosen, scores), args.out)
    _forget(args.out)
    show_selection(chosen)
    print(f"written to {args.out}; next: llmdrop apply {scores.provenance.model.path} OUT --mask {args.out}")


def apply(args: Namespace) -> None:
    """`llmdrop apply`."""
    check_free(args.out, overwrite=args.overwrite)
    checkpoint = Checkpoint.open(args.model)
    file = given_mask(args, checkpoint)
    plan = _plan(args, checkpoint, None if file is None else file.mask)
    write_plan(plan, args, {} if file is None else {MASK_FILE: file})


def drop(args: Namespace) -> None:
    """`llmdrop drop`: scores and mask stay with the new checkpoint, for whoever asks what was dropped and why."""
    checkpoint = Checkpoint.open(args.model)
    # What cannot be chosen or written is refused before the scores, which may take hours.
    possible = select_mask(Scores.unmeasured(checkpoint), *_methods(args), protect=args.protect).mask
    check_destination(_plan(args, checkpoint, possible), args.out, overwrite=args.overwrite)
    if args.heal is not None and args.config_only:
        raise InputError("--heal changes weights, and --config-only links to MODEL's; give one of them")
    calibration = calibration_of(checkpoint, args)
    scores = _scored_or_kept("scores", checkpoint, calibration, args)
    chosen = _select(scores, args, checkpoint, calibration)
    show_selection(chosen)
    plan = _plan(args, checkpoint, chosen.mask)
    records: dict[str, Record] = {SCORES_FILE: scores, MASK_FILE: _chosen_file(chosen, scores)}
    if args.heal is None:
        write_plan(plan, args, records)
    else:
        _write_healed(plan, args, records)
    _forget(args.out)


def _write_healed(plan: SurgeryPlan, args: Namespace, records: Mapping[str, Record]) -> None:
    """`llmdrop drop --heal`: what remains learns from the full model's answers, or from what the argument names."""
    from llmdrop_vllm.cli.healing_commands import healing, healing_data
    from llmdrop_vllm.healing.records import HEAL_FILE

    checkpoint, source = plan.masked.checkpoint, args.heal
    if source == OWN_ANSWERS:
        from llmdrop_vllm.cli.evaluation_commands import ask

        path = beside(args.out, "answers.jsonl")
        if not path.exists():
            ask(checkpoint, path, args)
        source = str(path)
    args.samples = args.seq_len = None  # of the scores' data
    data = healing_data(checkpoint, source, args)
    with healing(plan.masked, checkpoint.under(checkpoint.mask), data, args) as found:
        write_plan(plan.healed(found.tensors), args, {**records, HEAL_FILE: found.record})
    print(found.record.summary())


def convert(args: Namespace) -> None:
    """`llmdrop convert`."""
    check_free(args.out, overwrite=args.overwrite)
    write_plan(plan_surgery(args.model, dialect=args.dialect, keep_dropped=True), args)


def inspect(args: Namespace) -> None:
    """`llmdrop inspect`."""
    from llmdrop_vllm.evaluation.inspection import inspect_checkpoint

    found = inspect_checkpoint(
        Checkpoint.open(args.model), memory_bytes=args.memory, kv_dtype=args.kv_dtype, context=args.context
    )
    if args.json:
        print(found.model_dump_json(indent=2))
    else:
        show_inspection(found)


def given_mask(args: Namespace, checkpoint: Checkpoint) -> MaskFile | None:
    """The mask that the arguments name or list; None where they say nothing, and the model's own stands."""
    if args.mask is not None:
        if args.attention or args.mlp:
            raise InputError("--mask and --attention/--mlp exclude each other")
        file = read_record(MaskFile, args.mask)
        if not args.other_model:
            _check_same_model(file, checkpoint, args.mask)
        return file
    if not (args.attention or args.mlp):
        return None
    mask = DropMask(checkpoint.mask.num_hidden_layers, args.attention, args.mlp)
    return MaskFile.of(mask, "given on the command line", Provenance(model=ModelIdentity.of(checkpoint)))


def calibration_of(checkpoint: Checkpoint, args: Namespace) -> Calibration:
    """The tokens that the arguments ask to score with."""
    return load_calibration(checkpoint, args.data, samples=args.samples, seq_len=args.seq_len, seed=args.seed)


def run_scoring(
    checkpoint: Checkpoint, calibration: Calibration, args: Namespace, out: Path, mask: DropMask | None = None
) -> Scores:
    """Score with the arguments' device and dtype, hidden states beside `out`."""
    from llmdrop_vllm.scoring.scoring import score as score_checkpoint

    return score_checkpoint(
        checkpoint,
        calibration,
        mask=mask,
        device=args.device,
        dtype=args.dtype,
        scratch=beside(out, "scratch"),
        progress=True,
    )


def beside(out: Path, what: str) -> Path:
    """A hidden place next to `out` for what an interrupted command has done already."""
    return out.absolute().with_name(f".{out.name}.llmdrop-{what}")


def _forget(out: Path) -> None:
    """Remove what `_scored_or_kept` wrote beside `out`, once the command has come to its end."""
    for path in out.absolute().parent.glob(f".{glob.escape(out.name)}.llmdrop-*.json*"):
        path.unlink()


def _scored_or_kept(
    name: str, checkpoint: Checkpoint, calibration: Calibration, args: Namespace, mask: DropMask | None = None
) -> Scores:
    """The scores that an earlier run of the same command left beside OUT, or new ones, which are left there."""
    path = beside(args.out, f"{name}.json")
    scores = _kept_scores(path, checkpoint, calibration, args, mask)
    if scores is None:
        scores = run_scoring(checkpoint, calibration, args, args.out, mask)
        write_record(scores, path)
    return scores


def _kept_scores(
    path: Path, checkpoint: Checkpoint, calibration: Calibration, args: Namespace, mask: DropMask | None
) -> Scores | None:
    from llmdrop_vllm.scoring.scoring import precision

    try:
        scores = read_record(Scores, path)
    except InputError:
        return None
    where, (_, dtype) = scores.provenance, precision(checkpoint, args.device, args.dtype)
    found = (where.model.fingerprint, where.data, f"torch.{where.dtype}", scores.dropped)
    asked = (checkpoint.fingerprint, calibration.identity, str(dtype), checkpoint.mask if mask is None else mask)
    return scores if found == asked else None


def _methods(args: Namespace) -> list[Method]:
    """The methods that the command line asks for, in the order of its help."""
    padding = not args.allow_padding
    found: list[Method] = []
    for kind in ("attention", "mlp", "blocks"):
        if (count := getattr(args, kind)) is not None:
            found.append(Ranked(kind, count, avoid_padding=padding))
    if args.consecutive is not None:
        found.append(Consecutive(args.consecutive))
    if args.joint is not None:
        found.append(Ranked("joint", args.joint))
    for count, order in (
        (args.last, Deepest(args.keep_last_layer)),
        (args.random, Random(args.seed)),
        (args.least, MostImportant()),
    ):
        if count is not None:
            found.append(Ranked(args.kind or "attention", count, order))
    if args.kv_budget is not None:
        found.append(KVBudget.parse(args.kv_budget, padding))
    if args.iterative and not all(isinstance(method, Ranked) for method in found):
        raise MaskError("--iterative drops one at a time; --consecutive and --kv-budget cannot")
    if args.kind is not None and args.last is args.random is args.least is None:
        raise MaskError("--kind says what --last, --random or --least drop, and none of them is given")
    if args.keep_last_layer and args.last is None:
        raise MaskError("--keep-last-layer belongs to --last, which is not given")
    return found


def _select(
    scores: Scores, args: Namespace, checkpoint: Checkpoint | None = None, calibration: Calibration | None = None
) -> Selection:
    methods = _methods(args)
    if not args.iterative:
        return select_mask(scores, *methods, protect=args.protect)
    select_mask(scores, *methods, protect=args.protect)  # refused before the model is opened
    if checkpoint is None:
        checkpoint = Checkpoint.open(args.model or scores.provenance.model.path)
        check_scored(scores, checkpoint)
    calibration = calibration or _scored_data(scores, checkpoint)
    args.dtype = scores.provenance.dtype

    def rescore(mask: DropMask) -> Scores:
        gone = len(mask.attention) + len(mask.mlp)
        return _scored_or_kept(f"without-{gone}", checkpoint, calibration, args, mask)

    return iterative(scores, rescore, *(each for each in methods if isinstance(each, Ranked)), protect=args.protect)


def check_scored(scores: Scores, checkpoint: Checkpoint) -> None:
    """Raise MaskError for scores of other weights."""
    scored = scores.provenance.model.fingerprint
    if checkpoint.fingerprint != scored:
        raise MaskError(f"{checkpoint.directory} has the weights {checkpoint.fingerprint}; the scores are of {scored}")


def _scored_data(scores: Scores, checkpoint: Checkpoint) -> Calibration:
    data = scores.provenance.data
    if data is None:
        raise MaskError("the scores do not say which data they were measured on, so they cannot be measured again")
    again = load_calibration(checkpoint, data.source, samples=data.sequences, seq_len=data.seq_len, seed=data.seed)
    if again.identity.sha256 != data.sha256:
        raise MaskError(f"{data.source} gives other tokens than when the scores were measured")
    return again


def _chosen_file(chosen: Selection, scores: Scores) -> MaskFile:
    measured = scores.provenance
    return MaskFile.of(chosen.mask, chosen.method, Provenance(model=measured.model, data=measured.data))


def _check_same_model(file: MaskFile, checkpoint: Checkpoint, path: Path) -> None:
    if file.provenance is not None and file.provenance.model.fingerprint != checkpoint.fingerprint:
        chosen_for = file.provenance.model
        raise MaskError(
            f"{path} was chosen for {chosen_for.path} (weights {chosen_for.fingerprint}), and {checkpoint.directory} "
            f"has other weights ({checkpoint.fingerprint}); --other-model takes it all the same"
        )


def check_new(path: Path, overwrite: bool) -> None:
    """Raise OutputError for a file that cannot be written, or that is there and was not meant to be replaced."""
    if path.exists() and (path.is_dir() or not overwrite):
        hint = "choose another name" if path.is_dir() else "choose another name, or replace it with --overwrite"
        raise OutputError(f"{path} exists; {hint}")
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} is not a directory that can be written to")


def _plan(args: Namespace, checkpoint: Checkpoint, mask: DropMask | None) -> SurgeryPlan:
    return plan_surgery(checkpoint, mask, dialect=args.dialect, portable=args.portable, config_only=args.config_only)


def write_plan(plan: SurgeryPlan, args: Namespace, records: Mapping[str, Record] = MappingProxyType({})) -> None:
    """Write to OUT with progress, and say what was written."""
    for warning in plan.warnings:
        print(f"llmdrop: warning: {warning}", file=sys.stderr)
    if plan.left_out:
        print(f"left out, other copies of the weights: {', '.join(plan.left_out)}")
    with tqdm(total=plan.weight_bytes, unit="B", unit_scale=True, desc="writing") as bar:
        write_checkpoint(plan, args.out, overwrite=args.overwrite, records=records, progress=bar.update)
    gone = sum(tensor.num_bytes for tensor in plan.dropped)
    print(f"{args.out}: {plan.mask.summary()}; {gone:,} bytes of weights left out, {plan.weight_bytes:,} written")
