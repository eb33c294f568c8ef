"""Files of answers: what they hold, what of them a model is given, and how they grow whatever ends the process."""

import errno
import json
import multiprocessing
import os
import signal

import pytest

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.answers import Answer, is_answers, load_answers, read_answers
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.data.growing import growing
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.errors import DataError, OutputError
from tests.data.files import ANSWERS, answer, header, with_vocabulary, write_answers

EMBEDDED = Checkpoint.open(MODEL)


@pytest.fixture
def file(tmp_path):
    return write_answers(tmp_path / "answers.jsonl")


def test_a_file_is_read_as_it_was_written(file):
    assert read_answers(file) == (header(), ANSWERS)
    assert is_answers(file)


def test_other_files_are_no_answers(tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": 'it says "llmdrop-answers"'}) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("text.jsonl", "empty.jsonl", "missing.jsonl"):
        assert not is_answers(tmp_path / name)
    assert not is_answers(write_answers(tmp_path / "answers.json"))


def test_a_model_gets_the_longest_first_and_where_each_answer_is_predicted(file):
    found = load_answers(EMBEDDED, file, held_out=False)
    assert [each.tolist() for each in found.sequences] == [[5, 6, 7, 8, 0], [3, 4, 5, 6, 7]]
    for token_ids, start, expected in zip(found.sequences, found.starts, ([7, 8, 0], [6, 7]), strict=True):
        assert token_ids[start + 1 :].tolist() == expected
    assert (found.identity.sequences, found.identity.tokens, found.identity.seq_len) == (2, 5, None)
    held_out = load_answers(EMBEDDED, file, held_out=True)
    assert [each.tolist() for each in held_out.sequences] == [[3, 4, 5, 6, 7], [1, 2]]


def test_the_first_answers_suffice_for_samples_and_for_tokens(file):
    assert [each.tolist() for each in load_answers(EMBEDDED, file, held_out=True, samples=1).sequences] == [[1, 2]]
    for tokens, expected in ((1, 1), (2, 2), (100, 2)):
        assert len(load_answers(EMBEDDED, file, held_out=True, tokens=tokens).sequences) == expected


def test_calibration_takes_the_answers_that_are_not_held_out(file):
    source = f"{file.parent}/./{file.name}"
    found = load_calibration(EMBEDDED, source, seed=3)
    assert found.starts == load_answers(EMBEDDED, file, held_out=False).starts
    assert (found.identity.source, found.identity.seed) == (source, 3)  # whoever goes on with scores compares them
    assert len(load_calibration(EMBEDDED, str(file), samples=1).sequences) == 1
    with pytest.raises(DataError, match="holds answers, which are used as they are: ask for no length"):
        load_calibration(EMBEDDED, str(file), seq_len=16)


@pytest.mark.parametrize(
    ("answers", "asked", "message"),
    [
        (ANSWERS, {"held_out": False, "samples": 3}, "holds 2 answers to learn from that are not empty; 3 asked"),
        (ANSWERS[2:3], {"held_out": True}, "holds 0 held-out answers that are not empty; at least 1 asked"),
        ([answer(7, [1], [2048])], {"held_out": False}, r"prompt 7 has .* not of this model \(0 to 2047\)"),
        ([answer(7, [-1], [1])], {"held_out": False}, "prompt 7 has .* not of this model"),
        ([answer(7, [], [1])], {"held_out": False}, "prompt 7 has no prompt"),
        ([answer(7, [1] * 1000, [1] * 25)], {"held_out": False}, "have 1025 tokens; the model's context is 1024"),
    ],
)
def test_what_a_model_cannot_take_is_named(answers, asked, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_answers(EMBEDDED, write_answers(tmp_path / "answers.jsonl", answers), **asked)


@pytest.mark.parametrize(
    ("line", "content", "message"),
    [
        (1, b'{"text": "hello"}', "line 1: provenance: Field required; expected what `llmdrop answers` writes"),
        (3, b'{"prompt_number": 1, "prompt": [1]}', "line 3: answer: Field required"),
        (3, b'{"prompt_number": 1, "prompt": [1], "answer": [1], "txt": ""}', "line 3: txt: Extra inputs"),
        (4, b'{"prompt_number": 1, "pro', "line 4: Invalid JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(line, content, message, file):
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([*lines[: line - 1], content, *lines[line:]]))
    with pytest.raises(DataError, match=message):
        read_answers(file)


def test_files_that_are_not_there_or_empty_are_named(tmp_path):
    with pytest.raises(DataError, match="missing.jsonl cannot be read: No such file"):
        read_answers(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty; expected what"):
        read_answers(tmp_path / "empty.jsonl")


def partial(out):
    return out.with_name(f".{out.name}.llmdrop-partial")


def grow(out, answers, **changes):
    with growing(out, header(**changes), Answer) as found:
        before = found.count
        found.append(answers)
    return before


def grow_twice(out, between):
    with growing(out, header(), Answer) as found:
        found.append(ANSWERS[:2])
        between()
        found.append(ANSWERS[2:])


def interrupt():
    raise KeyboardInterrupt


def test_a_file_is_there_when_it_is_whole(tmp_path):
    out = tmp_path / "answers.jsonl"
    there = []
    grow_twice(out, lambda: there.append(out.exists()))
    assert there == [False]
    assert read_answers(out) == (header(), ANSWERS)
    assert [*tmp_path.iterdir()] == [out]


def killed(out, torn):
    """In a process of its own: two answers, a part of a third, and then kill -9."""
    with growing(out, header(), Answer) as found:
        found.append(ANSWERS[:2])
        os.write(found.file.fileno(), torn)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("torn", [b"", b'{"prompt_numb', ANSWERS[2].model_dump_json().encode(), b"\0\0\0\n"])
def test_what_a_killed_process_has_put_there_is_gone_on_with(torn, tmp_path):
    out = tmp_path / "answers.jsonl"
    child = multiprocessing.get_context("fork").Process(target=killed, args=(out, torn))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert [*tmp_path.iterdir()] == [partial(out)]
    # Under another command line, which asks for the same.
    provenance = header().provenance.model_copy(update={"command": "llmdrop answers --overwrite"})
    assert grow(out, ANSWERS[2:], provenance=provenance) == 2
    assert read_answers(out) == (header(), ANSWERS)


@pytest.mark.parametrize("change", [{"seed": 1}, {"prompts_sha256": "cd"}, {"engine_args": {"quantization": "fp8"}}])
def test_answers_to_another_request_are_not_gone_on_with(change, tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        grow_twice(out, interrupt)
    assert grow(out, ANSWERS[:1], **change) == 0
    assert read_answers(out) == (header(**change), ANSWERS[:1])


def test_what_ends_before_the_first_answer_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), growing(tmp_path / "answers.jsonl", header(), Answer):
        raise ZeroDivisionError
    assert [*tmp_path.iterdir()] == []


def test_two_processes_do_not_grow_one_file(tmp_path):
    out = tmp_path / "answers.jsonl"
    with growing(out, header(), Answer) as found:
        with pytest.raises(OutputError, match="is in use"), growing(out, header(), Answer):
            pytest.fail("grown twice")
        found.append(ANSWERS)
    assert read_answers(out)[1] == ANSWERS


def test_a_full_disk_is_said_in_a_line_and_the_answers_stay(tmp_path, monkeypatch):
    out, write = tmp_path / "answers.jsonl", os.write

    def full(descriptor, data):
        write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="cannot be written: No space left on device; the same command goes on"):
        grow_twice(out, lambda: monkeypatch.setattr(os, "write", full))
    monkeypatch.undo()
    assert grow(out, ANSWERS[2:]) == 2
    assert read_answers(out)[1] == ANSWERS


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    with pytest.raises(OutputError, match="no/answers.jsonl cannot be written: No such file or directory"):
        grow(tmp_path / "no" / "answers.jsonl", ANSWERS)


def test_answers_are_of_one_model_only_by_their_token_ids(file):
    small = with_vocabulary(EMBEDDED, 8)
    with pytest.raises(DataError, match=r"0 to 7"):
        load_answers(small, file, held_out=False)
