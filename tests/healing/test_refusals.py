"""What cannot be healed is refused in one line, before anything slow, and nothing is left behind."""

import json
import shutil
from collections import namedtuple

import pytest
from safetensors.torch import load_file, save_file

from llmdrop_vllm.cli import main
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.evaluation import answering
from llmdrop_vllm.scoring import scratch
from tests.data.files import answer, write_answers

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    out = tmp_path_factory.mktemp("dropped") / "dropped"
    assert main(["apply", str(MODEL), str(out), "--attention", "7,11"]) == 0
    return out


@pytest.fixture
def answers(tmp_path):
    found = [answer(number, (number + 5, 6), (7, 8)) for number in range(16)]
    return write_answers(tmp_path / "answers.jsonl", found)


def refused(capsys, tmp_path, *command, left=()):
    """Run it; its one line of error."""
    before = {path.name for path in tmp_path.iterdir()}
    assert main([str(each) for each in command]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert {path.name for path in tmp_path.iterdir()} - before == set(left)
    return lines[-1]


def heal(dropped, out, data, teacher=MODEL):
    return "heal", dropped, out, "--teacher", teacher, "--data", data


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([((5,), (6,) * 2000), ((7,), (8,))], "have 2001 tokens; the model's context is 1024"),
        ([((5,), ()), ((6,), ())], "holds 0 answers to learn from that are not empty"),
        ([((5,), (6, 7)), ((5,), (8, 9))], "1 prompt or text; healing needs one to learn, one to judge"),
        ([((5,), (10**6,)), ((6,), (7,))], "token ids that are not of this model"),
    ],
)
def test_answers_that_cannot_be_learnt_from(pairs, message, dropped, tmp_path, capsys):
    found = [answer(number, prompt, reply) for number, (prompt, reply) in enumerate(pairs)]
    data = write_answers(tmp_path / "bad.jsonl", found)
    assert message in refused(capsys, tmp_path, *heal(dropped, tmp_path / "out", data))


def test_a_teacher_with_another_vocabulary(dropped, answers, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(MODEL, teacher)
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    first, second = [*tokenizer["model"]["vocab"]][:2]
    tokenizer["model"]["vocab"] |= {first: tokenizer["model"]["vocab"][second]}
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(capsys, tmp_path, *heal(dropped, tmp_path / "out", answers, teacher))
    assert message.endswith(f"{dropped} and {teacher} have tokenizers of other vocabularies")


def test_a_place_that_is_taken(dropped, answers, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert "out exists" in refused(capsys, tmp_path, *heal(dropped, tmp_path / "out", answers))


@pytest.fixture
def quantized(tmp_path):
    """A copy of a checkpoint that says it is."""

    def copied(directory):
        out = shutil.copytree(directory, tmp_path / "quantized")
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
        return out

    return copied


def test_a_quantized_student_or_teacher(quantized, dropped, answers, tmp_path, capsys):
    student = quantized(dropped)
    message = f"{student} is quantized; heal in plain weights"
    assert message in refused(capsys, tmp_path, *heal(student, tmp_path / "out", answers))
    shutil.rmtree(student)
    teacher = quantized(MODEL)
    assert message in refused(capsys, tmp_path, *heal(dropped, tmp_path / "out", answers, teacher))


def test_dropping_with_healing_of_quantized_weights_asks_nothing(quantized, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(answering, "running", lambda *_, **__: pytest.fail("an engine was started"))
    command = ("drop", quantized(MODEL), tmp_path / "out", "--attention", "2", "--heal")
    assert "is quantized; heal in plain weights" in refused(capsys, tmp_path, *command)


def test_a_stream_that_is_not_finite(answers, tmp_path, capsys):
    """Finite weights whose products are not."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(MODEL, teacher)
    (path,) = teacher.glob("*.safetensors")
    tensors = load_file(path)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.9.mlp.{name}.weight"].fill_(3e38)
    save_file(tensors, path, {"format": "pt"})
    assert main(["apply", str(teacher), str(student), "--attention", "7,11"]) == 0
    capsys.readouterr()
    left = (".out.llmdrop-healing",)
    message = refused(capsys, tmp_path, *heal(student, tmp_path / "out", answers, teacher), left=left)
    assert "hidden states that are not finite" in message


def test_a_full_disk(dropped, answers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 0))
    message = refused(capsys, tmp_path, *heal(dropped, tmp_path / "out", answers))
    assert "and 0 are free there" in message


def test_a_disk_that_fills_up_on_the_way(dropped, answers, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.HiddenStates, "write", full)
    left = (".out.llmdrop-healing",)  # from where the same command goes on once there is room
    message = refused(capsys, tmp_path, *heal(dropped, tmp_path / "out", answers), left=left)
    assert "No space left on device" in message
