"""Models as arguments name them."""

from argparse import Namespace

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.masks.dialects import windows_of


def opened(args: Namespace) -> Checkpoint:
    """With the windows that the arguments ask for beside those of its config."""
    return Checkpoint.open(args.model).seeing(windows_of(args.window_attention, args.window))
