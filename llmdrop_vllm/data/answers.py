"""A model's own answers to prompts, as token ids in a JSONL file: what healing, scores and evaluations read.

The first line is the header, each other one an answer. Prompts that are held out are for judging only.
"""

import os
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, JsonValue

from llmdrop_vllm.artifacts import DataIdentity, Record, sha256
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.growing import Header, read_grown
from llmdrop_vllm.data.tokens import Calibration, vocab_size
from llmdrop_vllm.errors import DataError

KIND: Literal["llmdrop-answers"] = "llmdrop-answers"


class AnswersHeader(Header):
    """Where the answers come from. `prompts` names their source, `num_prompts` how many there are in it;
    `prompts_sha256` is over what was asked: of each prompt its number and token ids, in the order of the file.

    `max_tokens` of each answer, `per_prompt` answers to each prompt; `held_out` is the share of prompts kept apart,
    `engine_args` what vLLM was told beside that.
    """

    kind: Literal["llmdrop-answers"] = KIND
    prompts: str
    prompts_sha256: str
    num_prompts: int
    per_prompt: int
    max_tokens: int
    temperature: float
    seed: int
    held_out: float
    engine_args: dict[str, JsonValue] = Field(default_factory=dict)


class Answer(Record):
    """Token ids of a prompt as the model is asked, and of its answer; `prompt_number` counts from 0.

    `finish_reason` is "stop" where the model came to its end, and "length" where it was cut.
    """

    prompt_number: int
    held_out: bool = False
    finish_reason: str = "stop"
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str = ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and answer, end to end."""
        return (*self.prompt, *self.answer)


def is_answers(path: Path) -> bool:
    """Whether a file is one of these, told by its first line."""
    if path.suffix.lower() != ".jsonl" or not path.is_file() or not os.access(path, os.R_OK):
        return False
    with path.open("rb") as file:
        return f'"{KIND}"'.encode() in file.readline(1 << 16)


def read_answers(path: Path) -> tuple[AnswersHeader, tuple[Answer, ...]]:
    """All of a file. Raises DataError naming the line that cannot be used."""
    return read_grown(path, AnswersHeader, Answer, "llmdrop answers")


def load_answers(
    checkpoint: Checkpoint,
    path: Path,
    *,
    held_out: bool,
    samples: int | None = None,
    tokens: int | None = None,
    tokens_each: int | None = None,
) -> Calibration:
    """The answers for a model's use, longest first: those held out, or the others, or the first `samples` of them, or
    the first that have `tokens` together. Of each answer all is taken, or its first `tokens_each`.

    Raises DataError where there are none, and for token ids or lengths that the model does not take.
    """
    header, answers = read_answers(path)
    chosen = [each for each in answers if each.held_out == held_out and each.answer][:samples]
    if len(chosen) < (samples or 1):
        what = "held-out answers" if held_out else "answers to learn from"
        raise DataError(f"{path} holds {len(chosen)} {what} that are not empty; {samples or 'at least 1'} asked")
    if tokens_each is not None:
        chosen = [each.model_copy(update={"answer": each.answer[:tokens_each]}) for each in chosen]
    if tokens is not None:
        before = accumulate((len(each.answer) for each in chosen[:-1]), initial=0)
        chosen = [each for each, count in zip(chosen, before, strict=True) if count < tokens]
    for each in chosen:
        _check(each, path, vocab_size(checkpoint), checkpoint.context)
    chosen.sort(key=lambda each: -len(each.token_ids))
    sequences = tuple(np.array(each.token_ids, np.int64) for each in chosen)
    identity = DataIdentity(
        source=str(path),
        sequences=len(sequences),
        tokens=sum(len(each.answer) for each in chosen),
        seq_len=None,
        seed=header.seed,
        sha256=sha256((list(each.prompt), list(each.answer)) for each in chosen),
    )
    return Calibration(sequences, identity, starts=tuple(len(each.prompt) - 1 for each in chosen))


def _check(answer: Answer, path: Path, size: int, context: int | None) -> None:
    ids, which = answer.token_ids, answer.prompt_number
    if not answer.prompt or min(ids) < 0 or max(ids) >= size:
        problem = f"the answer to prompt {which} has no prompt or token ids that are not of this model"
        raise DataError(f"{path}: {problem} (0 to {size - 1})")
    if context and len(ids) > context:
        raise DataError(
            f"{path}: prompt {which} and its answer have {len(ids)} tokens; the model's context is {context}"
        )
