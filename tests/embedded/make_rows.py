"""Make the rows of the embedded model's two tasks from its held-out text.

    python -m tests.embedded.make_rows

Only functions whose answer begins with their name and a signature, and whose docstring has a first sentence.
"""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmdrop_vllm import evaluation
from llmdrop_vllm.embedded import held_out

TASKS = Path(evaluation.__file__).with_name("tasks")
ANSWER = re.compile(
    r"<\|user\|>What is (?P<subject>[\w.]+)\?<\|assistant\|>(?P<signature>(?P<name>\w+)\(.*?\))\n\n"
    r"(?P<sentence>.+?[.!?](?=\s|<)|.+?(?=\n\n|<\|end\|>))",
    re.DOTALL,
)
NUM_CHOICES, NUM_ROWS = 4, 200


def functions() -> list[dict[str, str]]:
    """subject, signature, name and the docstring's first sentence, of some held-out functions that have all."""
    found = [match.groupdict() for text in held_out().values() if (match := ANSWER.match(text))]
    fitting = [each for each in found if each["subject"].endswith(f".{each['name']}")]
    return random.Random(0).sample(fitting, NUM_ROWS)


def choice_rows(functions: list[dict[str, str]]) -> Iterable[dict[str, Any]]:
    """The right first sentence among three others that differ from it, in a random but fixed order."""
    rng = random.Random(0)
    for each in functions:
        others = sorted({other["sentence"] for other in functions} - {each["sentence"]})
        choices = [each["sentence"], *rng.sample(others, NUM_CHOICES - 1)]
        rng.shuffle(choices)
        row = {key: each[key] for key in ("subject", "signature")}
        yield row | {"choices": choices, "label": choices.index(each["sentence"])}


def write(file: str, rows: Iterable[dict[str, Any]]) -> None:
    """As JSON lines."""
    (TASKS / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    rows = functions()
    write("choice.jsonl", choice_rows(rows))
    write("name.jsonl", ({key: row[key] for key in ("subject", "name")} for row in rows))
