"""The full model's own answers to our prompts: what a mask does to generation shows there, and not in other texts."""

from itertools import chain

import numpy as np

from llmdrop_vllm.artifacts import Record
from llmdrop_vllm.data.prompts import Chat, read_prompts
from llmdrop_vllm.evaluation.divergence import Window
from llmdrop_vllm.evaluation.engine import Engine, Question

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
    return [each.question for each in read_prompts() if isinstance(each, Chat) and each.question]


def own_answers(engine: Engine, tokens: int) -> Answers:
    """Greedy answers of about so many tokens in all, asked through the chat template where there is one."""
    chosen = prompts()[: max(1, -(-tokens // TOKENS_PER_ANSWER))]
    length = max(1, -(-tokens // len(chosen)))
    asked = [Chat.of(prompt).token_ids(engine.tokenizer) for prompt in chosen]
    questions = [Question(ids, min(length, room)) for ids in asked if (room := engine.room(len(ids))) > 0]
    replies = chain.from_iterable(engine.replies(questions, temperature=0))
    pairs = [(tuple(each.prompt), reply.token_ids) for each, reply in zip(questions, replies, strict=True)]
    return Answers(answers=tuple(Answer(prompt=prompt, answer=answer) for prompt, answer in pairs if answer))
