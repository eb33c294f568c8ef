"""A model's answers to prompts, sampled through vLLM into a file that the later steps read; all is checked before."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llmdrop_vllm.artifacts import Provenance, sha256
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.answers import Answer, AnswersHeader
from llmdrop_vllm.data.growing import growing
from llmdrop_vllm.data.prompts import PROMPTS, Prompt, read_prompts
from llmdrop_vllm.data.tokens import load_tokenizer, vocab_size
from llmdrop_vllm.errors import DataError
from llmdrop_vllm.evaluation.engine import EngineSettings, Question, Reply, default_device, running


@dataclass(frozen=True)
class AnswersRequest:
    """What is asked: all prompts of a file, or `samples` of them drawn by the seed, each of them `per_prompt` times.

    `held_out` is the share of prompts that is kept apart for judging. Raises DataError for what cannot be.
    """

    prompts: Path = PROMPTS
    samples: int | None = None
    max_tokens: int = 256
    per_prompt: int = 1
    temperature: float = 0.8
    seed: int = 0
    held_out: float = 0.1

    def __post_init__(self) -> None:
        names = ("prompts", "tokens of an answer", "answers to a prompt")
        for name, value in zip(names, (self.samples, self.max_tokens, self.per_prompt), strict=True):
            if value is not None and value < 1:
                raise DataError(f"{name}: {value} asked; expected 1 or more")
        if self.seed < 0 or not isfinite(self.temperature) or self.temperature < 0:
            raise DataError(f"seed {self.seed} and temperature {self.temperature} asked; expected 0 or more")
        if not 0 <= self.held_out < 1:
            raise DataError(f"{self.held_out:.0%} of the prompts held out; expected less than all")
        if self.temperature == 0 and self.per_prompt > 1:
            asked = f"{self.per_prompt} answers to a prompt asked at temperature 0"
            raise DataError(f"{asked}, where all would be the same")


@dataclass(frozen=True)
class AnswersPlan:
    """Prompts as token ids by their number, in the order in which they are answered; `left_out` says which are not."""

    checkpoint: Checkpoint
    request: AnswersRequest
    settings: EngineSettings
    prompts: Mapping[int, tuple[int, ...]]
    held_out: Collection[int]
    num_prompts: int
    left_out: str = ""

    @property
    def header(self) -> AnswersHeader:
        """What the file begins with."""
        source = "ours" if self.request.prompts == PROMPTS else str(self.request.prompts)
        asked = asdict(self.request) | {"prompts": source}
        del asked["samples"]  # which the hash tells
        return AnswersHeader(
            **asked,
            prompts_sha256=sha256(self.prompts.items()),
            num_prompts=self.num_prompts,
            engine_args=dict(self.settings.options),
            provenance=Provenance.of(self.checkpoint, dtype=self.settings.dtype, device=default_device()),
        )

    @property
    def questions(self) -> tuple[tuple[int, Question], ...]:
        """With their numbers, each once, then each again. An answer's seed is its own, whatever else is asked."""
        most = self.settings.max_model_len
        return tuple(
            (number, Question(ids, min(self.request.max_tokens, most - len(ids)), self._seed(number, turn)))
            for turn in range(self.request.per_prompt)
            for number, ids in self.prompts.items()
        )

    def _seed(self, number: int, turn: int) -> int:
        return int(np.random.SeedSequence([self.request.seed, number, turn]).generate_state(1)[0])


def plan_answers(
    checkpoint: Checkpoint, request: AnswersRequest, *, dtype: str, options: Mapping[str, Any]
) -> AnswersPlan:
    """Choose the prompts and tell those that are held out; `options` are vLLM's own.

    A prompt that leaves no room in the context, or that the chat template does not take, is left out. Raises DataError
    where none can be asked or fewer than `samples`, InputError for an option that vLLM does not have.
    """
    prompts = read_prompts(request.prompts)
    given = options.get("max_model_len")
    context = given if isinstance(given, int) and given > 0 else checkpoint.context
    chosen, left_out = _choose(prompts, request, checkpoint, context)
    longest = max(map(len, chosen.values())) + request.max_tokens
    gone = f"left out are {left_out.total()} of {len(prompts)} prompts: {_reasons(left_out)}" if left_out else ""
    longest = min(longest, context or longest)
    settings = EngineSettings(dtype, longest, options=options, seeded=request.temperature > 0)
    held_out = _held_out(chosen, request, len(prompts))
    return AnswersPlan(checkpoint, request, settings, chosen, held_out, len(prompts), gone)


