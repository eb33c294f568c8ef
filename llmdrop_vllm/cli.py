"""`llmdrop`: find what to drop in a checkpoint, write the smaller one, and say what it saves."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from llmdrop_vllm import __version__
from llmdrop_vllm.dialects import ON_DISK
from llmdrop_vllm.errors import InputError

UNITS = ("", "k", "m", "g", "t")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for an error that the user can mend, 130 for an interruption."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "serve":
        return _serve(argv[1:])
    args = parser().parse_args(argv)
    # Transformers would draw its own bars and advise on files that are read on purpose.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from llmdrop_vllm import commands

        getattr(commands, args.command)(args)
    except ModuleNotFoundError as error:
        print(
            f"llmdrop: error: {error}; an engine brings it along, or: pip install 'llmdrop-vllm[toolkit]'",
            file=sys.stderr,
        )
        return 1
    except InputError as error:
        print(f"llmdrop: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llmdrop: interrupted; what was being written is gone or goes on with the same command", file=sys.stderr)
        return 130
    return 0


def _serve(argv: Sequence[str]) -> int:
    """Its options are mostly vLLM's, so it reads them itself."""
    from llmdrop_server.launch import main as serve

    return serve(argv)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="llmdrop", description=__doc__)
    top.add_argument("--version", action="version", version=f"llmdrop-vllm {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    command("serve", "serve a model with vLLM, its page and its bounds", "llmdrop serve MODEL --drop-attention 25,26")
    score = command(
        "score", "measure the importance of every sublayer and block", "llmdrop score MODEL --out scores.json"
    )
    _add_model(score)
    score.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the scores go (JSON)")
    _add_scoring(score)
    score.add_argument("--overwrite", action="store_true", help="replace FILE")

    select = command("select", "choose a mask by scores", "llmdrop select scores.json --attention 8 --out mask.json")
    select.add_argument("scores", type=Path, metavar="SCORES", help="what `llmdrop score` wrote")
    select.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the mask goes (JSON)")
    _add_selection(select)
    select.add_argument("--model", help="for --iterative: the scored model, if it has moved")
    select.add_argument("--device", help="for --iterative: cpu or cuda; default a GPU where there is one")
    select.add_argument("--overwrite", action="store_true", help="replace FILE")

    apply = command("apply", "write the checkpoint that a mask leaves", "llmdrop apply MODEL OUT --mask mask.json")
    _add_model(apply)
    apply.add_argument("out", type=Path, metavar="OUT", help="the new checkpoint's directory")
    mask = apply.add_argument_group("mask (without any, the one in MODEL's config)")
    mask.add_argument("--mask", type=Path, metavar="FILE", help="what `llmdrop select` wrote")
    mask.add_argument("--attention", type=_layers, default=(), metavar="25,26", help="layers whose attention goes")
    mask.add_argument("--mlp", type=_layers, default=(), metavar="24", help="layers whose MLP goes")
    mask.add_argument(
        "--other-model", action="store_true", help="take a mask that was chosen for another model's weights"
    )
    _add_output(apply)

    drop = command("drop", "score, select and apply in one go", "llmdrop drop MODEL OUT --attention 8")
    _add_model(drop)
    drop.add_argument("out", type=Path, metavar="OUT", help="the new checkpoint's directory")
    _add_selection(drop)
    _add_scoring(drop)
    _add_output(drop)

    inspect = command("inspect", "show what is dropped and what that saves", "llmdrop inspect OUT --memory 80GiB")
    _add_model(inspect)
    inspect.add_argument("--memory", type=_memory, default=80 * 2**30, help="memory for weights and KV cache (80GiB)")
    inspect.add_argument("--kv-dtype", metavar="DTYPE", help="float32, bfloat16, float16 or fp8; default the model's")
    inspect.add_argument("--json", action="store_true", help="for machines")

    convert = command(
        "convert", "say a checkpoint's mask in another dialect", "llmdrop convert MODEL OUT --dialect transformers"
    )
    _add_model(convert)
    convert.add_argument("out", type=Path, metavar="OUT", help="the new checkpoint's directory")
    convert.add_argument("--dialect", choices=ON_DISK, required=True)
    convert.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a checkpoint")
    return top


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a checkpoint directory or a hub id")


def _add_scoring(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("calibration")
    group.add_argument(
        "--data",
        default="embedded",
        help="'embedded' text (default), a .txt, a .jsonl with a text field, a .json list of token-id lists, or a "
        "`datasets` name, NAME[:CONFIG[:SPLIT]]",
    )
    group.add_argument("--samples", type=int, metavar="N", help="sequences (256)")
    group.add_argument("--seq-len", type=int, metavar="N", help="tokens in each (2048, or the model's context)")
    group.add_argument("--device", help="cpu or cuda; default a GPU where there is one")
    group.add_argument("--dtype", help="float32, bfloat16 or float16; default the checkpoint's")
    # `select` has a seed of its own for --random; together they are one.
    if not any(action.dest == "seed" for action in command._actions):
        group.add_argument("--seed", type=int, default=0, help="of the choice of sequences")


def _add_selection(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what to drop (several may be combined)")
    for name, what in {
        "attention": "the N least important attention sublayers",
        "mlp": "the N least important MLP sublayers",
        "blocks": "the N least important blocks (attention and MLP)",
        "consecutive": "the run of N blocks that changes the residual stream least",
        "joint": "the N least important sublayers, attention and MLP in one list",
        "last": "the N deepest",
        "random": "N at random (--seed), as a control",
        "least": "the N most important ones: reverse order, as a control",
    }.items():
        group.add_argument(f"--{name}", type=int, metavar="N", help=what)
    group.add_argument("--kv-budget", metavar="50%", help="attention until the KV cache is at most this share")
    group.add_argument(
        "--kind",
        choices=("attention", "mlp", "blocks", "joint"),
        help="for --last, --random, --least (attention)",
    )
    group.add_argument("--keep-last-layer", action="store_true", help="for --last: spare the very last layer")
    group.add_argument("--seed", type=int, default=0, help="for --random")
    group.add_argument("--iterative", action="store_true", help="score again after each drop")
    group.add_argument("--protect", type=_layers, default=(), metavar="0,1,31", help="layers that keep everything")
    group.add_argument("--allow-padding", action="store_true", help="never trade importance against KV cache padding")


def _add_output(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("output")
    group.add_argument("--dialect", choices=ON_DISK, default="llm-drop", help="how the config says the mask (llm-drop)")
    how = group.add_mutually_exclusive_group()
    how.add_argument("--portable", action="store_true", help="keep the dropped weights, output projections zeroed")
    how.add_argument("--config-only", action="store_true", help="write the config and link to MODEL's weights")
    group.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a checkpoint")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 25,26") from None


def _memory(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+)([kmgt]?)(i?b?)", text.lower())
    try:
        # 80GB are 80 * 1000^3 bytes; 80GiB, and 80G as vLLM reads it, 80 * 1024^3.
        number, unit, suffix = match.groups() if match else ("", "", "")
        return int(float(number) * (1000 if suffix == "b" and unit else 1024) ** UNITS.index(unit))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory such as 80GiB") from None


if __name__ == "__main__":
    sys.exit(main())
