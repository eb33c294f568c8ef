"""Shares as people write them."""

import re
from fractions import Fraction

SHARE = re.compile(r"(?P<percent>[0-9]+(\.[0-9]+)?) ?%|(?P<decimal>[0-9]*\.[0-9]+)")


def parse_share(text: str) -> Fraction | None:
    """`50%` or `0.5`; None for anything else: a bare `50` or `1` could mean either."""
    match = SHARE.fullmatch(text)
    if match is None:
        return None
    percent, decimal = match["percent"], match["decimal"]
    return Fraction(decimal) if percent is None else Fraction(percent) / 100
