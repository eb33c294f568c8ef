"""Each source gives all its text, in an order that the seed decides; what cannot be read is named."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from llmdrop_vllm.data import texts
from llmdrop_vllm.embedded.corpus import ASSISTANT, END, USER, Document
from llmdrop_vllm.errors import DataError

DOCUMENTS = [Document(f"subject {n}", f"question {n}", f"answer {n}") for n in range(100)]
MIXED = "Ein Satz über Äpfel, 文字 und 🙂. " * 600


def in_seeded_order(source):
    """What `source` gives for a seed, which must be the same again and for another seed in another order."""
    first, again, other = ([*source(seed)] for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)
    return first


@pytest.mark.parametrize("missing", [None, END, USER, ASSISTANT])
def test_embedded_text_is_what_was_trained_on_with_markers_if_all_are_known(monkeypatch, missing):
    monkeypatch.setattr(texts, "documents", lambda: iter(DOCUMENTS))
    vocabulary = {END, USER, ASSISTANT} - {missing}
    found = in_seeded_order(lambda seed: texts.embedded(vocabulary, np.random.default_rng(seed)))
    trained = [document for document in DOCUMENTS if not document.held_out]
    assert 0 < len(trained) < 100
    assert set(found) == {f"{each.question}\n{each.answer}" if missing else each.text for each in trained}


def test_json_lines_are_all_read_but_for_blank_ones(tmp_path):
    expected = [f"document {n}" for n in range(200)]
    lines = [json.dumps({"text": text, "url": "x"}) for text in expected]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines) + '\r\n{"text": "  "}', encoding="utf-8")
    found = in_seeded_order(lambda seed: texts.json_lines(tmp_path / "a.jsonl", np.random.default_rng(seed)))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.jsonl \(0 bytes\) holds no text"),
        (b'\n{"text": " "}\n', r"a\.jsonl \(15 bytes\) holds no text"),
        (b'{"text": "a"}\n\n{"text": "a"\n', r"a\.jsonl, line 3: Invalid JSON"),
        (b'{"text": "a"}\n{"texts": "a"}\n', r'line 2: Field required; expected an object with .*"text"'),
        (b'{"text": ["a"]}', r"line 1: .*valid string"),
        (b"[1, 2]", r"line 1: .*object"),
        (b"\x00\xff\x80 binary", r"line 1: Invalid JSON"),
        (b'{"text": "\xff"}', r"line 1: Invalid JSON"),
        (b'{"text": "a"}\n{"text": "' + b"x" * (3 << 20), "line 2 is longer than 2 MiB"),
    ],
)
def test_unusable_json_lines_are_named_before_the_first_text(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(texts, "MAX_LINE_BYTES", 2 << 20)
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        next(texts.json_lines(tmp_path / "a.jsonl", np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.txt \(0 bytes\) holds no text"),
        (b"\xef\xbb\xbf \n\t\n", r"a\.txt \(7 bytes\) holds no text"),
        (b"x" * (1 << 20) + b"ab \0c", "binary: a NUL at byte 1048579"),
        (b"\xef\xbb\xbf" + b"x" * ((1 << 20) - 4) + b"\xc3(", "not UTF-8: .* at byte 1048575"),
        (b"cut off \xe5\xad", "not UTF-8: .* at byte 8"),
        (b"\x80" * (2 << 20), "not UTF-8: .* at byte 0"),
    ],
)
def test_unusable_text_is_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts.check_text(tmp_path / "a.txt")


@pytest.mark.parametrize("text", [MIXED, "字符之间没有空格" * 4000, "\n" * 5000 + "end"])
@pytest.mark.parametrize("piece_bytes", [1000, 4096, 1 << 20])
def test_pieces_of_a_file_are_cut_between_characters_and_add_up(tmp_path, monkeypatch, text, piece_bytes):
    monkeypatch.setattr(texts, "READ_BYTES", piece_bytes)
    path = tmp_path / "a.txt"
    path.write_text("\ufeff" + text, encoding="utf-8")
    texts.check_text(path)
    starts = range(0, path.stat().st_size, piece_bytes)
    found = [*texts.file_pieces(path, piece_bytes, starts)]
    assert "".join(piece for piece, _ in found) == text
    assert [begins for _, begins in found] == [True] + [False] * (len(starts) - 1)
    if text == MIXED:
        assert all(piece.startswith(" ") for piece, _ in found[1:])
    # Pieces from the middle on are a document too.
    assert [*texts.file_pieces(path, piece_bytes, starts[1:])] == [
        (piece, n == 0) for n, (piece, _) in enumerate(found[1:])
    ]


def test_a_long_text_comes_in_pieces_of_one_document(monkeypatch):
    monkeypatch.setattr(texts, "PIECE_CHARS", 4)
    assert [*texts.in_pieces(["abcdefghi", "", "jklm"])] == [
        ("abcd", True),
        ("efgh", False),
        ("i", False),
        ("jklm", True),
    ]


class Stream(list):
    """As much of datasets.IterableDataset as is used; an exception among the rows is raised."""

    def shuffle(self, *, seed, buffer_size):
        for index in np.random.default_rng(seed).permutation(len(self)):
            if isinstance(self[index], Exception):
                raise self[index]
            yield self[index]


def rows(word):
    return Stream({"text": text, "id": 1} for text in (f"{word} 1", f"{word} 2", f"{word} 3", " "))


@pytest.fixture
def hub(monkeypatch):
    """What a `datasets` module finds on its hub: {(name, config): {split: rows} or an exception}."""
    held = {
        ("org/data-1.5", None): {"train": rows("trained"), "validation": rows("validated")},
        ("org/data-1.5", "en"): {"test": rows("tested"), "train": rows("english")},
        ("unnamed", None): ValueError("Config name is missing"),
        ("tests-only", None): {"test": rows("tested")},
        ("columns", None): {"train": Stream([{"content": "a", "id": 1}])},
        ("broken", None): {"train": Stream([ConnectionError("the hub is gone")])},
    }

    def load_dataset(name, config=None, *, streaming):
        assert streaming
        found = held.get((name, config), FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub"))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ("org/data-1.5", "validated"),
        ("org/data-1.5:en", "english"),
        ("org/data-1.5:en:test", "tested"),
        ("org/data-1.5::train", "trained"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_dataset_is_streamed_from_the_split_asked_for(data, word):
    assert sorted(in_seeded_order(lambda seed: texts.dataset(data, seed))) == [f"{word} {n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing/data", "missing/data is no file, and as a dataset it cannot be read: .*doesn't exist"),
        ("unnamed", "unnamed is no file, .*: Config name is missing"),
        ("broken", "broken is no file, .*: the hub is gone"),
        ("org/data-1.5:en:dev", "has the splits test, train; expected dev"),
        ("tests-only", "has the splits test; expected validation or train"),
        ("columns", 'columns has columns content, id; expected strings in a column "text"'),
    ],
)
@pytest.mark.usefixtures("hub")
def test_an_unusable_dataset_is_named(data, message):
    with pytest.raises(DataError, match=message):
        next(texts.dataset(data, 0))


def test_a_dataset_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'llmdrop-vllm\[data\]'"):
        next(texts.dataset("org/data", 0))