def sample_answers(plan: AnswersPlan, out: Path, *, progress: bool = False) -> None:
    """Have the checkpoint as it is answer, into a file that is there when all answers are. Those of an earlier run that
    did not come to its end are kept. Raises OutputError for a place that cannot be written to.
    """
    checkpoint, questions = plan.checkpoint, plan.questions
    with growing(out, plan.header, Answer) as answers:
        if answers.count == len(questions):
            return
        with (
            tqdm(total=len(questions), initial=answers.count, unit="answer", disable=not progress) as bar,
            running(checkpoint, checkpoint.mask, plan.settings, harness=False) as engine,
        ):
            missing = iter(questions[answers.count :])
            asked = [question for _, question in questions[answers.count :]]
            for replies in engine.replies(asked, temperature=plan.request.temperature):
                answers.append([_answer(plan, *next(missing), reply) for reply in replies])
                bar.update(len(replies))


def _answer(plan: AnswersPlan, number: int, question: Question, reply: Reply) -> Answer:
    return Answer(
        prompt_number=number,
        held_out=number in plan.held_out,
        finish_reason=reply.finish_reason,
        prompt=tuple(question.prompt),
        answer=reply.token_ids,
        text=reply.text,
    )


def _choose(
    prompts: Sequence[Prompt], request: AnswersRequest, checkpoint: Checkpoint, context: int | None
) -> tuple[dict[int, tuple[int, ...]], Counter[str]]:
    """Token ids by number, in an order that makes the first ones a sample of all; and why others are left out."""
    tokenizer, size = load_tokenizer(checkpoint, "its model's belongs there"), vocab_size(checkpoint)
    chosen: dict[int, tuple[int, ...]] = {}
    left_out: Counter[str] = Counter()
    for number in np.random.default_rng(request.seed).permutation(len(prompts)).tolist():
        if len(chosen) == request.samples:
            break
        try:
            ids = tuple(prompts[number].token_ids(tokenizer))
        except DataError as error:
            left_out[str(error)] += 1
            continue
        if not ids or max(ids) >= size:
            found = f"token id {max(ids)}" if ids else "no token"
            raise DataError(f"{request.prompts}: prompt {number} (from 0) has {found}; expected 0 to {size - 1}")
        if context and len(ids) >= context:
            left_out[f"no room in the context of {context} tokens"] += 1
        else:
            chosen[number] = ids
    if len(chosen) < (request.samples or 1):
        found = f"{len(chosen)} prompts that can be asked; {request.samples or 'at least 1'} asked"
        raise DataError(f"{request.prompts} holds {found}{_reasons(left_out) and f'; left out: {_reasons(left_out)}'}")
    return chosen, left_out


def _reasons(left_out: Counter[str]) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in left_out.most_common(3))


def _held_out(prompts: Mapping[int, tuple[int, ...]], request: AnswersRequest, num_prompts: int) -> frozenset[int]:
    """Numbers of the prompts to judge by; where there are two, one at least on either side.

    Of ours the first ones, a sample of all kinds, by which `own_answers` judges too. Of others by a hash of their
    tokens, so that the same prompt is on the same side each time it comes and in every file.
    """

    def rank(number: int, ids: Sequence[int]) -> float:
        if request.prompts == PROMPTS:
            return number / num_prompts
        return int(sha256([request.seed, list(ids)])[:8], 16) / 2**32

    ranks = {number: rank(number, ids) for number, ids in prompts.items()}
    chosen = {each for each in ranks.values() if each < request.held_out}
    if request.held_out:
        chosen = (chosen | {min(ranks.values())}) - {max(ranks.values())}
    return frozenset(number for number, each in ranks.items() if each in chosen)
