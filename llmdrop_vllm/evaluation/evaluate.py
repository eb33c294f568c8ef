"""Perplexity, agreement with the full model and tasks, of one model under one mask."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdrop_vllm.artifacts import DataIdentity, ModelIdentity, Provenance
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.answers import is_answers
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import CheckpointError, DataError
from llmdrop_vllm.evaluation.divergence import Answers, Reference, Window, answer_windows, own_answers
from llmdrop_vllm.evaluation.engine import Engine, EngineSettings, running
from llmdrop_vllm.evaluation.harness import Harness
from llmdrop_vllm.evaluation.masked_engines import Plan, any_engines
from llmdrop_vllm.evaluation.records import DivergedOn, Divergence, Evaluation, Perplexity, Quality
from llmdrop_vllm.healing.records import healing_of
from llmdrop_vllm.masks.mask import DropMask

DEFAULT_CONTEXT, DEFAULT_WINDOWS, DEFAULT_DIVERGENCE_TOKENS = 512, 32, 4096


@dataclass(frozen=True)
class Measures:
    """What to measure: the windows of text, for how many tokens the divergence (0: none) and on what, the tasks.

    `held_out` are a file's answers to compare next tokens on; without, the model is asked for some, or the text serves.
    """

    text: Calibration
    context: int
    divergence_tokens: int = DEFAULT_DIVERGENCE_TOKENS
    harness: Harness = Harness()
    divergence_on: DivergedOn = "text"
    held_out: Calibration | None = None

    @property
    def divergence_data(self) -> DataIdentity | None:
        """Which held-out answers of a file."""
        return self.held_out.identity if self.held_out else None

    def named(self, found: Divergence) -> Divergence:
        """As found, with what it is on."""
        return found.model_copy(update={"on": self.divergence_on, "data": self.divergence_data})

    def windows(self, answers: Callable[[], Answers]) -> tuple[Window, ...]:
        """What next tokens are compared on: whole windows of text, at least one, or answers if they are asked for.

        Raises DataError where the full model answers nothing.
        """
        if not self.divergence_tokens:
            return ()
        if self.divergence_on == "text":
            return tuple(map(Window, self.text.sequences[: max(1, self.divergence_tokens // self.context)]))
        if self.held_out is not None:
            return answer_windows(self.held_out)
        found = answers().answers
        if not found:
            raise DataError("the full model's answers are empty; compare on text: --divergence-on text")
        return tuple(each.window for each in found)

    def divergences(
        self, checkpoint: Checkpoint, masks: Mapping[str, DropMask], answers: Callable[[], Answers], *, dtype: str
    ) -> dict[str, Divergence]:
        """By name, of these masks' next tokens and those of the checkpoint as it is, which is loaded once for all."""
        windows = self.windows(answers) if masks else ()
        if not windows:
            return {}
        reference = Reference(checkpoint, checkpoint.mask, windows, dtype=dtype)
        return {name: self.named(reference.under(mask)) for name, mask in masks.items()}

    def perplexity(self, engine: Engine) -> Perplexity:
        """An engine's on the text."""
        return Perplexity.of(engine.negative_log_likelihoods(self.text.sequences), self.context, self.text.identity)

    def quality(self, engine: Engine, mask: DropMask, *, bars: bool = True) -> tuple[Quality, dict[str, Any] | None]:
        """What an engine under this mask is worth, and lm-eval's own results; `bars` lets lm-eval show progress."""
        perplexity = self.perplexity(engine)
        tasks, raw = self.harness.run(engine.harness, bars=bars) if self.harness.tasks else ((), None)
        return Quality(mask=mask, perplexity=perplexity, tasks=tasks), raw


