"""Engines that arguments ask for, and what they are to answer."""

from argparse import Namespace

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import DataError
from llmdrop_vllm.evaluation.engine import EngineSettings, default_device
from llmdrop_vllm.evaluation.harness import Harness, find_tasks

LONGEST_TASK = 4096  # prompt and answer; lm-eval cuts what is longer


def harness_of(args: Namespace) -> Harness:
    """The tasks that the arguments name; lm-eval is an extra, and not needed where they name none."""
    if not args.tasks:
        return Harness()
    return find_tasks(args.tasks, prompting=args.prompting, runs_code=args.run_generated_code, limit=args.limit)


def settings_of(checkpoint: Checkpoint, args: Namespace, context: int = 0) -> EngineSettings:
    """An engine for windows of text of `context` tokens, for the requests that speed is measured with, and for the
    tasks' own prompts, where the arguments ask for these.

    Raises DataError for requests that are longer than the model's context.
    """
    most = checkpoint.context
    request = 0 if getattr(args, "no_speed", True) else args.prompt_tokens + args.output_tokens
    if most is not None and request > most:
        asked = f"--prompt-tokens and --output-tokens are {request} together"
        raise DataError(f"{asked}; the model's context is {most} tokens")
    longest = max(context + 1, request, min(most or LONGEST_TASK, LONGEST_TASK) if args.tasks else 0)
    return EngineSettings(dtype_of(checkpoint, args), longest, options=getattr(args, "engine_args", {}))


def dtype_of(checkpoint: Checkpoint, args: Namespace) -> str:
    """As asked; else the checkpoint's on a GPU, and for quantized weights, whose kernels know no float32; else float32,
    beside which the others are less exact and on a CPU not faster everywhere.
    """
    own = checkpoint.dtype if default_device() == "cuda" or checkpoint.is_quantized else "float32"
    return args.dtype or own


def refuse_skipped(harness: Harness) -> None:
    """Raise DataError naming the tasks that are not run, and why."""
    if skipped := harness.skipped:
        raise DataError("; ".join(f"task {task} was skipped: {reason}" for task, reason in skipped.items()))
