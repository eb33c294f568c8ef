"""Calibration tokens: the windows that each source should give, twice the same; what cannot be used is named."""

import json
import re
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from llmdrop_vllm.artifacts import DataIdentity, sha256
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data import calibration, texts
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.embedded.corpus import END, USER, documents
from llmdrop_vllm.errors import CheckpointError, DataError
from tests.data.files import with_vocabulary
from tests.tiny import TINY_LLAMA, golden, write_checkpoint

EMBEDDED = Checkpoint.open(MODEL)
TOKENIZER, OTHER_TOKENIZER = AutoTokenizer.from_pretrained(MODEL), (MODEL / "tokenizer.json").read_text()
SMALL = {"samples": 4, "seq_len": 16}
MISSING = ("missing.txt", "texts/missing.jsonl", "./missing", "/no/such/place", "a/b/c", "a.csv")


def ids_of(data, checkpoint=EMBEDDED, **sizes):
    return [sequence.tolist() for sequence in load_calibration(checkpoint, str(data), **sizes).sequences]


def json_lines(*found):
    return "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in found)


@pytest.fixture(scope="module")
def corpus():
    """The first fifth of the embedded documents, which suffices: it takes seconds to read all."""
    found = [*islice(documents(), 3000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "documents", lambda: found)
        yield {document.text.removesuffix(END) for document in found if not document.held_out}


@pytest.fixture
def begin_token(monkeypatch):
    """A tokenizer that, like Llama's, begins every document with a token of its own."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, model_max_length=1 << 40)
    token_id = tokenizer.convert_tokens_to_ids(USER)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{USER} $A", special_tokens=[(USER, token_id)])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    return token_id


def test_by_default_the_embedded_text_fills_256_windows_of_the_context(corpus):
    found = load_calibration(EMBEDDED)
    assert {(sequence.shape, sequence.dtype) for sequence in found.sequences} == {((1024,), np.dtype(np.int64))}
    identity = found.identity
    assert (identity.source, identity.sequences, identity.tokens, identity.seq_len) == ("embedded", 256, 2**18, 1024)
    whole = TOKENIZER.decode(np.concatenate(found.sequences)).split(END)[:-1]
    assert len(whole) > 1000
    assert corpus.issuperset(whole)


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "seq_length"])
def test_the_context_has_each_architectures_own_name(key):
    config = {name: value for name, value in EMBEDDED.config.items() if name != "max_position_embeddings"}
    with pytest.raises(DataError, match="sequences of 65 tokens asked; the model's context is 64 tokens"):
        load_calibration(replace(EMBEDDED, decoder=replace(EMBEDDED.decoder, config=config | {key: 64})), seq_len=65)


@pytest.mark.parametrize("source", ["embedded", "a.jsonl", "a.txt"])
@pytest.mark.usefixtures("corpus")
def test_same_tokens_have_the_same_hash_and_others_another(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json_lines(*(f"document {n} of many, " * 5 for n in range(200))))
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(20_000)))
    given, others = {"samples": 8, "seq_len": 64, "seed": 3}, ({}, {"seed": 4}, {"samples": 5}, {"seq_len": 17})
    first, again, *different = (load_calibration(EMBEDDED, source, **given | other) for other in ({}, *others))
    assert first.identity == again.identity
    assert np.array_equal(first.sequences, again.sequences)
    assert len({each.identity.sha256 for each in (first, *different)}) == 4


def test_special_tokens_stand_where_documents_begin_and_nowhere_else(tmp_path, begin_token):
    found = [f"number {n} " + "word " * 40 for n in range(50)]
    (tmp_path / "a.jsonl").write_text(json_lines(*found))
    ids = sum(ids_of(tmp_path / "a.jsonl", samples=20, seq_len=100), [])
    begins = [at for at, token_id in enumerate(ids) if token_id == begin_token]
    assert begins[0] == 0
    assert len(begins) > 20
    assert {after - before for before, after in pairwise(begins)} <= {len(TOKENIZER.encode(text)) + 1 for text in found}


@pytest.mark.parametrize("name", ["long.jsonl", "long.txt"])
def test_a_long_document_is_one_document(tmp_path, monkeypatch, begin_token, name):
    monkeypatch.setattr(texts, "PIECE_CHARS", 1000)
    text = " ".join(map(str, range(3000)))
    (tmp_path / name).write_text(text if name == "long.txt" else json_lines(text))
    found = sum(ids_of(tmp_path / name, samples=(1 + len(TOKENIZER.encode(text))) // 500, seq_len=500), [])
    assert text.startswith(TOKENIZER.decode(found).removeprefix(USER))
    assert [at for at, token_id in enumerate(found) if token_id == begin_token] == [0]


def test_a_name_that_is_no_file_is_a_dataset(monkeypatch):
    asked = []
    monkeypatch.setattr(calibration, "dataset", lambda *given: asked.append(given) or ["some words " * 100])
    names = ["plain", "org/data-1.5", "org/data-1.5:en", "org/data-1.5:en:test", "org/data::train"]
    assert all(len(ids_of(name, **SMALL, seed=7)) == 4 for name in names)
    assert asked == [(name, 7) for name in names]


@pytest.mark.parametrize(
    ("name", "content", "most_chars"),
    [
        ("a.jsonl", json_lines(*["some words " * 20] * 500), 4 * 220),
        ("a.txt", "some words " * 100_000, 5 * calibration.MIN_PIECE_BYTES),
    ],
)
def test_no_more_is_tokenized_than_the_windows_need(tmp_path, monkeypatch, name, content, most_chars):
    read, call = [], type(TOKENIZER).__call__
    monkeypatch.setattr(type(TOKENIZER), "__call__", lambda *given, **how: read.append(given[1]) or call(*given, **how))
    (tmp_path / name).write_text(content)
    ids_of(tmp_path / name, **SMALL)
    assert 1 <= sum(map(len, read)) <= most_chars


def test_a_small_text_file_is_cut_into_all_its_windows(tmp_path):
    text = "Ein Satz über Äpfel, 文字 und 🙂. " * 600
    (tmp_path / "a.txt").write_text("\ufeff" + text, encoding="utf-8")
    all_ids = TOKENIZER.encode(text)
    whole = all_ids[: len(all_ids) // 512 * 512]
    assert len(text.encode()) > 4 * calibration.MIN_PIECE_BYTES
    # Cut before white space, the pieces have the tokens that the whole has.
    assert sum(ids_of(tmp_path / "a.txt", samples=len(whole) // 512, seq_len=512), []) == whole


@pytest.mark.parametrize("seed", [0, 1])
def test_windows_are_spread_over_a_large_text_file(tmp_path, seed):
    whole = "".join(f"line {n:06}\n" for n in range(100_000))
    (tmp_path / "a.txt").write_text(whole)
    found = [TOKENIZER.decode(ids) for ids in ids_of(tmp_path / "a.txt", samples=10, seq_len=64, seed=seed)]
    assert all(text in whole for text in found)
    assert [int(re.search(r"line (\d{6})", text)[1]) // 10_000 for text in found] == [*range(10)]


def test_text_with_few_tokens_per_byte_is_read_on_but_not_to_the_end(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(calibration, "MIN_PIECE_BYTES", 16)
    monkeypatch.setattr(calibration, "BYTES_PER_TOKEN", 4)
    monkeypatch.setattr(calibration, "file_pieces", lambda *given: read.extend(given[2]) or texts.file_pieces(*given))
    (tmp_path / "a.txt").write_text("function argument return value\n" * 2000 + "1 2 3 4\n" * 1000)
    assert [len(sequence) for sequence in ids_of(tmp_path / "a.txt", samples=8, seq_len=16)] == [16] * 8
    assert 8 < len(read) < 500


def test_golden_token_ids_come_back_unchanged(tmp_path):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(golden_ids := golden("llama_scores")["calibration_token_ids"]))
    assert ids_of(path) == golden_ids
    assert ids_of(path, samples=3, seq_len=64) == golden_ids[:3]
    assert load_calibration(EMBEDDED, str(path)).identity == DataIdentity(
        source=str(path), sequences=4, tokens=256, seq_len=64, seed=0, sha256=sha256(golden_ids)
    )


def test_token_ids_may_differ_in_length_and_need_no_tokenizer(tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY_LLAMA))
    (tmp_path / "ids.json").write_text("[[5, 255], [0, 1, 2, 3]]")
    found = load_calibration(checkpoint, str(tmp_path / "ids.json"))
    assert [sequence.tolist() for sequence in found.sequences] == [[5, 255], [0, 1, 2, 3]]
    assert (found.identity.seq_len, found.identity.tokens) == (None, 6)
    assert ids_of(tmp_path / "ids.json", samples=1, seq_len=2) == [[5, 255]]


@pytest.mark.parametrize(
    ("name", "content", "sizes", "message"),
    [
        ("embedded", None, {"samples": 0}, "number of sequences: 0 asked; expected at least 1"),
        ("embedded", None, {"seq_len": 1}, "tokens in a sequence: 1 asked; expected at least 2"),
        ("embedded", None, {"seed": -1}, "seed: -1 asked; expected at least 0"),
        ("embedded", None, {"seq_len": 1025}, "sequences of 1025 tokens asked; the model's context is 1024"),
        ("a.json", "[[1, 2], [3, 2048]]", {}, r"sequence 1, position 1 \(from 0\) is 2048: .*; expected .*, 0 to 2047"),
        ("a.json", "[[1, -1]]", {}, r"sequence 0, position 1 .* is -1"),
        ("a.json", "[[1, 2], [true, 2]]", {}, r"sequence 1, position 0 .* is True"),
        ("a.json", "[[1, 2.0]]", {}, r"position 1 .* is 2\.0"),
        ("a.json", '[[1, "2"]]', {}, r"position 1 .* is '2'"),
        ("a.json", "[[1, 99999999999999999999999]]", {}, r"position 1 .* is 9999"),
        ("a.json", "[[1, 2], [3]]", {}, r"sequence 1 .* is \[3\]: .*at least 2 .*not 1; expected .* 2 to 1024"),
        ("a.json", json.dumps([[1] * 1025]), {}, r"sequence 0 .*not 1025; expected .* 2 to 1024"),
        ("a.json", "[1, 2, 3]", {}, r"sequence 0 .* is 1: .*valid array"),
        ("a.json", '{"ids": [[1, 2]]}', {}, "a.json: Input should be a valid array; expected a list of lists"),
        ("a.json", "[[1, 2]", {}, r"a.json: Invalid JSON"),
        ("a.json", "[]", {}, "holds 0 sequences; at least 1 asked"),
        ("a.json", "[[1, 2], [3, 4, 5]]", {"samples": 3}, "holds 2 sequences; 3 asked"),
        ("a.json", "[[1, 2], [3, 4, 5]]", {"seq_len": 2}, "sequence 1 .* has 3 token ids, and 2 were asked"),
        ("a.txt", "ab\0c", {}, "a.txt is binary"),
        ("a.jsonl", '{"texts": "a"}', {}, r"a\.jsonl, line 1: Field required"),
        ("a.csv", "text\nabc", {}, r"a\.csv is a '\.csv' file; expected 'embedded', 'held-out', a \.txt, a \.jsonl"),
        ("a", "text", {}, "a is a '' file; expected"),
        (".", None, {}, "is not a file; expected 'embedded'"),
        ("x" * 300 + ".txt", None, {}, "x.txt cannot be read: File name too long"),
        *((name, None, {}, f"^{re.escape(name)}: file not found; expected 'embedded'") for name in MISSING),
    ],
)
def test_what_cannot_be_used_is_named_before_tokenizing(tmp_path, monkeypatch, name, content, sizes, message):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("loaded the tokenizer"))
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        load_calibration(EMBEDDED, name, **sizes)
    assert len(str(error.value)) < 400 + len(name)


@pytest.mark.parametrize(("text", "remedy"), [("a b c d " * 4, "1, or for "), ("one two", "")])
def test_too_little_text_says_how_much_there_is(tmp_path, text, remedy):
    (tmp_path / "a.txt").write_text(text)
    count = len(TOKENIZER.encode(text))
    found = f"holds {count // 16} sequences of 16 tokens ({count} tokens); 4 asked"
    with pytest.raises(DataError, match=re.escape(f"{found}; give more data, or ask for {remedy}shorter ones")):
        ids_of(tmp_path / "a.txt", **SMALL)


@pytest.mark.parametrize(
    ("model_type", "files", "message"),
    [
        ("llama", {}, "has no tokenizer; give token ids instead"),
        # For a Qwen2 without tokenizer files, Transformers makes a tokenizer that gives no token for any text.
        ("qwen2", {}, "has no tokenizer; give token ids instead"),
        ("llama", {"tokenizer.json": "{"}, "the tokenizer cannot be loaded: .*; give token ids instead"),
        ("llama", {"tokenizer.json": OTHER_TOKENIZER}, r"the tokenizer gives token id \d+; vocab_size is 256"),
    ],
)
def test_text_needs_a_tokenizer_of_the_model(tmp_path, model_type, files, message):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY_LLAMA | {"model_type": model_type}))
    for name, content in ({"a.txt": "function argument return value " * 20} | files).items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        ids_of(tmp_path / "a.txt", checkpoint, **SMALL)


@pytest.mark.parametrize("size", [None, 0, "256"])
def test_token_ids_need_a_vocabulary_size(tmp_path, size):
    (tmp_path / "a.json").write_text("[[1, 2]]")
    with pytest.raises(CheckpointError, match=f"config.json: vocab_size is {size!r}; expected 1 or more"):
        ids_of(tmp_path / "a.json", with_vocabulary(EMBEDDED, size))


def test_transformers_does_not_warn_of_long_texts(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a b c d " * 4000)
    AutoTokenizer.from_pretrained(MODEL)("a b c d " * 1000)
    assert "longer than the specified maximum" in caplog.text
    caplog.clear()
    ids_of(tmp_path / "a.txt", samples=2, seq_len=1024)
    assert not caplog.text
