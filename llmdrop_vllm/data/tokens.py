"""Token ids of a model: sequences of them to calibrate with, how many there are, and the tokenizer that gives them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmdrop_vllm.artifacts import DataIdentity
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import CheckpointError, DataError

# Whatever else may be there, a tokenizer needs one of these; without, Transformers makes some up that know no word.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")

TokenIds = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Calibration:
    """What to score with: `sequences` are token ids, each [tokens]; those of token-id files and answers may differ in
    length. `starts` are the first positions that count, which predict an answer's first token; empty where all do.
    """

    sequences: tuple[TokenIds, ...]
    identity: DataIdentity
    starts: tuple[int, ...] = ()

    @property
    def predicted(self) -> tuple[int, ...]:
        """How many tokens of each sequence are predicted where it counts: those of an answer."""
        starts = self.starts or (0,) * len(self.sequences)
        return tuple(len(each) - start - 1 for each, start in zip(self.sequences, starts, strict=True))


def vocab_size(checkpoint: Checkpoint) -> int:
    """Of the model. Raises CheckpointError where the config does not say."""
    size = checkpoint.decoder.config.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{checkpoint.directory}/config.json: vocab_size is {size!r}; expected 1 or more")
    return size


def load_tokenizer(checkpoint: Checkpoint, remedy: str) -> Any:
    """The checkpoint's own. Raises DataError, which ends in the remedy, where there is none that can be loaded."""
    from transformers import AutoTokenizer

    directory = checkpoint.directory
    if not any(file for pattern in TOKENIZER_FILES for file in directory.glob(pattern)):
        raise DataError(f"{directory} has no tokenizer; {remedy}")
    try:
        # Without a length of its own it does not warn of long texts: they are cut here on purpose.
        options = {"trust_remote_code": False, "local_files_only": True, "model_max_length": 1 << 40}
        return AutoTokenizer.from_pretrained(directory, **options)
    except Exception as error:  # Transformers lets through whatever a damaged file or a missing package causes
        raise DataError(f"{directory}: the tokenizer cannot be loaded: {error}; {remedy}") from error
