"""Text to calibrate with: the embedded corpus, a .jsonl, a dataset on the hub or pieces of a .txt.

All are generators, which read nothing before their first text is asked for and check a file before they give one.
"""

import codecs
import importlib
import re
from array import array
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from llmdrop_vllm.embedded.corpus import ASSISTANT, END, USER, documents
from llmdrop_vllm.errors import DataError

# Text is given in pieces, so that memory stays small however long a document is.
PIECE_CHARS, READ_BYTES, MAX_LINE_BYTES, CUT_BYTES = 65536, 1 << 20, 64 << 20, 256
DEFAULT_SPLITS, SHUFFLE_ROWS = ["validation", "train"], 10_000

Piece = tuple[str, bool]  # text, and whether a document begins with it


class TextLine(BaseModel):
    """A line of a .jsonl file; corpora have other fields beside the text."""

    model_config = ConfigDict(strict=True, extra="ignore")
    text: str


def in_pieces(texts: Iterable[str]) -> Iterator[Piece]:
    """Each text as one document, cut where it is longer than PIECE_CHARS characters."""
    for text in texts:
        for start in range(0, len(text), PIECE_CHARS):
            yield text[start : start + PIECE_CHARS], start == 0


def embedded(vocabulary: Container[str], rng: np.random.Generator) -> Iterator[str]:
    """What the embedded model was trained on; with its chat markers only where the vocabulary has them as tokens."""
    markers = all(marker in vocabulary for marker in (END, USER, ASSISTANT))
    found = [document for document in documents() if not document.held_out]
    for index in rng.permutation(len(found)):
        document = found[index]
        yield document.text if markers else f"{document.question}\n{document.answer}"


def json_lines(path: Path, rng: np.random.Generator) -> Iterator[str]:
    """Texts in random order. Every line is checked first; only where the lines begin is kept in memory."""
    starts = array("q")
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
            if len(line) == MAX_LINE_BYTES:
                raise DataError(f"{path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB; expected JSON lines")
            if line.strip() and _text(path, number, line).strip():
                starts.append(file.tell() - len(line))
        if not starts:
            raise DataError(f"{path} ({file.tell()} bytes) holds no text")
        for index in rng.permutation(len(starts)):
            file.seek(starts[index])
            yield _text(path, 0, file.readline())


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        return TextLine.model_validate_json(line.removeprefix(codecs.BOM_UTF8)).text
    except ValidationError as error:
        problem = error.errors()[0]["msg"].replace("at line 1 column", "at column")
        raise DataError(f'{path}, line {number}: {problem}; expected an object with a string "text"') from None


def dataset(data: str, seed: int) -> Iterator[str]:
    """Texts of NAME[:CONFIG[:SPLIT]] on the hub, shuffled within a buffer: it is streamed, not downloaded."""
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise DataError(f"{data} is no file; a dataset's name needs: pip install 'llmdrop-vllm[data]'") from None
    name, config, split, *_ = *data.split(":"), "", ""
    wanted = [split] if split else DEFAULT_SPLITS
    try:
        found = library.load_dataset(name, config or None, streaming=True)
        usable = [each for each in wanted if each in found]
        if not usable:
            raise DataError(f"{data} has the splits {', '.join(found)}; expected {' or '.join(wanted)}")
        for row in found[usable[0]].shuffle(seed=seed, buffer_size=SHUFFLE_ROWS):
            if not isinstance(text := row.get("text"), str):
                raise DataError(f'{data} has columns {", ".join(row)}; expected strings in a column "text"')
            if text.strip():
                yield text
    except DataError:
        raise
    except Exception as error:  # whatever its network libraries raise
        raise DataError(f"{data} is no file, and as a dataset it cannot be read: {error}") from error


def check_text(path: Path) -> None:
    """Raise DataError for a file that is not UTF-8 text, read once from end to end."""
    size, blank = path.stat().st_size, True
    for at, data in _cut_at(path, READ_BYTES, range(0, size, READ_BYTES)):
        if (nul := data.find(b"\0")) >= 0:
            raise DataError(f"{path} is binary: a NUL at byte {at + nul}; expected UTF-8 text")
        try:
            blank &= not data.decode().removeprefix("\ufeff").strip()
        except UnicodeDecodeError as error:
            problem = f"{error.reason} at byte {at + error.start}"
            raise DataError(f"{path} is not UTF-8: {problem}; expected UTF-8 text") from None
    if blank:
        raise DataError(f"{path} ({size} bytes) holds no text")


def file_pieces(path: Path, piece_bytes: int, starts: Iterable[int]) -> Iterator[Piece]:
    """Adjacent pieces of a text file as one document, cut before white space where there is some."""
    for number, (_, data) in enumerate(_cut_at(path, piece_bytes, starts)):
        yield data.decode("utf-8-sig"), number == 0


def _cut_at(path: Path, piece_bytes: int, starts: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Where pieces of a file really begin, at or soon after `starts`, and their bytes."""
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            data = file.read(piece_bytes + CUT_BYTES)
            first = _cut(data, 0) if start else 0
            yield start + first, data[first : _cut(data, piece_bytes)]


def _cut(data: bytes, at: int) -> int:
    """Where to cut near `at`: the next white space, or else the next character's first byte."""
    window = data[at : at + CUT_BYTES]
    found = re.search(rb"\s", window) or re.search(rb"[^\x80-\xbf]", window)
    return min(at, len(data)) + (found.start() if found else len(window))
