"""The commands of `llmdrop`: each makes values of its arguments, calls the library and prints."""

import glob
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tqdm import tqdm

from llmdrop_vllm.artifacts import MASK_FILE, Provenance, Record, Scores, read_record, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli.console import show_inspection, show_next, show_scores, show_selection
from llmdrop_vllm.data.calibration import EMBEDDED, load_calibration
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import InputError, MaskError, OutputError
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.dialects import windows_of
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.orders import Deepest, MostImportant, Random
from llmdrop_vllm.selection.selection import Consecutive, KVBudget, Method, Ranked, Selection, iterative
from llmdrop_vllm.selection.selection import select as select_mask
from llmdrop_vllm.writing.plan import SurgeryPlan, plan_surgery
from llmdrop_vllm.writing.staging import check_free
from llmdrop_vllm.writing.write import write_checkpoint


def fetch(args: Namespace) -> None:
    """`llmdrop fetch`."""
    from llmdrop_vllm.fetching.fetch import fetch as fetch_model

    found = fetch_model(args.what, args.out, overwrite=args.overwrite)
    show_next(found, "drop", args.what if args.out is None else found, "OUT", "--attention", 4)


def score(args: Namespace) -> None:
    """`llmdrop score`."""
    check_new(args.out, args.overwrite)
    checkpoint = opened(args)
    scores = run_scoring(checkpoint, calibration_of(checkpoint, args), args, args.out)
    write_record(scores, args.out)
    forget(args.out)
    show_scores(scores)
    show_next(args.out, "select", args.out, "--attention", 4, "--out", "mask.json")


def select(args: Namespace) -> None:
    """`llmdrop select`."""
    check_new(args.out, args.overwrite)
    scores = read_record(Scores, args.scores)
    chosen = selection_of(scores, args)
    write_record(chosen_file(chosen, scores), args.out)
    forget(args.out)
    show_selection(chosen)
    show_next(args.out, "apply", scores.provenance.model.path, "OUT", "--mask", args.out)


def apply(args: Namespace) -> None:
    """`llmdrop apply`."""
    check_free(args.out, overwrite=args.overwrite)
    checkpoint = Checkpoint.open(args.model)
    file = given_mask(args, checkpoint)
    plan = plan_of(args, checkpoint, None if file is None else file.mask)
    write_plan(plan, args, {} if file is None else {MASK_FILE: file})


def convert(args: Namespace) -> None:
    """`llmdrop convert`."""
    check_free(args.out, overwrite=args.overwrite)
    if args.dialect is None and not args.renumber:
        raise InputError("nothing to convert: give --dialect, --renumber or both")
    write_plan(plan_surgery(args.model, dialect=args.dialect, keep_dropped=True, renumber=args.renumber), args)


def inspect(args: Namespace) -> None:
    """`llmdrop inspect`."""
    from llmdrop_vllm.evaluation.inspection import inspect_checkpoint

    file = given_mask(args, checkpoint := Checkpoint.open(args.model))
    asked = {"memory_bytes": args.memory, "context": args.context, "chunk": args.max_num_batched_tokens}
    wide, mask = args.kv_dtype_skip_layers, None if file is None else file.mask
    found = inspect_checkpoint(checkpoint, mask, kv_dtype=args.kv_dtype, kv_wide=wide, **asked)
    if args.json:
        print(found.model_dump_json(indent=2))
    else:
        show_inspection(found)


def adapter(args: Namespace) -> None:
    """`llmdrop adapter`."""
    from llmdrop_vllm.writing.adapters import strip_adapter

    checkpoint = Checkpoint.open(args.model)
    if not checkpoint.mask:
        raise MaskError(f"{checkpoint.directory} drops nothing; name the dropped model that the adapter is to serve")
    kept, gone = strip_adapter(checkpoint.under(checkpoint.mask), args.lora, args.out)
    print(f"{args.out}: {kept} tensors of {args.lora}, without {gone} for what is gone ({checkpoint.mask.summary()})")


def opened(args: Namespace) -> Checkpoint:
    """The model, with the windows that the arguments ask for beside those of its config."""
    return Checkpoint.open(args.model).seeing(windows_of(args.window_attention, args.window))


def given_mask(args: Namespace, checkpoint: Checkpoint) -> MaskFile | None:
    """The mask that the arguments name or list, windows on top; None where they say nothing: the model's own stands."""
    windows = windows_of(args.window_attention, args.window)
    if args.mask is not None:
        if args.attention or args.mlp:
            raise InputError("--mask and --attention/--mlp exclude each other")
        file = read_record(MaskFile, args.mask)
        if not args.other_model:
            _check_same_model(file, checkpoint, args.mask)
    elif args.attention or args.mlp or windows:
        given = DropMask(checkpoint.mask.num_hidden_layers, args.attention, args.mlp)
        mask = given or checkpoint.mask
        file = MaskFile.of(mask, "given on the command line", Provenance.of(checkpoint))
    else:
        return None
    return file.model_copy(update={"windows": file.mask.seeing(windows).windows})


