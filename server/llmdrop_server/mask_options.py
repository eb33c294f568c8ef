"""The mask that the options of `llmdrop serve` ask for."""

import re
from argparse import Namespace
from typing import Any

from llmdrop_vllm.artifacts import Scores, read_record
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.dialects import WINDOWS, windows_of
from llmdrop_vllm.masks.mask import DropMask

LAYERS = re.compile(r"\d+(,\d+)*,?")


def mask_entries(ours: Namespace) -> dict[str, Any]:
    """Config entries for `--drop-attention`, `--drop-mlp`, `--mask` and `--scores`, and for windows beside them; none
    where no mask is asked for.

    A list of layers is taken as it stands, in rank order; a single number is how many the scores find least important.
    Raises MaskError for options that make no sense, InputError for files that cannot be read.
    """
    seen = ours.window_attention
    windows = windows_of(() if seen is None else _layers("--window-attention", seen, "3,5"), ours.window)
    asked = {"attention": ours.drop_attention, "mlp": ours.drop_mlp}
    if ours.mask is not None:
        if any(asked.values()):
            raise MaskError("--mask and --drop-attention/--drop-mlp exclude each other")
        return read_record(MaskFile, ours.mask).mask.seeing(windows).to_config("runtime")
    measured = None if ours.scores is None else read_record(Scores, ours.scores)
    layers, counts = {}, {}
    for kind, text in asked.items():
        if text is not None and "," in text:
            layers[kind] = _layers(f"--drop-{kind}", text, "25,26,24")
        elif text is not None:
            counts[kind] = _count(f"--drop-{kind}", text, measured)
    replaces = bool(layers or counts)
    if not replaces and not windows:
        return {}
    if replaces and measured is not None:
        layers = _least_important(measured, counts) | layers
    # Without scores the model's depth is not known here: the engine's config hook checks the indices against it.
    named = [layer for each in (*layers.values(), dict(windows)) for layer in each]
    depth = measured.num_hidden_layers if measured else 1 + max(named)
    entries = DropMask(depth, layers.get("attention", ()), layers.get("mlp", ())).seeing(windows).to_config("runtime")
    # Windows alone come on top of the config's mask, whatever that is.
    return entries if replaces else {WINDOWS: entries[WINDOWS]}


def _layers(option: str, text: str, such_as: str) -> tuple[int, ...]:
    if not LAYERS.fullmatch(text):
        raise MaskError(f"{option} is {text!r}; expected layers like {such_as}")
    return tuple(int(layer) for layer in text.split(",") if layer)


def _count(option: str, text: str, measured: Scores | None) -> int:
    if not text.isdecimal():
        raise MaskError(f"{option} is {text!r}; expected layers like 25,26,24, or with --scores a number")
    if measured is None:
        raise MaskError(
            f"{option} {text} may be a layer or a number of layers: the layer is written '{text},'; for the {text} "
            "least important ones give --scores"
        )
    return int(text)


def _least_important(measured: Scores, counts: dict[str, int]) -> dict[str, tuple[int, ...]]:
    from llmdrop_vllm.selection.selection import Ranked, select  # brings torch along

    methods = [Ranked(kind, counts[kind]) for kind in ("attention", "mlp") if kind in counts]
    chosen = select(measured, *methods).mask if methods else measured.dropped
    return {"attention": chosen.attention, "mlp": chosen.mlp}
