"""The mask that the options of `llmdrop serve` ask for."""

import re
from pathlib import Path
from typing import Any

from llmdrop_vllm.artifacts import Scores, read_record
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.dialects import WINDOWS, Windows, windows_of
from llmdrop_vllm.masks.mask import DropMask

LAYERS = re.compile(r"\d+(,\d+)*,?")


def mask_entries(
    attention: str | None, mlp: str | None, mask: Path | None, scores: Path | None, windows: Windows = ()
) -> dict[str, Any]:
    """Config entries for `--drop-attention`, `--drop-mlp`, `--mask` and `--scores`, and for windows beside them; none
    where no mask is asked for.

    A list of layers is taken as it stands, in rank order; a single number is how many the scores find least important.
    Raises MaskError for options that make no sense, InputError for files that cannot be read.
    """
    asked = {"attention": attention, "mlp": mlp}
    if mask is not None:
        if attention or mlp:
            raise MaskError("--mask and --drop-attention/--drop-mlp exclude each other")
        return read_record(MaskFile, mask).mask.seeing(windows).to_config("runtime")
    measured = None if scores is None else read_record(Scores, scores)
    layers = {kind: _layers(kind, text) for kind, text in asked.items() if text is not None and "," in text}
    counts = {
        kind: _count(kind, text, measured) for kind, text in asked.items() if text is not None and "," not in text
    }
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


def windows_asked(layers: str | None, tokens: int | None) -> Windows:
    """Of `--window-attention` and `--window`. Raises MaskError for one without the other, and for what is no layer."""
    if layers is not None and not LAYERS.fullmatch(layers):
        raise MaskError(f"--window-attention is {layers!r}; expected layers like 3,5")
    return windows_of((int(layer) for layer in (layers or "").split(",") if layer), tokens)


def _layers(kind: str, text: str) -> tuple[int, ...]:
    if not LAYERS.fullmatch(text):
        raise MaskError(f"--drop-{kind} is {text!r}; expected layers like 25,26,24")
    return tuple(int(layer) for layer in text.split(",") if layer)


def _count(kind: str, text: str, measured: Scores | None) -> int:
    if not text.isdecimal():
        raise MaskError(f"--drop-{kind} is {text!r}; expected layers like 25,26,24, or with --scores a number")
    if measured is None:
        raise MaskError(
            f"--drop-{kind} {text} may be a layer or a number of layers: the layer is written '{text},'; for the "
            f"{text} least important ones give --scores"
        )
    return int(text)


def _least_important(measured: Scores, counts: dict[str, int]) -> dict[str, tuple[int, ...]]:
    from llmdrop_vllm.selection.selection import Ranked, select  # brings torch along

    methods = [Ranked(kind, counts[kind]) for kind in ("attention", "mlp") if kind in counts]
    chosen = select(measured, *methods).mask if methods else measured.dropped
    return {"attention": chosen.attention, "mlp": chosen.mlp}
