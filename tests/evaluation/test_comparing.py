"""`llmdrop compare` on the embedded model: answers are Transformers' own, and what cannot be compared is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

import tests.engines  # noqa: F401 - sets the environment before vLLM is imported
from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.artifacts import COMPARISON_FILE, HEAL_FILE, ModelIdentity, read_record, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.data.comparison import Comparison
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.evaluation import comparing
from tests.evaluation.test_commands import error_of
from tests.healing.records import healing
from tests.tiny import TINY_LLAMA, write_checkpoint

QUESTIONS = ["What is os.path.join?", "What is zip?"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dropped model, the same said to be healed, and prompts."""
    directory = tmp_path_factory.mktemp("compared")
    assert main(["apply", str(MODEL), f"{directory}/dropped", "--attention", "11,7,8,10"]) == 0
    shutil.copytree(directory / "dropped", directory / "healed")
    teacher = ModelIdentity.of(Checkpoint.open(MODEL))
    write_record(healing(teacher=teacher), directory / "healed" / HEAL_FILE)
    (directory / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    return directory


def comparing_of(home, name="healed", full=MODEL, prompts="questions.jsonl"):
    given = ["--full", str(full)] if full else []
    return ["compare", str(home / name), *given, "--prompts", str(home / prompts), "--max-tokens", "12"]


def greedy(directory):
    """What Transformers answers."""
    model, tokenizer = hf.from_pretrained(directory, dtype=torch.float32), AutoTokenizer.from_pretrained(directory)
    said = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, attention_mask=ids.ne(-1), do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        said.append((tokenizer.decode(answer, skip_special_tokens=True).strip(), len(answer)))
    return said


def test_each_form_answers_as_transformers_computes_it(home, capsys):
    assert main(comparing_of(home)) == 0
    shown = capsys.readouterr().out
    found = read_record(Comparison, home / "healed" / COMPARISON_FILE)
    assert found.questions == tuple(QUESTIONS)
    assert [form.name for form in found.forms] == ["full", "dropped", "healed"]
    full, dropped = greedy(MODEL), greedy(home / "dropped")
    assert full != dropped
    for form, expected in zip(found.forms, (full, dropped, dropped), strict=True):
        assert [(said.same + said.other, said.tokens) for said in form.answers] == expected
    assert [form.kv_bytes_per_token for form in found.forms] == [3072, 2048, 2048]
    assert [form.weight_bytes for form in found.forms] == [10_233_216, 9_445_248, 9_445_248]
    assert [form.healing for form in found.forms] == [None, None, healing().summary()]
    assert f"next: llmdrop serve {home / 'healed'}\n" in shown
    assert main(comparing_of(home)) == 1  # what is there is not replaced unasked
    assert "--overwrite" in error_of(capsys)


def test_of_an_untouched_model_a_mask_is_tried(home, monkeypatch):
    asked = []

    def engine(checkpoint, mask, settings, *, harness):
        asked.append((checkpoint.directory, mask.attention))
        raise comparing.CheckpointError("no engine here")

    monkeypatch.setattr(comparing, "running", engine)
    out = home / "out.json"
    command = ["compare", str(MODEL), "--attention", "11,7", "--prompts", f"{home}/questions.jsonl", "--out", f"{out}"]
    assert main(command) == 1
    assert asked == [(MODEL, ())]
    assert not out.exists()
    checkpoint = Checkpoint.open(MODEL)
    plan = comparing.plan_comparison(
        checkpoint, DropMask(12, (11, 7)), None, samples=1, max_tokens=4, dtype="float32", options={}
    )
    assert [(name, each.mask.attention) for name, each, _ in plan.forms] == [("full", ()), ("dropped", (11, 7))]


def test_a_model_that_is_dropped_already_wants_its_full_one(home, capsys):
    assert main([*comparing_of(home, "dropped", full=None)]) == 1
    assert "is dropped already; name the model that it is of: --full MODEL" in error_of(capsys)


def test_the_full_model_is_the_one_that_it_was_healed_towards(home, tmp_path, capsys):
    shutil.copytree(home / "dropped", tmp_path / "healed")
    write_record(healing(), tmp_path / "healed" / HEAL_FILE)
    assert main(comparing_of(tmp_path, prompts=home / "questions.jsonl")) == 1
    assert "was healed towards /models/tiny (weights f00d); --full" in error_of(capsys)


def test_what_cannot_be_compared_is_refused_before_any_engine_starts(home, tmp_path, capsys):
    write_checkpoint(tmp_path / "other", TINY_LLAMA)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "def add("}) + "\n")
    (tmp_path / "long.jsonl").write_text(json.dumps("word " * 2000) + "\n")
    for command, why in (
        (comparing_of(MODEL.parent, MODEL.name, full=None, prompts=home / "questions.jsonl"), "drops nothing"),
        (comparing_of(home, "dropped", full=tmp_path / "other"), "is not the full model of"),
        (comparing_of(home, "dropped", prompts=tmp_path / "chats.jsonl"), "prompt 0 (from 0) is no question"),
        (comparing_of(home, "dropped", prompts=tmp_path / "long.jsonl"), "the model's context is 1024"),
    ):
        assert main([*command, "--out", f"{tmp_path}/out.json"]) == 1
        assert why in error_of(capsys)
