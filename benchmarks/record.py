"""How every benchmark ends: its result with where it comes from, in a file and as the last line that it prints."""

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdrop_vllm.artifacts import command_line, versions, write_atomically

RESULTS = Path(__file__).with_name("results")


def add_out(parser: argparse.ArgumentParser) -> None:
    """`--out`; a place that cannot take the result is refused before anything is measured."""
    parser.add_argument(
        "--out", type=_json_file, metavar="FILE.json", help="default: in benchmarks/results, named after the benchmark"
    )


def _json_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".json":  # the table and the lines, which stand beside it, may not have its name
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .json")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{str(path.parent)!r} is not a directory")
    return path


def finish(
    name: str,
    result: Mapping[str, Any],
    out: Path | None,
    *,
    lines: Sequence[Mapping[str, Any]] = (),
    table: str = "",
) -> None:
    """Print the result with where it comes from and write it, by default among the results as `name`.

    A table for people stands beside it as .md, and lines, of a result with a `shape` of so many `layers`, as .jsonl,
    each with where it comes from.
    """
    origin, out = provenance(), out or RESULTS / f"{name}.json"
    whole = {**result, **({"lines": lines} if lines else {}), **origin}
    # First: what was measured for hours is there to be copied even if the disk is full.
    print(json.dumps(whole), flush=True)
    files = {".json": json.dumps(whole, indent=2) + "\n"}
    if lines:
        of_line = {"shape": result["shape"], "layers": result["layers"], **origin}
        files[".jsonl"] = "".join(json.dumps({**line, **of_line}) + "\n" for line in lines)
    if table:
        files[".md"] = table
    for suffix, text in files.items():
        write_atomically(out.with_suffix(suffix), text)


def provenance() -> dict[str, Any]:
    """The command, the packages' versions and the machine."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return {"command": command_line(), "versions": versions(), "machine": machine}
