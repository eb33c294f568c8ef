"""Which masks a sweep measures: for each order of dropping, more and more of it."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import get_args

from llmdrop_vllm.artifacts import Scores
from llmdrop_vllm.errors import InputError, MaskError
from llmdrop_vllm.evaluation.records import Series, mask_id
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.candidates import Kind
from llmdrop_vllm.selection.orders import Deepest, MostImportant, Order, Random
from llmdrop_vllm.selection.selection import Consecutive, Method, Ranked, select

KINDS: tuple[Kind, ...] = get_args(Kind)
ORDERS: dict[str, Order] = {
    "last": Deepest(),
    "last-but-one": Deepest(keep_last_layer=True),
    "reverse": MostImportant(),
}
DEFAULT_SERIES = (*KINDS, "consecutive", "last", "last-but-one", "reverse", "random:3")
SHARES = tuple(map(Fraction, ("1/12", "1/6", "1/4", "1/3", "1/2", "2/3")))


def default_counts(num_layers: int) -> tuple[int, ...]:
    """Shares of the depth up to two thirds, in whole sublayers."""
    return tuple(sorted({max(1, round(share * num_layers)) for share in SHARES}))


def make_series(
    scores: Scores, names: Sequence[str] = DEFAULT_SERIES, counts: Sequence[int] = ()
) -> tuple[tuple[Series, ...], dict[str, DropMask]]:
    """The series by their names, and every mask that they reach by its id; masks are chosen as `llmdrop select` does.

    A name is a kind, which is dropped by importance, `consecutive`, or an order: `last`, `last-but-one`, `reverse`,
    `random` or `random:SEEDS`, each for attention, or for another kind as in `last/blocks`. A series goes by ascending
    counts; those that it cannot reach are left out. Raises InputError for an unknown name and where no count can be
    reached.
    """
    counts = sorted(set(counts)) or default_counts(scores.num_hidden_layers)
    found: dict[str, Series] = {}
    masks: dict[str, DropMask] = {}
    for name in names:
        for title, kind, method in _methods(name):
            reached: dict[int, DropMask] = {}
            for count in counts:
                with suppress(MaskError):  # more than there is
                    reached[count] = select(scores, method(count)).mask
            if not reached:
                raise InputError(f"series {title}: none of {', '.join(map(str, counts))} can be dropped")
            ids = tuple(map(mask_id, reached.values()))
            masks |= dict(zip(ids, reached.values(), strict=True))
            order = str(method(1)).split(maxsplit=2)[2]  # after what goes and how many
            found[title] = Series(name=title, what=kind, order=order, counts=tuple(reached), masks=ids)
    return tuple(found.values()), masks


def _methods(name: str) -> Iterator[tuple[str, Kind, Callable[[int], Method]]]:
    """Title, what goes, and the method that drops so many of it."""
    if name == "consecutive":
        yield name, "blocks", Consecutive
    elif name in KINDS:
        yield name, name, partial(Ranked, name)
    else:
        order_name, slash, what = name.partition("/")
        what = what or "attention"
        for title, order in _orders(order_name, name):
            if what not in KINDS:
                raise InputError(f"series {name}: {what} is not one of {', '.join(KINDS)}")
            yield title + (slash and f"/{what}"), what, partial(Ranked, what, order=order)


def _orders(name: str, asked: str) -> list[tuple[str, Order]]:
    if match := re.fullmatch(r"random(?::([1-9][0-9]*))?", name):
        return [(f"random {seed}", Random(seed)) for seed in range(int(match[1] or 1))]
    if name in ORDERS:
        return [(name, ORDERS[name])]
    known = ", ".join((*KINDS, "consecutive", *ORDERS, "random:SEEDS"))
    raise InputError(f"series {asked} is unknown; expected {known}, an order also as in last/blocks")
