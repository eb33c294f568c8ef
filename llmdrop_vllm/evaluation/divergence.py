"""Next-token distributions of a masked model against the full one's, exactly, through Transformers.

vLLM gives log-probabilities of the most likely tokens only; KL needs all of them, of both models. What a mask does to
generation shows on the full model's own answers, and not in other texts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from llmdrop_vllm import hf
from llmdrop_vllm.artifacts import Record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.prompts import Chat, read_prompts
from llmdrop_vllm.data.tokens import Calibration, TokenIds
from llmdrop_vllm.evaluation.engine import Engine, Question, default_device
from llmdrop_vllm.evaluation.records import Divergence, Estimate
from llmdrop_vllm.masks.mask import DropMask

TOKENS_PER_ANSWER = 96


@dataclass(frozen=True)
class Window:
    """Token ids, [tokens]; next-token distributions are compared from position `start` up to `stop`, or the end."""

    token_ids: TokenIds
    start: int = 0
    stop: int | None = None


def answer_windows(answers: Calibration) -> tuple[Window, ...]:
    """Where the tokens of a file's answers are predicted."""
    pairs = zip(answers.sequences, answers.starts, strict=True)
    return tuple(Window(token_ids, start, len(token_ids) - 1) for token_ids, start in pairs)


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
    questions = [Question(ids, min(length, room)) for ids in asked if (room := engine.context - len(ids)) > 0]
    replies = chain.from_iterable(engine.replies(questions, temperature=0))
    pairs = [(tuple(each.prompt), reply.token_ids) for each, reply in zip(questions, replies, strict=True)]
    return Answers(answers=tuple(Answer(prompt=prompt, answer=answer) for prompt, answer in pairs if answer))


class Reference:
    """The full model and its log-probabilities on windows of tokens, 4 bytes x tokens x vocabulary of them.

    `mask` is what even the full model goes without: nothing, or what it came without.
    """

    def __init__(self, checkpoint: Checkpoint, mask: DropMask, windows: Iterable[Window], *, dtype: str) -> None:
        self.family = checkpoint.family
        self.model = _load(checkpoint, mask, dtype)
        self.windows = tuple(windows)
        self.full = [_log_probabilities(self.model, window).cpu() for window in self.windows]

    def under(self, mask: DropMask) -> Divergence:
        """Of the same weights under a mask."""
        with hf.dropped(self.model, self.family, mask):
            return self.by(self.model)

    def of(self, checkpoint: Checkpoint, mask: DropMask, *, dtype: str) -> Divergence:
        """Of another checkpoint's weights, such as a model that was trained on after dropping."""
        return self.by(_load(checkpoint, mask, dtype))

    def by(self, model: Any) -> Divergence:
        """Of any model that reads the same tokens."""
        kl, agreement = [], []
        for window, full in zip(self.windows, self.full, strict=True):
            masked, full = _log_probabilities(model, window), full.to(model.device)
            kl.append((full.exp() * (full - masked)).sum(-1).mean().item())
            agreement.append((full.argmax(-1) == masked.argmax(-1)).float().mean().item())
        tokens = sum(map(len, self.full))
        return Divergence(kl=Estimate.mean(kl), agreement=Estimate.mean(agreement), tokens=tokens)


def _load(checkpoint: Checkpoint, mask: DropMask, dtype: str) -> Any:
    return hf.load(checkpoint.under(mask), dtype=getattr(torch, dtype)).to(default_device()).eval()


def _log_probabilities(model: Any, window: Window) -> torch.Tensor:
    """[positions, vocabulary], float32."""
    token_ids = torch.from_numpy(window.token_ids)[None].to(model.device)
    with torch.inference_mode():
        return model(token_ids, use_cache=False).logits[0, window.start : window.stop].float().log_softmax(-1)
