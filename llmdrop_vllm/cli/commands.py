"""The commands of `llmdrop`: each makes values of its arguments, calls the library and prints."""

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from llmdrop_vllm.artifacts import MASK_FILE, Provenance, Record, Scores, read_record, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli.console import show_inspection, show_next, show_scores, show_selection, warn
from llmdrop_vllm.cli.scoring import Scoring, beside, forget, mask_file, other_weights, selection_of
from llmdrop_vllm.data.calibration import EMBEDDED, load_calibration
from llmdrop_vllm.errors import InputError, MaskError, OutputError
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.dialects import windows_of
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.quantizing.schemes import SCHEMES
from llmdrop_vllm.writing.plan import SurgeryPlan, plan_surgery
from llmdrop_vllm.writing.staging import check_free
from llmdrop_vllm.writing.write import write_checkpoint

NO_DATA, SEQUENCES, TOKENS = "none", 64, 512  # of `llmdrop quantize`, where it is not said how much text to take


def fetch(args: Namespace) -> None:
    """`llmdrop fetch`."""
    from llmdrop_vllm.fetching.fetch import fetch as fetch_model

    found = fetch_model(args.what, args.out, overwrite=args.overwrite)
    show_next(found, "drop", args.what if args.out is None else found, "OUT", "--attention", 4)


def score(args: Namespace) -> None:
    """`llmdrop score`."""
    check_new(args.out, args.overwrite)
    scores = Scoring.asked(opened(args), args, args.out).run()
    write_record(scores, args.out)
    forget(args.out)
    show_scores(scores)
    show_next(args.out, "select", args.out, "--attention", 4, "--out", "mask.json")


def select(args: Namespace) -> None:
    """`llmdrop select`."""
    check_new(args.out, args.overwrite)
    scores = read_record(Scores, args.scores)
    chosen = selection_of(scores, args)
    write_record(mask_file(chosen.mask, chosen.method, scores.provenance), args.out)
    forget(args.out)
    show_selection(chosen)
    show_next(args.out, "apply", scores.provenance.model.path, "OUT", "--mask", args.out)


def apply(args: Namespace) -> None:
    """`llmdrop apply`."""
    check_free(args.out, overwrite=args.overwrite)
    mask, records = given_mask(args, checkpoint := Checkpoint.open(args.model))
    write_plan(plan_of(args, checkpoint, mask), args, records)


def convert(args: Namespace) -> None:
    """`llmdrop convert`."""
    check_free(args.out, overwrite=args.overwrite)
    if args.dialect is None and not args.renumber:
        raise InputError("nothing to convert: give --dialect, --renumber or both")
    write_plan(plan_surgery(args.model, dialect=args.dialect, keep_dropped=True, renumber=args.renumber), args, {})


def inspect(args: Namespace) -> None:
    """`llmdrop inspect`."""
    from llmdrop_vllm.evaluation.inspection import inspect_checkpoint

    mask, _ = given_mask(args, checkpoint := Checkpoint.open(args.model))
    asked = {"memory_bytes": args.memory, "context": args.context, "chunk": args.max_num_batched_tokens}
    keys = {"kv_dtype": args.kv_dtype, "kv_wide": args.kv_dtype_skip_layers}
    found = inspect_checkpoint(checkpoint, mask, **keys, **asked)
    if args.json:
        print(found.model_dump_json(indent=2))
    else:
        show_inspection(found)


def quantize(args: Namespace) -> None:
    """`llmdrop quantize`."""
    from llmdrop_vllm.quantizing.quantize import QUANTIZE_FILE, QuantizePlan, quantized

    check_free(args.out, overwrite=args.overwrite)
    checkpoint = Checkpoint.open(args.model)
    is_calibrated = SCHEMES[args.scheme].calibrated
    if args.data is not None and not is_calibrated:
        raise InputError(f"--scheme {args.scheme} rounds to the nearest and takes no --data")
    plan = QuantizePlan.of(checkpoint, args.scheme, args.group_size)
    if is_calibrated and args.data != NO_DATA:
        amount = {"samples": args.samples or SEQUENCES, "seq_len": args.seq_len or TOKENS, "seed": args.seed}
        plan = replace(plan, calibration=load_calibration(checkpoint, args.data or EMBEDDED, **amount))
    with quantized(plan, beside(args.out, "quantizing")) as (surgery, record):
        write_plan(surgery, args, {QUANTIZE_FILE: record})
    print(record.summary())


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


def given_mask(args: Namespace, checkpoint: Checkpoint) -> tuple[DropMask, dict[str, Record]]:
    """The mask that the arguments name or list, windows on top, and what is to be kept of where it comes from; the
    model's own where they say nothing.
    """
    windows = windows_of(args.window_attention, args.window)
    if args.mask is not None:
        if args.attention or args.mlp:
            raise InputError("--mask and --attention/--mlp exclude each other")
        file = read_record(MaskFile, args.mask)
        if not args.other_model:
            _check_same_model(file, checkpoint, args.mask)
    elif args.attention or args.mlp or windows:
        given = DropMask(checkpoint.mask.num_hidden_layers, args.attention, args.mlp) or checkpoint.mask
        file = MaskFile.of(given, "given on the command line", Provenance.of(checkpoint))
    else:
        return checkpoint.mask, {}
    mask = file.mask.seeing(windows)
    return mask, {MASK_FILE: file.model_copy(update={"windows": mask.windows})}


def _check_same_model(file: MaskFile, checkpoint: Checkpoint, path: Path) -> None:
    if file.provenance is not None and file.provenance.model.fingerprint != checkpoint.fingerprint:
        others = other_weights(file.provenance.model, checkpoint)
        raise MaskError(f"{path} was chosen for {others}; --other-model takes it all the same")


def check_new(path: Path, overwrite: bool) -> None:
    """Raise OutputError for a file that cannot be written, or that is there and was not meant to be replaced."""
    if path.exists() and (path.is_dir() or not overwrite):
        hint = "choose another name" if path.is_dir() else "choose another name, or replace it with --overwrite"
        raise OutputError(f"{path} exists; {hint}")
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} is not a directory that can be written to")


def plan_of(args: Namespace, checkpoint: Checkpoint, mask: DropMask, **others: bool) -> SurgeryPlan:
    """What the arguments ask to write, but for what is asked otherwise here."""
    how = {"portable": args.portable, "config_only": args.config_only, "renumber": args.renumber, **others}
    return plan_surgery(checkpoint, mask, dialect=args.dialect, **how)


def write_plan(plan: SurgeryPlan, args: Namespace, records: Mapping[str, Record]) -> None:
    """Write to OUT with progress, and say what was written."""
    for warning in plan.warnings:
        warn(warning)
    if plan.left_out:
        print(f"left out, other copies of the weights: {', '.join(plan.left_out)}")
    with tqdm(total=plan.weight_bytes, unit="B", unit_scale=True, desc="writing") as bar:
        write_checkpoint(plan, args.out, overwrite=args.overwrite, records=records, progress=bar.update)
    gone = sum(tensor.num_bytes for tensor in plan.dropped)
    print(f"{args.out}: {plan.mask.summary()}; {gone:,} bytes of weights left out, {plan.weight_bytes:,} written")
