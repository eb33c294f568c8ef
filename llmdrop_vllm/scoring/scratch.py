"""What a run through the layers keeps on disk: the hidden states between two layers, and how far it has come.

Memory then depends neither on the number of samples nor on the depth, and an interrupted run goes on where it was. The
system's page cache holds the files as far as memory is free.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llmdrop_vllm.artifacts import Record, hold, make_directory, read_record, write_record
from llmdrop_vllm.checkpoints.shards import read_exactly
from llmdrop_vllm.errors import InputError, OutputError, refusing

# What a run leaves in its directory: whoever names one of their own must not lose what else is there.
OWN_FILES = ("progress.json", ".progress.json.*.partial")

# Title, passes of all chunks through a layer, and what does them and gives what is kept of it.
Step = tuple[str, int, Callable[["tqdm[Any]"], dict[str, Any]]]


class Progress(Record):
    """A run's results so far; `run` identifies what was asked, so that another run's are never taken up."""

    run: str
    layers: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """Consecutive sequences of one length that go through a layer together."""

    first_sequence: int
    first_token: int
    batch: int
    tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        """[batch, tokens]."""
        return self.batch, self.tokens


def chunks(lengths: Sequence[int], tokens_per_chunk: int) -> Iterator[Chunk]:
    """Cut sequences of these lengths into chunks of at most so many tokens, and at least one sequence."""
    first, position = 0, 0
    for tokens, alike in groupby(lengths):
        count, step = len([*alike]), max(1, tokens_per_chunk // tokens)
        for done in range(0, count, step):
            yield Chunk(first, position, batch := min(step, count - done), tokens)
            first, position = first + batch, position + batch * tokens


class HiddenStates:
    """The residual stream of all calibration tokens at one depth, on disk: [tokens, hidden] in the model's dtype.

    A layer reads one file and writes the other, so a layer that is interrupted has lost nothing.
    """

    def __init__(self, directory: Path, hidden_size: int, dtype: torch.dtype, name: str = "hidden") -> None:
        self.directory, self.hidden_size, self.dtype, self.name = directory, hidden_size, dtype, name
        self.token_bytes = hidden_size * dtype.itemsize

    def path(self, depth: int) -> Path:
        """The file for the input of layer `depth`."""
        return self.directory / f"{self.name}-{depth % 2}.bin"

    def read(self, depth: int, chunk: Chunk) -> torch.Tensor:
        """A chunk of layer `depth`'s input, [batch, tokens, hidden]."""
        hidden = torch.empty(*chunk.shape, self.hidden_size, dtype=self.dtype)
        with self.path(depth).open("rb") as file:
            read_exactly(file, chunk.first_token * self.token_bytes, _bytes(hidden))
        return hidden

    def write(self, depth: int, chunk: Chunk, hidden: torch.Tensor) -> None:
        """Store a chunk of layer `depth`'s input."""
        _write(self.path(depth), hidden.to("cpu", self.dtype).contiguous(), chunk.first_token * self.token_bytes)


class GapHistory:
    """Unit vectors of some tokens at every depth, on disk, to compare any depth with all before: float32."""

    def __init__(self, path: Path, tokens: np.ndarray, hidden_size: int) -> None:
        self.path, self.tokens, self.hidden_size = path, tokens, hidden_size

    def put(self, depth: int, first_token: int, hidden: torch.Tensor) -> None:
        """Store what is sampled of consecutive tokens' hidden states [tokens, hidden] at a depth."""
        start, stop = np.searchsorted(self.tokens, [first_token, first_token + len(hidden)])
        if start == stop:
            return
        rows = torch.from_numpy(self.tokens[start:stop] - first_token).to(hidden.device)
        units = torch.nn.functional.normalize(hidden[rows].float(), dim=-1).cpu()
        _write(self.path, units, (depth * len(self.tokens) + int(start)) * self.hidden_size * 4)

    def similarities(self, depth: int) -> list[float]:
        """Mean cosine similarity between a depth and each depth before it."""
        totals = [0.0] * depth
        step = max(1, 2**20 // self.hidden_size)
        with self.path.open("rb") as file:
            for first in range(0, len(self.tokens), step):
                count = min(step, len(self.tokens) - first)
                ours, other = (torch.empty(count, self.hidden_size) for _ in range(2))
                for before, tile in [(depth, ours), *((before, other) for before in range(depth))]:
                    offset = (before * len(self.tokens) + first) * self.hidden_size * 4
                    read_exactly(file, offset, _bytes(tile))
                    if tile is other:
                        totals[before] += torch.dot(ours.view(-1), other.view(-1)).item()
        return [total / len(self.tokens) for total in totals]


class Scratch:
    """A run's directory: made, taken up again or thrown away. What others have put into it stays: all but `files`, as
    patterns of names.
    """

    def __init__(self, directory: Path, run: str, needed_bytes: int, files: Sequence[str]) -> None:
        self.directory, self.state, self.files = directory, directory / "progress.json", (*files, *OWN_FILES)
        self.lock = ExitStack()
        make_directory(directory)
        with refusing(f"{directory} cannot be used"):
            self.lock.callback(os.close, hold(directory, "scoring or healing with it"))
        self.progress = self._found(run)
        if not self.progress.layers:
            self._empty()
            free = shutil.disk_usage(directory).free
            if free < needed_bytes:
                self.remove()
                raise OutputError(
                    f"{directory.parent} has {free:,} bytes free; the hidden states need {needed_bytes:,}"
                )

    def go_on(
        self, steps: Sequence[Step], chunks: int, embed: Callable[[bool], object], *, progress: bool
    ) -> tuple[dict[str, Any], ...]:
        """What each step gave; those done are not done again. `embed` is told whether this is the beginning."""
        done, passes = len(self.progress.layers), [each for _, each, _ in steps]
        total, initial = sum(passes) * chunks, sum(passes[:done]) * chunks
        with tqdm(total=total, initial=initial, unit="chunk", disable=not progress) as bar:
            bar.set_description("embedding")
            embed(not done)
            for title, _, do in steps[done:]:
                bar.set_description(title)
                self.save(do(bar))
        return self.progress.layers

    def save(self, layer: dict[str, Any]) -> None:
        """Record that a layer is done; its output must be on disk by now."""
        self.progress = Progress(run=self.progress.run, layers=(*self.progress.layers, layer))
        write_record(self.progress, self.state)

    def remove(self) -> None:
        """The run is over."""
        with suppress(OSError):  # others' files are there too, or it cannot be removed: no reason to lose the scores
            self._empty()
            self.directory.rmdir()
        self.lock.close()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Removed in the end; where an error ends it, left for another process, or a later run of this one, to take up.
        Within this context, what the system refuses is an OutputError that names the place.
        """
        try:
            yield
            self.remove()
        except OSError as error:
            place = error.filename or self.directory
            raise OutputError(f"{place} cannot be used: {error.strerror or error}") from error
        finally:
            self.lock.close()

    def _empty(self) -> None:
        for pattern in self.files:
            for path in self.directory.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _found(self, run: str) -> Progress:
        with suppress(InputError):  # there is none, or it is not ours
            found = read_record(Progress, self.state)
            if found.run == run:
                return found
        return Progress(run=run)


def _write(path: Path, tensor: torch.Tensor, offset: int) -> None:
    with path.open("r+b" if path.exists() else "wb") as file:
        file.seek(offset)
        file.write(_bytes(tensor))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
