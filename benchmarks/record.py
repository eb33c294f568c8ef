"""How every benchmark ends: its result with where it comes from, in a file and as the last line that it prints."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdrop_vllm.artifacts import command_line, versions

RESULTS = Path(__file__).with_name("results")


def provenance() -> dict[str, Any]:
    """The command, the packages' versions and the machine."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return {"command": command_line(), "versions": versions(), "machine": machine}


def finish(result: Mapping[str, Any], out: Path) -> None:
    """Write and print the result with where it comes from."""
    whole = {**result, **provenance()}
    out.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(whole))


def finish_lines(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], table: str, out: Path) -> None:
    """The same for a result of many lines: beside it JSON lines, each with where it comes from, and a table."""
    origin = {"shape": result["shape"], "layers": result["layers"], **provenance()}
    out.with_suffix(".jsonl").write_text("".join(json.dumps({**line, **origin}) + "\n" for line in lines))
    out.with_suffix(".md").write_text(table)
    finish({**result, "lines": lines}, out)
