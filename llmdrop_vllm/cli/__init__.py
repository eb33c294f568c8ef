"""`llmdrop`: commands parse, call the library and print."""

import importlib
import os
import sys
from collections.abc import Sequence

from llmdrop_vllm.errors import InputError, in_one_line

# What each extra brings that not every installation has.
EXTRAS = {
    "train": ("accelerate", "peft", "tensorboard"),
    "fetch": ("gguf",),
    "eval": ("jinja2", "lm_eval", "matplotlib"),
    "cuda": ("vllm",),
    "cpu": ("vllm",),
}
# Arguments that name a model, as people do.
MODELS = ("model", "full", "teacher")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for an error that the user can mend, 130 for an interruption."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "serve":
        # Its options are mostly vLLM's, so it reads them itself.
        from llmdrop_server.launch import main as serve

        return serve(argv[1:])
    from llmdrop_vllm.cli.arguments import parser
    from llmdrop_vllm.fetching.fetch import resolve

    args, unknown = parser().parse_known_args(argv)
    if unknown:
        args.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    # Transformers would draw its own bars and advise on files that are read on purpose.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        for name in MODELS:
            if isinstance(model := getattr(args, name, None), str):
                setattr(args, name, resolve(model))
        getattr(importlib.import_module(args.module), args.command)(args)
        sys.stdout.flush()
    except (ModuleNotFoundError, InputError) as error:
        remedy = f"; {_remedy(error)}" if isinstance(error, ModuleNotFoundError) else ""
        print(f"llmdrop: error: {in_one_line(error)}{remedy}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("llmdrop: interrupted; what was being written is gone or goes on with the same command", file=sys.stderr)
        return 130
    return 0


def _remedy(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if extras := [f"'llmdrop-vllm[{extra}]'" for extra, packages in EXTRAS.items() if package in packages]:
        return f"pip install {' or '.join(extras)}"
    return "an engine brings it along, or: pip install 'llmdrop-vllm[toolkit]'"
