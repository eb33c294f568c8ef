"""Sequences cut into chunks that go through a layer together, padded at their right where they differ in length.

Every layer here looks back only, so padding changes nothing of what stands before it; it is computed and not counted.
"""

from dataclasses import dataclass

import numpy as np
import torch

from llmdrop_vllm.data.tokens import Calibration, TokenIds
from llmdrop_vllm.scoring.scratch import Chunk, chunks

# Of lengths that differ, so that few shapes stand for many of them.
PADDED_TO_MULTIPLES_OF = 32


@dataclass
class Batches:
    """Token ids by chunk. `starts` are, per sequence, the first position that counts, `counts` how many do. `chunks`
    are in the order of the sequences, and positions in them count padding, as `tokens` does: what goes through a layer.
    """

    calibration: Calibration
    tokens_per_chunk: int

    def __post_init__(self) -> None:
        self.sequences = self.calibration.sequences
        # Where it does not say what counts, everything does.
        self.starts = self.calibration.starts or (0,) * len(self.sequences)
        self.counts = [len(each) - start for each, start in zip(self.sequences, self.starts, strict=True)]
        lengths = [len(sequence) for sequence in self.sequences]
        if len({*lengths}) > 1:
            lengths = [-(-length // PADDED_TO_MULTIPLES_OF) * PADDED_TO_MULTIPLES_OF for length in lengths]
        self.tokens = sum(lengths)
        self.chunks = tuple(chunks(lengths, self.tokens_per_chunk))

    def token_ids(self, chunk: Chunk) -> torch.Tensor:
        """[batch, tokens]; padding repeats a sequence's last token, which every model knows."""
        rows = [np.pad(each, (0, chunk.tokens - len(each)), mode="edge") for each in self._of(chunk)]
        return torch.from_numpy(np.stack(rows))

    def spans(self, chunk: Chunk) -> list[slice]:
        """Per sequence of a chunk, the positions that count."""
        first = chunk.first_sequence
        starts = self.starts[first : first + chunk.batch]
        return [slice(start, len(each)) for start, each in zip(starts, self._of(chunk), strict=True)]

    def counted(self, chunk: Chunk) -> torch.Tensor:
        """Whether each position counts, [batch, tokens]."""
        found = torch.zeros(chunk.shape, dtype=torch.bool)
        for row, span in zip(found, self.spans(chunk), strict=True):
            row[span] = True
        return found

    def counted_positions(self) -> np.ndarray:
        """Of all that counts, the places among all tokens with padding."""
        return np.flatnonzero(np.concatenate([self.counted(chunk).flatten().numpy() for chunk in self.chunks]))

    def _of(self, chunk: Chunk) -> tuple[TokenIds, ...]:
        return self.sequences[chunk.first_sequence : chunk.first_sequence + chunk.batch]
