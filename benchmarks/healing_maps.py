"""What a linear map where attention was would regain (NBL, arXiv 2505.21077), beside healing, which adds no weights.

    python benchmarks/healing_maps.py [--models smollm2,qwen2.5-coder-1.5b]

y = W x + b of the normed residual stream x, fitted layer by layer on the same tokens as healing, both streams side by
side, lambda by the prompts that are held out; judged as `healing.py` judges, whose --directory it needs.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from benchmarks.healing_subject import Subject
from benchmarks.healing_ways import DATA, DROPPED, WAYS
from benchmarks.options import ending, models
from benchmarks.record import RESULTS, add_out, finish
from benchmarks.table import rows
from llmdrop_vllm import DropMask, InputError, hf
from llmdrop_vllm.healing.ridge import Sums, fit
from llmdrop_vllm.healing.task import held_out_sequences
from llmdrop_vllm.scoring.batches import Batches
from llmdrop_vllm.scoring.layers import LayerStream
from llmdrop_vllm.scoring.scratch import Chunk

COUNT, RANKS = 8, (None, 256)
SOURCES = DATA["qwen2.5-coder-1.5b"]  # all that there are
HEALED = ("closed form", "closed form, then training", "closed form, then LoRA of rank 32")


class Map(nn.Module):
    """In attention's place: [batch, tokens, hidden] to the same; `weights` are [hidden + 1, hidden], the last row is
    the bias.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights, requires_grad=False)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """As attention returns it."""
        return hidden_states @ self.weights[:-1] + self.weights[-1], None


