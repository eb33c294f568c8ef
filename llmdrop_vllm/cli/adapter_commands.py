"""`llmdrop adapter`."""

from argparse import Namespace

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.writing.adapters import strip_adapter


def adapter(args: Namespace) -> None:
    """`llmdrop adapter`."""
    checkpoint = Checkpoint.open(args.model)
    if not checkpoint.mask:
        raise MaskError(f"{checkpoint.directory} drops nothing; name the dropped model that the adapter is to serve")
    kept, gone = strip_adapter(checkpoint.under(checkpoint.mask), args.lora, args.out)
    print(f"{args.out}: {kept} tensors of {args.lora}, without {gone} for what is gone ({checkpoint.mask.summary()})")
