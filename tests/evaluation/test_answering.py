"""Answers sampled through vLLM: Transformers' own where nothing is drawn, the same whatever is asked beside them."""

import json
import multiprocessing
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

import tests.engines  # noqa: F401 - sets the environment before vLLM is imported
from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.answers import read_answers
from llmdrop_vllm.data.prompts import Chat, read_prompts
from llmdrop_vllm.data.tokens import load_tokenizer
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.errors import DataError, InputError
from llmdrop_vllm.evaluation import answering
from llmdrop_vllm.evaluation.answering import AnswersRequest, plan_answers, sample_answers
from llmdrop_vllm.evaluation.divergence import TOKENS_PER_ANSWER
from llmdrop_vllm.evaluation.divergence import prompts as own_prompts
from llmdrop_vllm.evaluation.engine import EngineSettings, Question, Reply, running
from llmdrop_vllm.evaluation.evaluate import DEFAULT_DIVERGENCE_TOKENS
from tests.tiny import TINY_LLAMA, write_checkpoint

EMBEDDED = Checkpoint.open(MODEL)
SUBJECTS = ("os.path.join", "json.dumps", "re.compile", "list.append", "str.split", "math.sqrt", "zip", "abs")


@pytest.fixture
def prompts(tmp_path):
    """Eight questions and a completion, one question twice."""
    questions = [f"What is {subject}?" for subject in (*SUBJECTS, SUBJECTS[0])]
    lines = [*questions, {"prompt": "def add(a, b):\n"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def plan(prompts, options=None, **asked):
    request = AnswersRequest(prompts=prompts, **{"max_tokens": 12, **asked})
    return plan_answers(EMBEDDED, request, dtype="float32", options=options or {})


def answers(plan, out):
    sample_answers(plan, out)
    return read_answers(out)


@pytest.fixture(scope="module")
def engine():
    settings = EngineSettings(dtype="float32", max_model_len=128)
    with running(EMBEDDED, EMBEDDED.mask, settings, harness=False) as found:
        yield found


@pytest.fixture
def one_engine(engine, monkeypatch):
    """That of all tests here in the place of one for each run."""

    @contextmanager
    def same(checkpoint, mask, settings, *, harness):
        assert (checkpoint, mask, settings.dtype, harness) == (EMBEDDED, DropMask(12), "float32", False)
        yield engine

    monkeypatch.setattr(answering, "running", same)


@pytest.mark.usefixtures("one_engine")
def test_greedy_answers_are_transformers_own(prompts, tmp_path):
    header, found = answers(plan(prompts, temperature=0.0, max_tokens=40), tmp_path / "answers.jsonl")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert {each.finish_reason for each in found} == {"stop", "length"}
    for each in (min(found, key=lambda each: each.finish_reason != reason) for reason in ("stop", "length")):
        ids = torch.tensor([each.prompt])
        expected = model.generate(ids, attention_mask=ids.ne(-1), do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        assert each.answer == tuple(expected.tolist())
        assert each.finish_reason == ("stop" if each.answer[-1] == 0 else "length")
    assert (header.temperature, header.max_tokens, header.num_prompts) == (0.0, 40, 10)


@pytest.mark.usefixtures("one_engine")
def test_a_file_says_what_was_asked_and_what_came_of_it(prompts, tmp_path):
    asked = plan(prompts, per_prompt=2)
    header, found = answers(asked, tmp_path / "answers.jsonl")
    assert (header.provenance.model.fingerprint, header.prompts) == (EMBEDDED.fingerprint, str(prompts))
    assert [each.prompt_number for each in found] == [*asked.prompts] * 2
    first, second = found[:10], found[10:]
    assert [each.prompt for each in first] == [each.prompt for each in second] == [*asked.prompts.values()]
    assert all(mine.answer != other.answer for mine, other in zip(first, second, strict=True))
    tokenizer = answering.load_tokenizer(EMBEDDED, "")
    for each in found:
        assert each.text == tokenizer.decode(each.answer, skip_special_tokens=True)
        assert 0 < len(each.answer) <= 12


@pytest.mark.usefixtures("one_engine")
def test_answers_do_not_depend_on_what_is_asked_beside_them(prompts, tmp_path, engine):
    asked = plan(prompts)
    _, together = answers(asked, tmp_path / "answers.jsonl")
    for place in (7, 2):
        ((alone,),) = engine.replies([asked.questions[place][1]], temperature=0.8)
        assert alone.token_ids == together[place].answer
    _, others = answers(plan(prompts, seed=1), tmp_path / "others.jsonl")
    assert {each.prompt_number: each.answer for each in others} != {
        each.prompt_number: each.answer for each in together
    }


def test_replies_come_in_the_order_asked(engine):
    questions = [Question([1, 300 + number], length) for number, length in enumerate((20, 1, 9, 3))]
    batches = [*engine.replies(questions, temperature=0)]
    lengths = [len(reply.token_ids) for batch in batches for reply in batch]
    assert lengths == [20, 1, 9, 3]
    assert len(batches[0]) == 4  # the others were waiting for the first


class Echo:
    """An engine that gives a question back, two replies at a time, and is killed after so many batches."""

    def __init__(self, batches=None):
        self.batches, self.asked = batches, []

    def replies(self, questions, *, temperature):
        for start in range(0, len(questions), 2):
            if start == 2 * (self.batches or len(questions)):
                os.kill(os.getpid(), signal.SIGKILL)
            self.asked += questions[start : start + 2]
            yield [Reply(tuple(each.prompt[-2:]), f"{each.seed}", "stop") for each in questions[start : start + 2]]


def echoing(monkeypatch, echo):
    @contextmanager
    def echoes(*args, **kwargs):
        yield echo

    monkeypatch.setattr(answering, "running", echoes)
    return echo


def test_a_run_that_is_killed_goes_on_where_it_was(prompts, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    asked = plan(prompts, per_prompt=2)
    echoing(monkeypatch, Echo())
    sample_answers(asked, whole)
    echoing(monkeypatch, Echo(batches=3))
    child = multiprocessing.get_context("fork").Process(target=sample_answers, args=(asked, out))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not out.exists()
    echo = echoing(monkeypatch, Echo())
    sample_answers(asked, out)
    assert len(echo.asked) == 20 - 6
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl", "whole.jsonl"]


def test_a_run_that_was_killed_before_its_last_step_starts_no_engine(prompts, tmp_path, monkeypatch):
    out = tmp_path / "answers.jsonl"
    echoing(monkeypatch, Echo())
    sample_answers(plan(prompts), out)
    out.rename(tmp_path / ".answers.jsonl.llmdrop-partial")
    monkeypatch.setattr(answering, "running", lambda *_, **__: pytest.fail("an engine was started"))
    sample_answers(plan(prompts), out)
    assert len(read_answers(out)[1]) == 10


def test_the_same_prompt_is_on_the_same_side_each_time(prompts):
    sides = {}
    for samples in (4, 8, None):
        found = plan(prompts, samples=samples, held_out=0.4)
        assert 0 < len({found.prompts[number] for number in found.held_out}) < len(set(found.prompts.values()))
        for number, ids in found.prompts.items():
            sides.setdefault(ids, set()).add(number in found.held_out)
    # Where few are asked, one may have to stand on a side that is not its own.
    assert sum(len(side) > 1 for side in sides.values()) <= 2
    assert (0 in found.held_out) == (8 in found.held_out)
    assert plan(prompts, held_out=0.4).held_out == found.held_out
    assert len({plan(prompts, held_out=0.4, seed=seed).held_out for seed in range(8)}) > 1


@pytest.mark.parametrize(("share", "expected"), [(0.0, {0}), (0.001, {1, 2}), (0.999, {8, 9})])
def test_there_are_prompts_on_either_side_unless_none_is_held_out(share, expected, prompts):
    assert len(plan(prompts, held_out=share).held_out) in expected


def test_one_prompt_is_to_learn_from(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"Hi"\n"Hi"\n')
    assert not plan(tmp_path / "prompts.jsonl", held_out=0.9).held_out


def test_a_tenth_of_ours_is_held_out_and_evaluations_ask_no_other():
    found = plan_answers(EMBEDDED, AnswersRequest(), dtype="float32", options={})
    assert len(found.prompts) == len(read_prompts())
    assert 0.09 < len(found.held_out) / len(found.prompts) < 0.11
    assert found.header.prompts == "ours"
    tokenizer = load_tokenizer(EMBEDDED, "it is there")
    asked = own_prompts()[: -(-DEFAULT_DIVERGENCE_TOKENS // TOKENS_PER_ANSWER)]
    judging = {tuple(Chat.of(each).token_ids(tokenizer)) for each in asked}
    assert judging <= {found.prompts[number] for number in found.held_out}


def test_of_few_that_are_drawn_from_ours_some_are_on_either_side():
    for seed in range(8):
        found = plan_answers(EMBEDDED, AnswersRequest(samples=3, seed=seed), dtype="float32", options={})
        assert 0 < len(found.held_out) < 3


def test_samples_are_drawn_by_the_seed(prompts):
    first, again, other = (plan(prompts, samples=4, seed=seed).prompts for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 4
    # More of them begin with these.
    assert [*plan(prompts, samples=6).prompts][:4] == [*first]
    headers = [plan(prompts, samples=samples).header.prompts_sha256 for samples in (4, 6)]
    assert headers[0] != headers[1]


def test_an_answer_ends_where_the_context_does(prompts, tmp_path):
    lines = prompts.read_text() + json.dumps({"prompt": [5] * 1020}) + "\n" + json.dumps({"prompt": [5] * 1024}) + "\n"
    prompts.write_text(lines)
    found = plan(prompts)
    assert found.left_out == "left out are 1 of 12 prompts: no room in the context of 1024 tokens (1)"
    assert found.settings.max_model_len == 1024
    assert {question.max_tokens for number, question in found.questions if number == 10} == {4}
    assert {question.max_tokens for number, question in found.questions if number != 10} == {12}
    shorter = plan(prompts, options={"max_model_len": 16})
    assert shorter.left_out == "left out are 2 of 12 prompts: no room in the context of 16 tokens (2)"


def test_chats_that_the_template_does_not_take_are_left_out(prompts, tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    prompts.write_text('"Hi"\n' + json.dumps({"messages": chat, "chat_template_kwargs": {"messages": 3}}) + "\n")
    left_out = plan(prompts).left_out
    assert left_out.startswith("left out are 1 of 2 prompts: the chat template does not take it: ")


@pytest.mark.parametrize(
    ("line", "asked", "message"),
    [
        ('"Hi"', {"samples": 2}, "holds 1 prompts that can be asked; 2 asked"),
        (json.dumps({"prompt": [5] * 1024}), {}, r"holds 0 prompts .*: no room in the context of 1024 tokens \(1\)"),
        ('{"prompt": [2048]}', {}, r"prompt 0 \(from 0\) has token id 2048; expected 0 to 2047"),
        ('"Hi"', {"samples": 0}, "prompts: 0 asked; expected 1 or more"),
        ('"Hi"', {"max_tokens": 0}, "tokens of an answer: 0 asked"),
        (
            '"Hi"',
            {"per_prompt": 2, "temperature": 0.0},
            "2 answers to a prompt asked at temperature 0, where all would",
        ),
        ('"Hi"', {"temperature": -0.1}, "temperature -0.1 asked; expected 0 or more"),
        ('"Hi"', {"temperature": float("nan")}, "temperature nan asked"),
        ('"Hi"', {"held_out": 1.0}, "100% of the prompts held out; expected less than all"),
    ],
)
def test_what_cannot_be_asked_is_named(line, asked, message, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        plan(tmp_path / "prompts.jsonl", **asked)


def test_a_model_without_a_tokenizer_and_an_option_that_there_is_not_are_named(prompts, tmp_path):
    tiny = Checkpoint.open(write_checkpoint(tmp_path / "tiny", TINY_LLAMA))
    with pytest.raises(DataError, match="tiny has no tokenizer; its model's belongs there"):
        plan_answers(tiny, AnswersRequest(), dtype="float32", options={})
    with pytest.raises(InputError, match="max_tokenz, which vLLM's EngineArgs do not have"):
        plan(prompts, options={"max_tokenz": 3})


# Last, for the end of its engine takes what the other one computes with.
def test_seeded_answers_to_more_than_one_step_can_take(tmp_path):
    """On a CPU vLLM 0.32 cannot take back a seeded request's generator after a part of its prompt."""
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": [5 + number] * 120}) + "\n" for number in range(40)))
    _, found = answers(plan(path, max_tokens=2), tmp_path / "answers.jsonl")
    assert len(found) == 40