class Streams:
    """The teacher's residual stream and one of the model with maps, by chunk: [batch, tokens, hidden]."""

    def __init__(self, subject: Subject, count: int) -> None:
        way = next(each for each in WAYS[subject.name][count] if each.name == "closed form")
        data = subject.learnt_from(way.data, way.tokens)
        self.batches, self.held_out = Batches(data, 2048), held_out_sequences(data)
        dtype = getattr(torch, way.dtype or "float32")
        whole = subject.checkpoint.under(subject.checkpoint.mask)
        self.layers = LayerStream(whole, device=torch.device("cpu"), dtype=dtype, attention="sdpa")
        with self.layers.embedding() as begin, torch.inference_mode():
            self.teacher = [begin(self.batches.token_ids(chunk)) for chunk in self.batches.chunks]
        self.student = list(self.teacher)

    def maps(self, dropped: tuple[int, ...]) -> dict[int, torch.Tensor]:
        """By layer without attention, the weights of its map, float32."""
        found = {}
        with torch.inference_mode():
            for index in tqdm(range(len(self.layers.layers))):
                with self.layers.layer(index) as layer:
                    if index in dropped:
                        found[index] = self._fitted(layer, index)
                    for place, chunk in enumerate(self.batches.chunks):
                        together = self.student[place] is self.teacher[place] and index not in dropped
                        after = self._through(layer, index, self.teacher[place], chunk)
                        with replaced(layer, found.get(index)):
                            student = self.student[place]
                            self.student[place] = after if together else self._through(layer, index, student, chunk)
                        self.teacher[place] = after
        return found

    def _through(self, layer: nn.Module, index: int, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        call = self.layers.call(index, chunk.shape)
        output = layer(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _fitted(self, layer: Any, index: int) -> torch.Tensor:
        """By what the teacher's stream has before its MLP and the student's lacks, a token's error by its share."""
        size = self.layers.hidden_size
        learnt, held_out = (
            Sums(size + 1, size, torch.device("cpu"), rounded=self.layers.dtype == torch.bfloat16) for _ in range(2)
        )
        for place, chunk in enumerate(self.batches.chunks):
            truth, student = self.teacher[place], self.student[place]
            call = self.layers.call(index, chunk.shape)
            attended, _ = layer.self_attn(layer.input_layernorm(truth), *call.args, **call.kwargs)
            truth = (truth + attended).float()
            weights = truth.norm(dim=-1, keepdim=True).reciprocal()
            x = layer.input_layernorm(student).float()
            z, e = torch.cat([x, torch.ones_like(x[..., :1])], -1) * weights, (truth - student.float()) * weights
            counted, first = self.batches.counted(chunk), chunk.first_sequence
            judging = torch.tensor(self.held_out[first : first + chunk.batch])[:, None]
            for sums, those in ((learnt, counted & ~judging), (held_out, counted & judging)):
                sums.add(z[those], e[those])
        best = fit(learnt, held_out)
        if best is None:
            raise InputError(f"no map of layer {index} makes its held-out error smaller")
        tqdm.write(f"layer {index}: lambda {best.ridge:.3g}, {best.error_left:.0%} of the held-out error left")
        return best.delta


@contextmanager
def replaced(layer: Any, weights: torch.Tensor | None) -> Iterator[None]:
    """Within this context a map stands where attention was; None: nothing changes."""
    attention = layer.self_attn
    if weights is not None:
        layer.self_attn = Map(weights.to(layer.input_layernorm.weight.dtype))
    try:
        yield
    finally:
        layer.self_attn = attention


def of_rank(weights: torch.Tensor, rank: int | None) -> torch.Tensor:
    """The map with the largest directions only; its bias stays."""
    if rank is None:
        return weights
    u, s, v = torch.linalg.svd(weights[:-1], full_matrices=False)
    return torch.cat([u[:, :rank] * s[:rank] @ v[:rank], weights[-1:]])


def judged(subject: Subject, maps: dict[int, torch.Tensor]) -> dict[str, float]:
    """KL on held-out answers of each kind with maps in place."""
    found = {}
    for source, reference in subject.references.items():
        layers = hf.decoder_layers(reference.model, subject.checkpoint.mask.num_hidden_layers)
        with ExitStack() as stack:
            for index, weights in maps.items():
                stack.enter_context(replaced(layers[index], weights))
            found[source] = round(reference.by(reference.model).kl.value, 4)
    return found


def measure(subject: Subject, mask: DropMask) -> dict[str, dict[str, float]]:
    """By way: maps of each rank, and what healing was judged to regain under the same mask."""
    path = subject.directory / f"maps-{'-'.join(map(str, sorted(mask.attention)))}.safetensors"
    if not path.exists():
        fitted = Streams(subject, COUNT).maps(mask.attention)
        save_file({str(index): weights.contiguous() for index, weights in fitted.items()}, path)
    maps = {int(index): weights for index, weights in load_file(path).items()}
    known = json.loads((RESULTS / "healing.json").read_text())["points"]
    points = {
        each["way"]: {source: value["kl"] for source, value in each["judged"].items()}
        for each in known
        if (each["model"], each["n"]) == (subject.name, COUNT) and each["way"] in (DROPPED, *HEALED)
    }
    for rank in RANKS:
        name = "linear maps" if rank is None else f"linear maps of rank {rank}"
        points[name] = judged(subject, {index: of_rank(weights, rank) for index, weights in maps.items()})
    return points


def table(points: dict[str, dict[str, dict[str, float]]]) -> str:
    """For people."""
    lines = []
    for name, ways in points.items():
        for way, kl in ways.items():
            regained = "" if way == DROPPED else f"{1 - kl['answers'] / ways[DROPPED]['answers']:.0%}"
            lines.append((name, COUNT, way, kl["answers"], regained, *(kl.get(each, "") for each in SOURCES[1:])))
    head = ("model", "n", "way", *(f"KL, {each}" for each in SOURCES[:1]), "regained")
    return f"# Maps in attention's place\n\n{rows((*head, *(f'KL, {each}' for each in SOURCES[1:])), lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(WAYS), metavar="A,B")
    parser.add_argument("--directory", type=Path, default=Path("healing"), metavar="DIR", help="of `healing.py`")
    add_out(parser)
    args = parser.parse_args()
    with ending("healing_maps"):
        out = args.out or RESULTS / "healing_maps.json"
        points = json.loads(out.read_text())["points"] if out.exists() else {}
        for name in models(args.models, WAYS):
            subject = Subject(name, args.directory / name, RESULTS / "real" / name)
            points[name] = measure(subject, subject.mask(COUNT, None))
            finish("healing_maps", {"points": points}, args.out, table=table(points))


if __name__ == "__main__":
    main()
