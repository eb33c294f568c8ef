"""Token ids to calibrate and evaluate with: the same source, sizes and seed give the same ones."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from llmdrop_vllm.artifacts import DataIdentity, sha256
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.answers import is_answers, load_answers
from llmdrop_vllm.data.texts import Piece, check_text, dataset, embedded, file_pieces, in_pieces, json_lines
from llmdrop_vllm.data.tokens import Calibration, TokenIds, load_tokenizer, vocab_size
from llmdrop_vllm.embedded import held_out
from llmdrop_vllm.errors import DataError, refusing

EMBEDDED, HELD_OUT, DATASETS = "embedded", "held-out", "datasets"
FILES = (".txt", ".jsonl", ".json")
ACCEPTED = (
    "'embedded', 'held-out', a .txt, a .jsonl with a \"text\" field per line or of `llmdrop answers`, a .json list of "
    "token-id lists, or the name of a dataset on the hub (NAME[:CONFIG[:SPLIT]])"
)
DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[^:/]*)?(:[^:/]+)?")
DEFAULT_SAMPLES, DEFAULT_SEQ_LEN = 256, 2048
# More than most tokenizers reach on most text (4 in English prose): how much of a large file to read at first.
BYTES_PER_TOKEN, MIN_PIECE_BYTES = 8, 4096


def load_calibration(
    checkpoint: Checkpoint,
    data: str = EMBEDDED,
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    fewer: bool = False,
) -> Calibration:
    """Token ids for a model: `samples` windows of `seq_len` tokens of text, or a token-id file's sequences as they are.

    By default 256 windows of 2048 tokens, or of the model's context where that is shorter; of a token-id file all
    sequences, of answers all that are not held out. With `fewer`, data that does not suffice for `samples` gives what
    it has, one window at least. Raises DataError for data that cannot be used or does not suffice, before it tokenizes
    anything.
    """
    context = checkpoint.context
    _check_sizes(samples, seq_len, seed, context)
    with refusing(f"{data} cannot be read", DataError):
        if (kind := _kind(data)) == ".jsonl" and is_answers(Path(data)):
            if seq_len:
                raise DataError(f"{data} holds answers, which are used as they are: ask for no length")
            found = load_answers(checkpoint, Path(data), held_out=False, samples=samples)
            # As asked for, though nothing is drawn here: whoever goes on with scores compares both.
            return replace(found, identity=found.identity.model_copy(update={"source": data, "seed": seed}))
        if kind == ".json":
            sequences = _token_ids(Path(data), vocab_size(checkpoint), context, samples, seq_len)
        else:
            seq_len = seq_len or min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN)
            samples = samples or DEFAULT_SAMPLES
            least = 1 if fewer else samples
            sequences = [*_windows(_Encoder(checkpoint), kind, data, samples, seq_len, seed, least)]
    lengths = {len(sequence) for sequence in sequences}
    identity = DataIdentity(
        source=data,
        sequences=len(sequences),
        tokens=sum(map(len, sequences)),
        seq_len=lengths.pop() if len(lengths) == 1 else None,
        seed=seed,
        sha256=sha256(sequence.tolist() for sequence in sequences),
    )
    return Calibration(tuple(sequences), identity)


def _check_sizes(samples: int | None, seq_len: int | None, seed: int, context: int | None) -> None:
    # In words: the command's options for them are not the same everywhere.
    asked = (("number of sequences", samples, 1), ("tokens in a sequence", seq_len, 2), ("seed", seed, 0))
    for name, value, least in asked:
        if value is not None and value < least:
            raise DataError(f"{name}: {value} asked; expected at least {least}")
    if seq_len and context and seq_len > context:
        raise DataError(f"sequences of {seq_len} tokens asked; the model's context is {context} tokens")


def _kind(data: str) -> str:
    """EMBEDDED, HELD_OUT, DATASETS or the suffix of an existing file."""
    path = Path(data)
    suffix = path.suffix.lower()
    if data in (EMBEDDED, HELD_OUT):
        return data
    if path.is_file() and suffix in FILES:
        return suffix
    if path.exists():
        raise DataError(f"{data} is {f'a {suffix!r} file' if path.is_file() else 'not a file'}; expected {ACCEPTED}")
    # Datasets without an owner have plain names, so one with a dot is a misspelt file.
    if suffix in FILES or not DATASET_NAME.fullmatch(data) or (suffix and "/" not in data):
        raise DataError(f"{data}: file not found; expected {ACCEPTED}")
    return DATASETS


def _token_ids(
    path: Path, vocab_size: int, context: int | None, samples: int | None, seq_len: int | None
) -> list[TokenIds]:
    """The first `samples` sequences of a token-id file."""
    token_id = Annotated[int, Field(strict=True, ge=0, lt=vocab_size)]
    sequence = Annotated[list[token_id], Field(min_length=2, max_length=context)]
    try:
        found = TypeAdapter(list[sequence]).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        at = ", ".join(f"{what} {index}" for what, index in zip(("sequence", "position"), first["loc"], strict=False))
        problem = f"{at} (from 0) is {first['input']!r:.40}: {first['msg']}" if at else first["msg"]
        lengths = f"2 to {context}" if context else "2 or more"
        raise DataError(
            f"{path}: {problem}; expected a list of lists of {lengths} token ids of this model, 0 to {vocab_size - 1}"
        ) from None
    if len(found) < (samples or 1):
        raise DataError(f"{path} holds {len(found)} sequences; {samples or 'at least 1'} asked")
    for row, ids in enumerate(found := found[:samples]):
        if seq_len and len(ids) != seq_len:
            problem = f"sequence {row} (from 0) has {len(ids)} token ids, and {seq_len} were asked"
            raise DataError(f"{path}: {problem}; token ids are used as they are: ask for no length")
    return [np.array(ids, np.int64) for ids in found]


@dataclass(frozen=True)
class _Encoder:
    """The checkpoint's tokenizer, loaded when first needed: by then the data has been found usable."""

    checkpoint: Checkpoint

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint, "give token ids instead, in a .json list of lists")

    def encode(self, pieces: Iterable[Piece], enough: int | None = None) -> TokenIds:
        """[tokens] of the pieces end to end, with special tokens where a document begins; stops at `enough` tokens."""
        found, total = [np.empty(0, np.int64)], 0
        for text, begins in pieces:
            found.append(np.array(self.tokenizer(text, add_special_tokens=begins)["input_ids"], np.int64))
            total += len(found[-1])
            if enough and total >= enough:
                break
        token_ids = np.concatenate(found)
        if total and (largest := int(token_ids.max())) >= (size := vocab_size(self.checkpoint)):
            where = self.checkpoint.directory
            raise DataError(f"{where}: the tokenizer gives token id {largest}; vocab_size is {size}")
        return token_ids


