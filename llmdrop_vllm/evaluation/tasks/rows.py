"""What lm-eval reads for the tasks of this directory: the rows beside this file."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def choice(**metadata: Any) -> dict[str, Dataset]:
    """Rows of llmdrop_docstring: subject, signature, choices, label."""
    return _rows("choice.jsonl")


def name(**metadata: Any) -> dict[str, Dataset]:
    """Rows of llmdrop_name: subject, name."""
    return _rows("name.jsonl")


def _rows(file: str) -> dict[str, Dataset]:
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