def load_text(
    checkpoint: Checkpoint, source: str, *, context: int | None, windows: int | None
) -> tuple[Calibration, int]:
    """Windows of `context` tokens, and that number; by default 512, or what the model takes with one to predict.

    Raises DataError for text that is shorter than one window, for a context that leaves no token to predict and for
    token ids in sequences of different lengths.
    """
    most = checkpoint.context
    if context is not None and most is not None and context >= most:
        raise DataError(f"--context is {context}; expected at most {most - 1}: of the model's {most}, one is to come")
    if is_answers(Path(source)):
        raise DataError(f"{source} holds answers; expected text: perplexity is of whole windows")
    fewer = windows is None
    if Path(source).suffix.lower() != ".json":  # whose sequences are taken as they are
        context = context or min(DEFAULT_CONTEXT, (most or DEFAULT_CONTEXT + 1) - 1)
        windows = windows or DEFAULT_WINDOWS
    found = load_calibration(checkpoint, source, samples=windows, seq_len=context, fewer=fewer)
    if found.identity.seq_len is None:
        raise DataError(f"{source} holds sequences of different lengths; perplexity needs them to be of one")
    return found, found.identity.seq_len


def evaluate_checkpoint(
    checkpoint: Checkpoint, mask: DropMask, measures: Measures, settings: EngineSettings, full: Checkpoint | None = None
) -> tuple[Evaluation, dict[str, Any] | None]:
    """Measure a model under a mask; the second value is lm-eval's own results, where tasks were asked for.

    `full` has the full model's weights, where the checkpoint lacks what the mask drops; without it there is no
    divergence then, and with it its perplexity is measured too. Raises CheckpointError as `check_full`.
    """
    check_full(full, checkpoint)
    whole, nothing = full or checkpoint, DropMask(mask.num_hidden_layers)
    plan = Plan(checkpoint, settings, None, quality=True, harness=bool(measures.harness.tasks))
    answers = measures.divergence_tokens > 0 and measures.divergence_on == "own answers"
    # One engine for both where the weights are the same: it is built with nothing gone, and switches no windows.
    alike = answers and full is None and not (checkpoint.mask or mask.windows)
    windows: tuple[Window, ...] = ()
    full_perplexity = None
    if full is not None:
        with running(full, nothing, settings, harness=False) as engine:
            full_perplexity = measures.perplexity(engine)
            windows = measures.windows(lambda: own_answers(engine, measures.divergence_tokens))
    with any_engines(plan, switching=alike) as engines:

        def ask() -> Answers:
            with engines.under(nothing) as engine:
                return own_answers(engine, measures.divergence_tokens)

        if full is None and not checkpoint.is_stripped:
            windows = measures.windows(ask)
        with engines.under(mask) as engine:
            quality, raw = measures.quality(engine, mask)
    if windows:
        reference = Reference(whole, nothing, windows, dtype=settings.dtype)
        own = reference.under(mask) if full is None else reference.of(checkpoint, mask, dtype=settings.dtype)
        quality = quality.model_copy(update={"divergence": measures.named(own)})
    healing = healing_of(checkpoint.directory)
    found = Evaluation(
        quality=quality,
        skipped=measures.harness.skipped,
        healed=healing.method if healing else None,
        full=None if full is None else ModelIdentity.of(full),
        full_perplexity=full_perplexity,
        provenance=Provenance.of(checkpoint, data=measures.text.identity, dtype=settings.dtype),
    )
    return found, raw


def check_full(full: Checkpoint | None, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for one that is another model, drops something, or is not what was healed towards."""
    if full is None:
        return
    if (found := _kind(full)) != (own := _kind(checkpoint)):
        raise CheckpointError(f"{full.directory} ({found}) is not the full model of {checkpoint.directory} ({own})")
    if full.mask:
        raise CheckpointError(f"{full.directory} is no full model: {full.mask.summary()}; name what it was made of")
    healing = healing_of(checkpoint.directory)
    if healing and (teacher := healing.teacher).fingerprint != full.fingerprint:
        healed = f"{checkpoint.directory} was healed towards {teacher.path} (weights {teacher.fingerprint})"
        raise CheckpointError(f"{healed}; --full {full.directory} has {full.fingerprint}")


def _kind(checkpoint: Checkpoint) -> str:
    layers, tokens = checkpoint.mask.num_hidden_layers, checkpoint.decoder.config.get("vocab_size")
    return f"{checkpoint.architecture}, {layers} layers, vocabulary {tokens}"