def _windows(encoder: _Encoder, kind: str, data: str, samples: int, seq_len: int, seed: int, least: int) -> TokenIds:
    """[samples, seq_len] from text, or `least` rows at least."""
    rng = np.random.default_rng(seed)
    if kind == ".txt":
        check_text(Path(data))
        token_ids = _file_tokens(encoder, Path(data), samples, seq_len, rng)
    else:
        if kind == EMBEDDED:
            texts = embedded(encoder.tokenizer.get_vocab(), rng)
        elif kind == HELD_OUT:
            texts = iter(held_out().values())
        else:
            texts = dataset(data, seed) if kind == DATASETS else json_lines(Path(data), rng)
        token_ids = encoder.encode(in_pieces(texts), samples * seq_len)
    count = len(token_ids) // seq_len
    if count < least:
        found = f"{count} sequences of {seq_len} tokens ({len(token_ids):,} tokens)"
        remedy = f"give more data, or ask for {f'{count}, or for ' if count else ''}shorter ones"
        raise DataError(f"{data} holds {found}; {least} asked; {remedy}")
    windows = token_ids[: count * seq_len].reshape(count, seq_len)
    samples = min(count, samples)
    return windows[_spread(count, samples, rng)] if kind == ".txt" else windows[:samples]


def _spread(total: int, count: int, rng: np.random.Generator) -> TokenIds:
    """`count` ascending indices below `total`, one drawn from each of as many equal parts; all if they are fewer."""
    count = min(count, total)
    edges = np.arange(count + 1) * total // count
    return rng.integers(edges[:-1], edges[1:])


def _file_tokens(encoder: _Encoder, path: Path, samples: int, seq_len: int, rng: np.random.Generator) -> TokenIds:
    """Tokens of one document: of all of it, or whole windows of pieces spread over it, at least `samples` of them."""
    piece_bytes = max(MIN_PIECE_BYTES, BYTES_PER_TOKEN * seq_len)
    starts, count = range(0, path.stat().st_size, piece_bytes), samples
    while count < len(starts):
        indices = _spread(len(starts), count, rng)
        runs = np.split(indices * piece_bytes, np.flatnonzero(np.diff(indices) > 1) + 1)
        found = [encoder.encode(file_pieces(path, piece_bytes, run.tolist())) for run in runs]
        windows = np.concatenate([ids[: len(ids) // seq_len * seq_len] for ids in found])
        if len(windows) >= samples * seq_len:
            return windows
        count *= 4
    return encoder.encode(file_pieces(path, piece_bytes, starts))
