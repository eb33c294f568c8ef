"""`llmdrop quantize`: makes values of its arguments, calls the library and prints."""

from argparse import Namespace
from dataclasses import replace

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli.commands import beside, write_plan
from llmdrop_vllm.data.calibration import EMBEDDED, load_calibration
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.quantizing.quantize import QUANTIZE_FILE, QuantizePlan, quantized
from llmdrop_vllm.quantizing.schemes import SCHEMES
from llmdrop_vllm.writing.staging import check_free

NO_DATA = "none"
SEQUENCES, TOKENS = 64, 512  # of text that does not say how much of it to take


def quantize(args: Namespace) -> None:
    """`llmdrop quantize`."""
    check_free(args.out, overwrite=args.overwrite)
    checkpoint = Checkpoint.open(args.model)
    if args.data is not None and not SCHEMES[args.scheme].calibrated:
        raise InputError(f"--scheme {args.scheme} rounds to the nearest and takes no --data")
    plan = QuantizePlan.of(checkpoint, args.scheme, args.group_size)
    if SCHEMES[args.scheme].calibrated and args.data != NO_DATA:
        amount = {"samples": args.samples or SEQUENCES, "seq_len": args.seq_len or TOKENS, "seed": args.seed}
        plan = replace(plan, calibration=load_calibration(checkpoint, args.data or EMBEDDED, **amount))
    with quantized(plan, beside(args.out, "quantizing")) as (surgery, record):
        write_plan(surgery, args, {QUANTIZE_FILE: record})
    print(record.summary())
