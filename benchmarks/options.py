"""Options that scripts share: a named shape, the masks to measure on it, and what all contenders have in common."""

import argparse
import math
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import published
from benchmarks.contenders import Settings
from benchmarks.record import add_out
from benchmarks.shapes import Shape
from llmdrop_vllm import DropMask, InputError, MaskError
from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.cli.values import count
from llmdrop_vllm.mask_file import MaskFile

KINDS = ("attention", "mlp", "block")


def add_shared(parser: argparse.ArgumentParser, *, repeats: int = 5, kv_gib: str = "8 on a GPU, 0.2 on a CPU") -> None:
    """Which model, what is dropped of it, and how it is run."""
    parser.add_argument("--shape", default="cpu-small", help="of benchmarks/shapes.py, or a model to fetch")
    parser.add_argument("--layers", type=int, help="the shape's layers at another depth")
    for kind in KINDS:
        parser.add_argument(
            f"--{kind}", type=numbers, metavar="N[,N]", help=f"masks that drop so many {kind} sublayers each"
        )
    parser.add_argument("--mask", type=Path, action="append", default=[], help="of select or search (repeatable)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: what torch finds")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--directory", type=Path, help="where there is room for the checkpoint")
    parser.add_argument("--kv-gib", type=positive, help=f"KV cache; default: {kv_gib}")
    parser.add_argument("--repeats", type=count, default=repeats)
    parser.add_argument("--smoke", action="store_true", help="seconds, to see that everything works")
    add_out(parser)


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def numbers(text: str) -> list[int]:
    """`2,4`, for argparse."""
    return [*map(count, text.split(","))]


def models(text: str, known: Collection[str]) -> list[str]:
    """`a,b` of a `--models`. Raises InputError for one that is not known."""
    names = text.split(",")
    if unknown := set(names) - {*known}:
        raise InputError(f"--models names {', '.join(sorted(unknown))}; expected {', '.join(known)}")
    return names


@contextmanager
def ending(name: str) -> Iterator[None]:
    """What the user can mend ends the script with one line."""
    try:
        yield
    except InputError as error:
        raise SystemExit(f"{name}: error: {error}") from None


def run_in_directory(name: str, run: Callable[[argparse.Namespace, Path], None], args: argparse.Namespace) -> None:
    """Run with a directory that is gone afterwards."""
    with ending(name), tempfile.TemporaryDirectory(dir=args.directory) as directory:
        run(args, Path(directory))


def settings(args: argparse.Namespace) -> Settings:
    """How every contender is run."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    return Settings(
        dtype=args.dtype or ("bfloat16" if on_gpu else "float32"),
        device=device,
        kv_bytes=int((args.kv_gib or (8 if on_gpu else 0.2)) * 2**30),
        max_step_tokens=8192 if on_gpu else 2048,
        compiled=on_gpu if args.compile is None else args.compile,
    )


def masks(args: argparse.Namespace, shape: Shape) -> dict[str, DropMask]:
    """Label to mask, half of the attention by default. Raises InputError for a mask that does not fit the shape."""
    wanted = [(kind, number) for kind in KINDS for number in getattr(args, kind) or ()]
    if getattr(args, "table", None):
        wanted += published.table(shape)
    found = {f"{kind} {number}": shape.mask(kind, number) for kind, number in wanted}
    for path in args.mask:
        mask = read_record(MaskFile, path).mask
        if mask.num_hidden_layers != shape.num_layers:
            raise MaskError(f"{path} is for {mask.num_hidden_layers} layers; {shape.name} has {shape.num_layers}")
        found[f"{path.parent.name} {path.stem}".strip()] = mask
    return found or {f"attention {shape.num_layers // 2}": shape.mask("attention", shape.num_layers // 2)}
