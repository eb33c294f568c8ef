"""The full model's own answers to our prompts: what a mask does to generation shows there, and not in other texts."""

from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from llmdrop_vllm.artifacts import Record
from llmdrop_vllm.evaluation.divergence import Window
from llmdrop_vllm.evaluation.engine import Engine

PROMPTS = Path(__file__).with_name("prompts.jsonl")
TOKENS_PER_ANSWER = 96


class Answer(Record):
    """Token ids of a prompt, as the model is asked, and of its answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def window(self) -> Window:
        """Where the answer's tokens are predicted."""
        token_ids = np.array((*self.prompt, *self.answer), np.int64)
        return Window(token_ids, len(self.prompt) - 1, len(token_ids) - 1)


class Answers(Record):
    """What a sweep compares next tokens on."""

    answers: tuple[Answer, ...]


def prompts() -> list[str]:
    """Questions of many kinds, in several languages and about code."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return [TypeAdapter(str).validate_json(line) for line in lines]


def own_answers(engine: Engine, tokens: int) -> Answers:
    """Greedy answers of about so many tokens in all, asked through the chat template where there is one."""
    asked = [engine.as_asked(prompt) for prompt in prompts()[: max(1, -(-tokens // TOKENS_PER_ANSWER))]]
    length = max(1, -(-tokens // len(asked)))
    answers = engine.greedy(asked, min(length, engine.room(max(map(len, asked)))))
    pairs = zip(asked, answers, strict=True)
    return Answers(answers=tuple(Answer(prompt=tuple(p), answer=tuple(a)) for p, a in pairs if a))
