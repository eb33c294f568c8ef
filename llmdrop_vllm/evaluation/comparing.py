"""The same questions to the full, the dropped and the healed model, through vLLM, one engine after another."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from llmdrop_vllm.artifacts import Provenance
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint, MaskedCheckpoint
from llmdrop_vllm.data.comparison import Comparison, Form, Said
from llmdrop_vllm.data.prompts import PROMPTS, Chat, read_prompts
from llmdrop_vllm.data.tokens import load_tokenizer
from llmdrop_vllm.errors import CheckpointError, DataError, MaskError
from llmdrop_vllm.evaluation.engine import EngineSettings, Question, Reply, default_device, running
from llmdrop_vllm.evaluation.evaluate import check_full
from llmdrop_vllm.healing.records import Healing, healing_of
from llmdrop_vllm.kv_cache.kinds import dtype_bytes
from llmdrop_vllm.masks.mask import DropMask


@dataclass(frozen=True)
class ComparisonPlan:
    """Questions as they are shown and as token ids, and who is asked: name, model and healing, the full model first."""

    checkpoint: Checkpoint
    forms: tuple[tuple[Any, MaskedCheckpoint, Healing | None], ...]
    prompts: Path
    questions: Mapping[str, tuple[int, ...]]
    max_tokens: int
    settings: EngineSettings

    def record(self) -> Comparison:
        """Ask all of them."""
        checkpoint, replies = self.checkpoint, [self._replies(masked) for _, masked, _ in self.forms]
        forms = zip(self.forms, replies, strict=True)
        return Comparison(
            date=datetime.now(UTC).date().isoformat(),
            prompts="ours" if self.prompts == PROMPTS else str(self.prompts),
            max_tokens=self.max_tokens,
            kv_dtype=checkpoint.kv_dtype,
            questions=tuple(self.questions),
            forms=tuple(self._form(*form, given, full=replies[0]) for form, given in forms),
            provenance=Provenance.of(checkpoint, dtype=self.settings.dtype, device=default_device()),
        )

    def _replies(self, masked: MaskedCheckpoint) -> list[Reply]:
        asked = [Question(ids, self.max_tokens) for ids in self.questions.values()]
        with running(masked.checkpoint, masked.mask, self.settings, harness=False) as engine:
            return [*chain.from_iterable(engine.replies(asked, temperature=0))]

    def _form(
        self, name: Any, masked: MaskedCheckpoint, healing: Healing | None, replies: list[Reply], *, full: list[Reply]
    ) -> Form:
        return Form(
            name=name,
            fingerprint=masked.checkpoint.fingerprint,
            mask=masked.mask,
            summary=masked.mask.summary(),
            healing=healing.summary() if healing else None,
            weight_bytes=masked.weight_bytes,
            kv_bytes_per_token=masked.layout.token_bytes(dtype_bytes(self.checkpoint.kv_dtype)),
            answers=tuple(
                Said.beside(its.text.strip(), own.text.strip(), len(own.token_ids), own.finish_reason)
                for own, its in zip(replies, full, strict=True)
            ),
        )


def plan_comparison(
    checkpoint: Checkpoint,
    mask: DropMask,
    full: Checkpoint | None,
    *,
    prompts: Path = PROMPTS,
    samples: int,
    max_tokens: int,
    dtype: str,
    options: Mapping[str, Any],
) -> ComparisonPlan:
    """Choose the first `samples` questions of a file, and whom to ask: the full model, it under the mask, and the
    checkpoint, if that was healed. `options` are vLLM's own.

    Raises MaskError where nothing is dropped, CheckpointError without the full model of a checkpoint that has a mask
    or for one that it is not of, DataError for prompts that are no questions or do not fit the context.
    """
    healing = healing_of(checkpoint.directory)
    if not mask:
        raise MaskError(f"{checkpoint.directory} drops nothing; expected a dropped model, or a mask")
    if checkpoint.mask and full is None:
        raise CheckpointError(f"{checkpoint.directory} is dropped already; name the model that it is of: --full MODEL")
    check_full(full, checkpoint)
    whole = full or checkpoint
    dropped = (whole if healing else checkpoint).under(mask)
    healed = [(healing.method, checkpoint.under(mask), healing)] if healing else []
    forms = (("full", whole.under(whole.decoder.whole), None), ("dropped", dropped, None), *healed)
    for _, masked, _ in forms:
        masked.check_complete()
    questions = _questions(checkpoint, prompts, samples, max_tokens)
    settings = EngineSettings(dtype, max(map(len, questions.values())) + max_tokens, options=options)
    return ComparisonPlan(checkpoint, forms, prompts, questions, max_tokens, settings)


def _questions(checkpoint: Checkpoint, path: Path, samples: int, max_tokens: int) -> dict[str, tuple[int, ...]]:
    tokenizer = load_tokenizer(checkpoint, "its model's belongs there")
    found = {}
    for number, prompt in enumerate(read_prompts(path)[:samples]):
        if not isinstance(prompt, Chat) or prompt.question is None:
            raise DataError(f"{path}: prompt {number} (from 0) is no question; expected a string by itself")
        ids = tuple(prompt.token_ids(tokenizer))
        if checkpoint.context and len(ids) + max_tokens > checkpoint.context:
            room = f"prompt {number} (from 0) has {len(ids)} tokens, and {max_tokens} are to be answered"
            raise DataError(f"{path}: {room}; the model's context is {checkpoint.context}")
        found[prompt.question] = ids
    return found
