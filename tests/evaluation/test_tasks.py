"""Our tasks of real models: their rows, how they are judged, and how models are asked."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llmdrop_vllm.evaluation.divergence import own_answers, prompts
from llmdrop_vllm.evaluation.engine import Reply
from llmdrop_vllm.evaluation.harness import find_tasks
from llmdrop_vllm.evaluation.tasks import rows

REASONING = ("sums", "products", "gcd", "lcm", "letters", "sequences", "families", "legs")


@pytest.fixture(scope="module")
def harness():
    return find_tasks(["llmdrop_humaneval", "llmdrop_reasoning", "llmdrop_name"], runs_code=True)


@pytest.fixture(scope="module")
def problems():
    return rows.humaneval()["test"]


def test_every_fourth_problem_comes_first(problems):
    numbers = [int(each["task_id"].partition("/")[2]) for each in problems]
    assert numbers[:41] == [*range(0, 164, 4)]
    assert sorted(numbers) == [*range(164)]


@pytest.mark.parametrize("number", [0, 50, 163])
def test_the_solution_passes_and_a_wrong_one_does_not(problems, number):
    doc = problems[number]
    assert rows.passes(doc, [doc["canonical_solution"]]) == {"pass@1": 1.0}
    assert rows.passes(doc, ["    return None\n"]) == {"pass@1": 0.0}
    assert rows.passes(doc, ["    import sys; sys.exit(0)\n"]) == {"pass@1": 0.0}


@pytest.mark.parametrize("name", REASONING)
def test_problems_are_the_same_each_time_and_their_own_answers_are_right(harness, name):
    (task,) = harness.manager.load([f"llmdrop_reasoning_{name}"])["tasks"].values()
    first = rows.reasoning(task.config.metadata["dataset"], task.config.metadata["options"])
    test, shots = first["test"], first["shots"]
    assert (len(test), len(shots)) == (20, 4)
    assert [*test] == [*task.dataset["test"]]
    for doc in test:
        assert rows.answers(doc, [f" {doc['answer']}"]) == {"exact_match": 1.0}
        assert rows.answers(doc, ["no idea"]) == {"exact_match": 0.0}


class Recorder:
    """A model of lm-eval that answers nothing and keeps what it was asked."""

    rank, world_size, tokenizer_name = 0, 1, "recorder"

    def __init__(self, chat_template):
        self.tokenizer, self.asked = SimpleNamespace(chat_template=chat_template), []

    def apply_chat_template(self, messages, add_generation_prompt=True):
        return json.dumps(messages)

    def generate_until(self, requests):
        self.asked += [request.args[0] for request in requests]
        return [""] * len(requests)


def test_models_with_a_chat_template_are_asked_through_it_where_the_task_says_how(harness):
    model = Recorder("a template")
    scores, _ = replace(harness, limit=1).run(model)
    assert {each.task: each.prompting for each in scores} == {
        "llmdrop_humaneval": "chat",
        "llmdrop_reasoning": "chat",
        "llmdrop_name": "completion",
    }
    by_length = sorted(model.asked, key=len)
    assert by_length[0].startswith("<|user|>What is")  # the embedded model's own form of a chat
    coded = next(each for each in model.asked if "Complete this Python function" in each)
    assert json.loads(coded)[-1] == {"role": "assistant", "content": json.loads(coded)[-1]["content"]}
    assert json.loads(coded)[-1]["content"].startswith("```python\nfrom typing import List")
    reasoned = [json.loads(each) for each in model.asked if each.startswith("[") and each is not coded]
    # Four examples, question and answer in turns, and then the question.
    assert all([m["role"] for m in each] == ["user", "assistant"] * 4 + ["user"] for each in reasoned)


def test_other_models_have_texts_to_complete(harness):
    model = Recorder(None)
    scores, _ = replace(harness, limit=1).run(model)
    assert {each.prompting for each in scores} == {"completion"}
    assert any(each.startswith("from typing import List") for each in model.asked)
    assert any(each.count("Question: ") == 5 and each.endswith("\nAnswer:") for each in model.asked)


def test_sweeps_ask_the_prompts_that_they_always_have_asked():
    assert len(prompts()) == len(set(prompts())) > 300
    assert prompts()[0] == "What is the capital of France, and what is it known for?"
    assert prompts()[47] == "Put these in alphabetical order: pear, apple, fig, cherry, banana."


def test_answers_are_asked_for_and_compared_where_they_are_predicted():
    class Tokenizer:
        chat_template = None

        def __call__(self, text):
            return {"input_ids": [7] * (3 + len(text) % 2)}

    class Engine:
        tokenizer, context = Tokenizer(), 14

        def replies(self, questions, *, temperature):
            self.questions = questions
            for number in range(len(questions)):
                yield [Reply((1, 2, 3) if number else (), "", "stop")]

    found = own_answers(engine := Engine(), 200)
    # No longer than the model takes.
    assert all(each.max_tokens == 14 - len(each.prompt) for each in engine.questions)
    assert len(found.answers) == 2  # one of three has answered nothing
    window = found.answers[0].window
    predicted = window.token_ids[window.start + 1 :][: window.stop - window.start]
    assert predicted.tolist() == [1, 2, 3]
