"""A small Llama that was really trained, so that everything can be tried without a hub; on what, says corpus.py."""

import json
from pathlib import Path

MODEL = Path(__file__).parent / "model"


def held_out() -> dict[str, str]:
    """Question and answer texts that the model has not seen, by subject; docstrings only, without sources.

    They are from the standard library of Python 3.11 (Python Software Foundation License).
    """
    lines = (MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rows = (json.loads(line) for line in lines)
    return {row["subject"]: row["text"] for row in rows if not row["text"].startswith("<|user|>Show the source")}
