"""How the values of options are read, for argparse."""

import argparse
import json
import re
from typing import Any

from llmdrop_vllm.shares import parse_share

UNITS = ("", "k", "m", "g", "t")


def layers(text: str) -> tuple[int, ...]:
    """`25,26`."""
    try:
        return tuple(int(part) for part in text.removesuffix(",").split(",")) if text else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 25,26") from None


def named_layers(text: str) -> tuple[int, ...]:
    """The same where another command takes a number of layers: one layer is `25,`."""
    if text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text} may be a layer or a number of layers: the layer is written '{text},'; which {text} go, "
            "`llmdrop drop` and `llmdrop select` find out"
        )
    return layers(text)


def memory(text: str) -> int:
    """Bytes, from `80GiB`."""
    match = re.fullmatch(r"([0-9.]+)([kmgt]?)(i?b?)", text.lower())
    try:
        # 80GB are 80 * 1000^3 bytes; 80GiB, and 80G as vLLM reads it, 80 * 1024^3.
        number, unit, suffix = match.groups() if match else ("", "", "")
        return int(float(number) * (1000 if suffix == "b" and unit else 1024) ** UNITS.index(unit))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory such as 80GiB") from None


def share(text: str) -> float:
    """`1%` or `0.01`; a bare `1` could mean either and is refused."""
    found = parse_share(text)
    if found is None or ("%" not in text and found >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 1% or 0.01")
    return float(found)


def factor(text: str) -> float:
    """`1.3` or `1.3x`."""
    try:
        value = float(text.removesuffix("x"))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a speedup such as 1.3")
    return value


def minutes(text: str) -> float:
    """`30`, or `0.5`."""
    try:
        return factor(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes such as 30") from None


def count(text: str) -> int:
    """`8`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """`a,b`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def json_object(text: str) -> dict[str, Any]:
    """`{"a": 1}`."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return found