def calibration_of(checkpoint: Checkpoint, args: Namespace) -> Calibration:
    """The tokens that the arguments ask to score with."""
    amount = {"samples": args.samples, "seq_len": args.seq_len, "seed": args.seed}
    return load_calibration(checkpoint, args.data or EMBEDDED, **amount)


def run_scoring(
    checkpoint: Checkpoint, calibration: Calibration, args: Namespace, out: Path, mask: DropMask | None = None
) -> Scores:
    """Score with the arguments' device and dtype, hidden states beside `out`."""
    from llmdrop_vllm.healing.importance import after_healing, check_can_heal
    from llmdrop_vllm.scoring.scoring import score as score_checkpoint

    how = {"device": args.device, "dtype": args.dtype, "progress": True}
    if args.after_healing:
        check_can_heal(checkpoint, calibration)  # refused before the scores, which may take hours
        plain = Namespace(**{**vars(args), "after_healing": False})
        scores = scored_or_kept("before-healing", checkpoint, calibration, plain, out, mask)
        return after_healing(scores, checkpoint, calibration, scratch=beside(out, "healing-scores"), **how)
    return score_checkpoint(checkpoint, calibration, mask=mask, scratch=beside(out, "scratch"), **how)


def beside(out: Path, what: str) -> Path:
    """A hidden place next to `out` for what an interrupted command has done already."""
    return out.absolute().with_name(f".{out.name}.llmdrop-{what}")


def forget(out: Path) -> None:
    """Remove what `scored_or_kept` wrote beside `out`, once the command has come to its end."""
    for path in out.absolute().parent.glob(f".{glob.escape(out.name)}.llmdrop-*.json*"):
        path.unlink()


def scored_or_kept(
    name: str,
    checkpoint: Checkpoint,
    calibration: Calibration,
    args: Namespace,
    out: Path,
    mask: DropMask | None = None,
) -> Scores:
    """The scores that an earlier run of the same command left beside `out`, or new ones, which are left there."""
    path = beside(out, f"{name}.json")
    scores = _kept_scores(path, checkpoint, calibration, args, mask)
    if scores is None:
        scores = run_scoring(checkpoint, calibration, args, out, mask)
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
    found = (where.model.fingerprint, where.data, f"torch.{where.dtype}", scores.dropped, scores.after_healing)
    gone = checkpoint.mask if mask is None else mask
    asked = (checkpoint.fingerprint, calibration.identity, str(dtype), gone, args.after_healing)
    return scores if found == asked else None


def methods_of(args: Namespace) -> list[Method]:
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


def selection_of(
    scores: Scores, args: Namespace, checkpoint: Checkpoint | None = None, calibration: Calibration | None = None
) -> Selection:
    """The mask that the arguments ask for."""
    methods = methods_of(args)
    if not args.iterative:
        return select_mask(scores, *methods, protect=args.protect, mixers=args.mixers)
    select_mask(scores, *methods, protect=args.protect, mixers=args.mixers)  # refused before the model is opened
    if checkpoint is None:
        checkpoint = Checkpoint.open(args.model or scores.provenance.model.path)
        check_scored(scores, checkpoint)
    calibration = calibration or _scored_data(scores, checkpoint)
    args.dtype = scores.provenance.dtype
    args.after_healing = scores.after_healing

    def rescore(mask: DropMask) -> Scores:
        gone = len(mask.attention) + len(mask.mlp)
        return scored_or_kept(f"without-{gone}", checkpoint, calibration, args, args.out, mask)

    ranked = (each for each in methods if isinstance(each, Ranked))
    return iterative(scores, rescore, *ranked, protect=args.protect, mixers=args.mixers)


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


def chosen_file(chosen: Selection, scores: Scores) -> MaskFile:
    """A mask with the provenance of the scores that it was chosen by."""
    origin = Provenance(model=scores.provenance.model, data=scores.provenance.data)
    return MaskFile.of(chosen.mask, chosen.method, origin)


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


def plan_of(args: Namespace, checkpoint: Checkpoint, mask: DropMask | None) -> SurgeryPlan:
    """What the arguments ask to write."""
    how = {"portable": args.portable, "config_only": args.config_only, "renumber": args.renumber}
    return plan_surgery(checkpoint, mask, dialect=args.dialect, **how)


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
