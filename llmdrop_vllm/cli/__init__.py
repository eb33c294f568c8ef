"""`llmdrop`: commands parse, call the library and print."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from llmdrop_vllm.errors import InputError, in_one_line

# What brings the packages that not every installation has.
EXTRAS = {
    "accelerate": ("train",),
    "peft": ("train",),
    "tensorboard": ("train",),
    "gguf": ("fetch",),
    "jinja2": ("eval",),
    "lm_eval": ("eval",),
    "matplotlib": ("eval",),
    "vllm": ("cuda", "cpu"),
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

    args, unknown = parser().parse_known_args(argv)
    if unknown:
        args.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    # Transformers would draw its own bars and advise on files that are read on purpose.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        _fetch_models(args)
        getattr(importlib.import_module(args.module), args.command)(args)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        print(f"llmdrop: error: {error}; {_remedy(error)}", file=sys.stderr)
        return 1
    except InputError as error:
        print(f"llmdrop: error: {in_one_line(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("llmdrop: interrupted; what was being written is gone or goes on with the same command", file=sys.stderr)
        return 130
    return 0


def _fetch_models(args: argparse.Namespace) -> None:
    from llmdrop_vllm.fetching.fetch import resolve

    for name in MODELS:
        if isinstance(model := getattr(args, name, None), str):
            setattr(args, name, resolve(model))


def _remedy(error: ModuleNotFoundError) -> str:
    if extras := EXTRAS.get((error.name or "").partition(".")[0]):
        return "pip install " + " or ".join(f"'llmdrop-vllm[{extra}]'" for extra in extras)
    return "an engine brings it along, or: pip install 'llmdrop-vllm[toolkit]'"
