"""Attention to the last W tokens in some layers: what is lost beyond W, and what could stand in for the first tokens.

    apt-get install debian-handbook
    python benchmarks/windows.py [--models smollm2] [--ways N]

Perplexity by position and KL to the full model on documents of 8,192 tokens of prose, and a needle: a number that is
said at several depths of a long text and asked for at its end. Weights are never changed. Sink logits are fitted, and
layers chosen, on other documents than those that are measured. Each way is a line; what is measured stays, and the same
command goes on.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.options import ending, models
from benchmarks.real_quality import prose
from benchmarks.record import RESULTS, add_out, finish
from benchmarks.table import rows
from benchmarks.windowed_attention import NAME, Weighed, Window
from llmdrop_vllm import hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.fetching.fetch import fetch

HEAD_ROWS = 1024
LENGTH, MEASURED, FITTED = 8192, 3, 2
BINS = ((0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
NEEDLES = tuple((length, depth) for length in (2048, 4096, 8000) for depth in (0.1, 0.4, 0.7, 0.95))
TOWN = "Lisbon"


@dataclass(frozen=True)
class Subject:
    """A real model, and documents to fit and to measure with."""

    name: str
    directory: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(fetch(self.name))

    @cached_property
    def model(self) -> Any:
        found = hf.load(self.checkpoint.under(self.checkpoint.mask), dtype=torch.bfloat16, attn_implementation=NAME)
        return found.eval()

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.checkpoint.directory)

    @cached_property
    def attentions(self) -> list[Any]:
        return [layer.self_attn for layer in hf.decoder_layers(self.model, self.depth)]

    @property
    def depth(self) -> int:
        return self.checkpoint.mask.num_hidden_layers

    @cached_property
    def documents(self) -> tuple[torch.Tensor, ...]:
        """The first are to fit with, [1, tokens] each."""
        self.directory.mkdir(parents=True, exist_ok=True)
        text = prose(self.directory / "prose.txt").read_text()
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        spread = len(ids) // (FITTED + MEASURED)
        return tuple(ids[spread * n : spread * n + LENGTH][None] for n in range(FITTED + MEASURED))

    @contextmanager
    def windowed(self, windows: dict[int, Window]) -> Iterator[None]:
        """Within this context these layers see their windows only."""
        try:
            for layer, window in windows.items():
                self.attentions[layer].window = window
            yield
        finally:
            for layer in windows:
                del self.attentions[layer].window

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head reads, [tokens, hidden]."""
        with torch.inference_mode():
            return self.model.get_decoder()(ids, use_cache=False).last_hidden_state[0]

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, vocabulary]."""
        with torch.inference_mode():
            return self.model.get_output_embeddings()(hidden).float().log_softmax(-1)

    @cached_property
    def full(self) -> list[torch.Tensor]:
        """The full model's, by document."""
        return [self.hidden(ids) for ids in self.documents]

    def losses(self, windows: dict[int, Window], numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of each next token, and KL to the full model, both [documents, tokens - 1]."""
        found = []
        whole_model = self.full  # before anything is windowed
        with self.windowed(windows):
            for number in numbers:
                ids, hidden, full = self.documents[number], self.hidden(self.documents[number]), whole_model[number]
                for start in range(0, LENGTH - 1, HEAD_ROWS):
                    span = slice(start, min(start + HEAD_ROWS, LENGTH - 1))
                    own, whole = (self.log_probabilities(each[span]) for each in (hidden, full))
                    nll = -own.gather(-1, ids[0, span.start + 1 : span.stop + 1, None])[:, 0]
                    found.append(torch.stack([nll, (whole.exp() * (whole - own)).sum(-1)]))
        both = torch.cat(found, 1).view(2, len(numbers), -1)
        return both[0], both[1]

    def weighed(self, length: int, first: int) -> list[Weighed]:
        """By layer, what the first tokens weigh once they have left a window of such a length."""
        stats = [Weighed(length, first) for _ in self.attentions]
        for attention, each in zip(self.attentions, stats, strict=True):
            attention.weighed = each
        for ids in self.documents[:FITTED]:
            self.hidden(ids)
        for attention in self.attentions:
            del attention.weighed
        return stats

    def needles(self, windows: dict[int, Window]) -> dict[int, float]:
        """By length of the text, the share of numbers that are found."""
        found: dict[int, list[bool]] = {}
        hay = self.documents[-1][0].tolist() + self.documents[-2][0].tolist()
        with self.windowed(windows):
            for place, (length, depth) in enumerate(NEEDLES):
                number = str(7919 * (place + 2) % 9000 + 1000)
                said = self._ids(f"\nThe special number of {TOWN} is {number}. Remember it.\n")
                asked = self._ids(
                    f"\nQuestion: What is the special number of {TOWN}?\nAnswer: The special number of {TOWN} is"
                )
                answer = self._ids(f" {number}")
                room = length - len(said) - len(asked) - len(answer)
                cut = int(room * depth)
                ids = [*hay[:cut], *said, *hay[cut:room], *asked, *answer]
                hidden = self.hidden(torch.tensor([ids]))[-len(answer) - 1 : -1]
                right = self.log_probabilities(hidden).argmax(-1).tolist() == answer
                found.setdefault(length, []).append(right)
        return {length: sum(each) / len(each) for length, each in found.items()}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


@dataclass(frozen=True)
class Way:
    """Which layers, how long a window, and what stands for the tokens that left it."""

    layers: str = "every second"
    length: int = 1024
    stand_in: str = "nothing"
    share: float = 0.5

    def __str__(self) -> str:
        return f"{self.layers}, {self.share:.0%}, W {self.length}, {self.stand_in}"


STAND_INS = ("nothing", "first 4 tokens", "sink of the first 4", "sink of all outside", "sink with values")
WAYS = (
    *(Way(stand_in=each) for each in STAND_INS),
    *(Way("least lost", stand_in=each) for each in STAND_INS[:3]),
    *(Way("last", stand_in=each) for each in STAND_INS[:2]),
    *(Way("least lost", length, STAND_INS[1]) for length in (256, 512, 2048)),
    *(Way("least lost", stand_in=STAND_INS[1], share=share) for share in (0.25, 0.75)),
)


def layers_of(subject: Subject, way: Way) -> list[int]:
    """In which attention is windowed."""
    count = round(subject.depth * way.share)
    if way.layers == "last":
        return list(range(subject.depth - count, subject.depth))
    if way.layers == "every second":
        return list(range(1, subject.depth, 2))[:count]
    kept = subject.directory / "windows-alone.json"
    lost = json.loads(kept.read_text()) if kept.exists() else []
    for layer in range(len(lost), subject.depth):
        window = Window(1024, first=4)
        lost.append(subject.losses({layer: window}, range(1))[1][:, 2048:].mean().item())
        kept.write_text(json.dumps(lost))
    return sorted(sorted(range(subject.depth), key=lost.__getitem__)[:count])


def windows_of(subject: Subject, way: Way) -> dict[int, Window]:
    """By layer."""
    layers = layers_of(subject, way)
    if way.stand_in == "nothing":
        return dict.fromkeys(layers, Window(way.length))
    if way.stand_in == "first 4 tokens":
        return dict.fromkeys(layers, Window(way.length, first=4))
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
    past = 1024 if way is None else way.length
    return {
        "model": subject.name,
        "way": "full" if way is None else str(way),
        "layers": sorted(windows),
        "perplexity": {f"{low}-{high}": round(math.exp(nll[:, low:high].mean().item()), 2) for low, high in BINS},
        "kl": round(kl[:, past:].mean().item(), 4),
        "needle": subject.needles(windows),
        "seconds": round(time.monotonic() - begin),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """For people."""
    bins = [f"{low}-{high}" for low, high in BINS]
    head = ("model", "windowed", *(f"perplexity, {each}" for each in bins), "KL past W")
    head += tuple(f"needle, {length}" for length in sorted({length for length, _ in NEEDLES}))
    found = [
        (
            *(each["model"], each["way"], *(each["perplexity"][name] for name in bins), each["kl"]),
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
            for way in (None, *WAYS[: args.ways]):
                known = {(each["model"], each["way"]) for each in lines}
                if (name, "full" if way is None else str(way)) not in known:
                    lines.append(measure(subject, way))
                    finish("windows", {"points": lines}, args.out, table=table(lines))


if __name__ == "__main__":
    main()
