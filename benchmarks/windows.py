"""Attention to the last W tokens in some layers: what is lost beyond W, and what could stand in for the first tokens.

    apt-get install debian-handbook
    python benchmarks/windows.py [--models smollm2] [--ways N]

Perplexity by position and KL to the full model on documents of 8,192 tokens of prose, on a GPU KL on the model's own
words after long texts, and a needle: a number that is said at ten depths of a long text and asked for at its end.
Weights are never changed; sink logits are fitted, and layers chosen, on other texts than those that are measured. Each
way is a line; what is measured stays, and the same command goes on.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import ending, models
from benchmarks.record import RESULTS, add_out, finish
from benchmarks.table import rows
from benchmarks.windowed_attention import Window
from benchmarks.windows_choice import least_lost
from benchmarks.windows_subject import FITTED, MEASURED, MEASURED_SAYING, Subject
from llmdrop_vllm.masks.stretches import STRETCH

BINS = ((0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
NEEDLES = (2048, 4096, 8000)
CHOSEN_AT = 1024  # tokens of the window under which layers are chosen
AS_SERVED = "first stretch, as served"
STAND_INS = ("nothing", "first 4 tokens", "sink of the first 4", "sink of all outside", "sink with values")
EVERY_SECOND, LAST, LEAST_LOST, RETRIEVING = "every second", "last", "least lost", "least lost with needles"


@dataclass(frozen=True)
class Way:
    """Which layers, how long a window, and what stands for the tokens that left it."""

    layers: str = RETRIEVING
    length: int = 1024
    stand_in: str = "first 4 tokens"
    share: float = 0.5

    def __str__(self) -> str:
        return f"{self.layers}, {self.share:.0%}, W {self.length}, {self.stand_in}"


WAYS = (
    *(Way(EVERY_SECOND, stand_in=each) for each in STAND_INS),
    *(Way(layers) for layers in (LAST, LEAST_LOST)),
    *(Way(stand_in=each) for each in STAND_INS),
    *(Way(length=length) for length in (256, 512, 2048)),
    *(Way(share=share) for share in (0.25, 0.75)),
    Way(stand_in="nothing", share=0.25),
    *(Way(stand_in=AS_SERVED, share=share) for share in (0.5, 0.75)),
)


def layers_of(subject: Subject, way: Way) -> list[int]:
    """In which attention is windowed."""
    count = round(subject.depth * way.share)
    if way.layers == LAST:
        return list(range(subject.depth - count, subject.depth))
    if way.layers == EVERY_SECOND:
        return list(range(1, subject.depth, 2))[:count]
    return least_lost(subject, count, Window(CHOSEN_AT, first=4), way.layers == RETRIEVING)


def windows_of(subject: Subject, way: Way) -> dict[int, Window]:
    """By layer."""
    layers = layers_of(subject, way)
    if way.stand_in == "nothing":
        return dict.fromkeys(layers, Window(way.length))
    if way.stand_in == "first 4 tokens":
        return dict.fromkeys(layers, Window(way.length, first=4))
    if way.stand_in == AS_SERVED:
        return dict.fromkeys(layers, Window(way.length, first=STRETCH, stretches=True))
    stats = subject.weighed(way.length, 4)
    found = {}
    for layer in layers:
        each = stats[layer]
        sinks = (each.outside if way.stand_in == "sink of all outside" else each.firsts) / each.count
        found[layer] = Window(way.length, 0, sinks, each.values / each.count if "values" in way.stand_in else None)
    return found


def measure(subject: Subject, way: Way | None) -> dict[str, Any]:
    """A line of the table; None is the full model."""
    begin = time.monotonic()
    windows = {} if way is None else windows_of(subject, way)
    nll, kl = subject.losses(windows, range(FITTED, FITTED + MEASURED))
    own = subject.kl_of_own(windows) if subject.device.type == "cuda" else {}
    hay = [token for ids in subject.documents[FITTED:] for token in ids[0].tolist()]
    needles = {length: subject.found(subject.needles(length, MEASURED_SAYING, hay), windows) for length in NEEDLES}
    past = CHOSEN_AT if way is None else way.length
    return {
        "model": subject.name,
        "way": "full" if way is None else str(way),
        "layers": sorted(windows),
        "perplexity": {f"{low}-{high}": round(math.exp(nll[:, low:high].mean().item()), 2) for low, high in BINS},
        "kl_within": round(kl[:, :past].mean().item(), 4),
        "kl": round(kl[:, past:].mean().item(), 4),
        "kl_own": {tokens: round(value, 4) for tokens, value in own.items()},
        "needle": {length: round(share, 2) for length, share in needles.items()},
        "device": torch.cuda.get_device_name() if subject.device.type == "cuda" else "cpu",
        "seconds": round(time.monotonic() - begin),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """For people."""
    bins = [f"{low}-{high}" for low, high in BINS]
    head = ("model", "windowed", *(f"perplexity, {each}" for each in bins), "KL up to W", "KL past W", "KL, own words")
    head += tuple(f"needle, {length}" for length in NEEDLES)
    found = [
        (
            *(each["model"], each["way"], *(each["perplexity"][name] for name in bins), each["kl_within"], each["kl"]),
            f"{sum(each['kl_own'].values()) / len(each['kl_own']):.4f}" if each["kl_own"] else "",
            *(f"{share:.0%}" for _, share in sorted((int(length), share) for length, share in each["needle"].items())),
        )
        for each in lines
    ]
    return f"# Windows: a short memory where attention would go\n\n{rows(head, found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2", metavar="A,B")
    parser.add_argument("--ways", type=int, metavar="N", help="the first so many ways only")
    parser.add_argument("--directory", type=Path, default=Path("windows"), metavar="DIR", help="of what is fitted")
    add_out(parser)
    args = parser.parse_args()
    with ending("windows"):
        out = args.out or RESULTS / "windows.json"
        lines = json.loads(out.read_text())["points"] if out.exists() else []
        for name in models(args.models, {"smollm2": None, "qwen2.5-coder-1.5b": None}):
            subject = Subject(name, args.directory / name)
            subject.directory.mkdir(parents=True, exist_ok=True)
            for way in (None, *WAYS[: args.ways]):
                known = {(each["model"], each["way"]) for each in lines}
                if (name, "full" if way is None else str(way)) not in known:
                    lines.append(measure(subject, way))
                    finish("windows", {"points": lines}, out, table=table(lines))


if __name__ == "__main__":
    main()
