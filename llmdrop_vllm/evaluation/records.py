"""What is measured of a mask, as it stands in the files of `llmdrop evaluate` and `llmdrop sweep`."""

import math
from collections.abc import Mapping
from statistics import fmean, median, stdev
from typing import Literal, Self

from pydantic import Field, model_validator

from llmdrop_vllm.artifacts import DataIdentity, ModelIdentity, Provenance, Record, Scores, sha256
from llmdrop_vllm.errors import DataError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.candidates import Kind

TaskKind = Literal["multiple choice", "generation", "other"]
Prompting = Literal["chat", "completion"]
Asking = Prompting | Literal["auto"]
DivergedOn = Literal["text", "own answers", "held-out answers"]


class Estimate(Record):
    """A value with its standard error."""

    value: float
    stderr: float | None = None

    @staticmethod
    def mean(values: list[float]) -> "Estimate":
        """Of independent values; one alone has no standard error."""
        stderr = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return Estimate(value=fmean(values), stderr=stderr)

    def exp(self) -> "Estimate":
        """Of e to its power (delta method)."""
        value = math.exp(self.value)
        return Estimate(value=value, stderr=None if self.stderr is None else value * self.stderr)


class Perplexity(Estimate):
    """exp of the mean negative log-likelihood per token, over windows of `context` tokens of held-out text.

    `stderr` is of the perplexity: perplexity x the standard error of the mean over windows (delta method). `tokens`
    counts those predicted: all of a window but its first. `window_nll` has each window's mean, in nats per token.
    """

    stderr: float | None
    tokens: int
    context: int
    window_nll: tuple[float, ...]
    data: DataIdentity

    @classmethod
    def of(cls, nll: list[float], context: int, data: DataIdentity) -> Self:
        """From the mean negative log-likelihood of each window, in nats per token."""
        its, tokens = cls.mean(nll).exp(), len(nll) * (context - 1)
        return cls(value=its.value, stderr=its.stderr, tokens=tokens, context=context, window_nll=tuple(nll), data=data)

    def relative_to(self, full: "Perplexity") -> Estimate:
        """This perplexity over another on the same windows, with the standard error of the difference window by window:
        most of what makes a window hard is in both, so it is much smaller than those of the two.
        """
        pairs = zip(self.window_nll, full.window_nll, strict=True)
        return self.mean([own - other for own, other in pairs]).exp()


class Divergence(Record):
    """Next-token distributions against the full model's on the same `tokens` positions.

    `kl` is KL(full || masked) in nats per token; `agreement` the share of positions with the same most likely token.
    Standard errors are over windows. `data` says which held-out answers it is on, where they are a file's.
    """

    kl: Estimate
    agreement: Estimate
    tokens: int
    on: DivergedOn = "text"
    data: DataIdentity | None = None


class TaskScore(Record):
    """One metric of one lm-eval task, between 0 and 1. `chance` is what guessing would get, where that is known;
    `prompting` whether the model was asked through its chat template or had a text to complete.
    """

    task: str
    metric: str
    kind: TaskKind
    value: float
    stderr: float | None = None
    chance: float | None = None
    samples: int
    prompting: Prompting = "completion"


class Speed(Record):
    """Tokens per second of one engine, one value per round, each round with prompts of its own."""

    prefill_tokens_per_s: tuple[float, ...]
    decode_tokens_per_s: tuple[float, ...]


class Quality(Record):
    """What is left of a model's quality under a mask."""

    mask: DropMask
    perplexity: Perplexity
    divergence: Divergence | None = None
    tasks: tuple[TaskScore, ...] = ()

    def tasks_of(self, kind: TaskKind | None = None) -> list[TaskScore]:
        """Of one kind, or all."""
        return [task for task in self.tasks if kind in (None, task.kind)]

    def task_average(self, kind: TaskKind | None = None) -> float | None:
        """Mean score over tasks, of one kind or all; None without any."""
        return fmean(task.value for task in found) if (found := self.tasks_of(kind)) else None


class Evaluation(Record):
    """What `llmdrop evaluate` writes. `skipped`: task to why not; `healed`: how the checkpoint was, if so; `full`: what
    it was compared with, where that is another one, and its perplexity on the same text.
    """

    kind: Literal["llmdrop-evaluation"] = "llmdrop-evaluation"
    quality: Quality
    skipped: Mapping[str, str] = Field(default_factory=dict)
    healed: Literal["healed", "trained"] | None = None
    full: ModelIdentity | None = None
    full_perplexity: Perplexity | None = None
    provenance: Provenance


class Point(Record):
    """One mask of a sweep. `kv_share` is its KV cache, as vLLM stores it, over the full model's.

    `full_speed` is the full model's on the same prompts, the two in turns.
    """

    quality: Quality
    speed: Speed | None
    full_speed: Speed | None
    kv_share: float
    parameters: int


class Series(Record):
    """Masks that drop more and more in one order. `counts[k]` sublayers (or blocks) are gone in the mask `masks[k]`."""

    name: str
    what: Kind
    order: str
    counts: tuple[int, ...]
    masks: tuple[str, ...]

    @property
    def steps(self) -> dict[int, str]:
        """Number dropped to mask id."""
        return dict(zip(self.counts, self.masks, strict=True))


class SpeedWorkload(Record):
    """What speed was measured with: `requests` at once, each with so many prompt and output tokens."""

    requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def prefill_tokens(self) -> int:
        """Of all prompts."""
        return self.requests * self.prompt_tokens

    @property
    def decode_tokens(self) -> int:
        """Of all answers, without the first of each, which comes with the prefill; 0 where it is the only one."""
        return self.requests * (self.output_tokens - 1)


class SweepRequest(Record):
    """What a sweep was asked to measure; a sweep goes on only where all of it is the same."""

    fingerprint: str
    scores_sha256: str
    data: DataIdentity
    context: int
    divergence_tokens: int
    tasks: tuple[str, ...]
    limit: int | None
    workload: SpeedWorkload | None
    dtype: str
    prompting: Asking = "auto"
    divergence_on: DivergedOn = "text"
    divergence_data: DataIdentity | None = None


class Sweep(Record):
    """What `llmdrop sweep` writes, anew after each point. `points` are by mask id, `base` is the id of the full model:
    of the mask that it came with, where it had one. A mask that several series reach, in whatever order, is one point.
    """

    kind: Literal["llmdrop-sweep"] = "llmdrop-sweep"
    request: SweepRequest
    base: str
    series: tuple[Series, ...]
    points: Mapping[str, Point] = Field(default_factory=dict)
    provenance: Provenance

    @model_validator(mode="after")
    def _check_points(self) -> Self:
        for name, point in self.points.items():
            if mask_id(point.quality.mask) != name:
                raise ValueError(f"points.{name} is of another mask")
        return self

    @property
    def full(self) -> Point:
        """The model as it came. Raises DataError where the sweep did not get so far."""
        if self.base not in self.points:
            raise DataError("the sweep has no point yet, not even the full model; run `llmdrop sweep` again")
        return self.points[self.base]

    def of(self, series: Series) -> list[tuple[int, Point]]:
        """(number dropped, point) of what is measured, the full model first as number 0."""
        return [(0, self.full), *((n, self.points[mask]) for n, mask in series.steps.items() if mask in self.points)]

    def speedup(self, point: Point) -> float | None:
        """Time of the full model over the point's, for the workload's prefill and decode: the median over rounds,
        in which both had the same prompts within seconds; None if unmeasured.
        """
        return median(found) if (found := self._speedups(point)) else None

    def speedup_spread(self, point: Point) -> tuple[float, float] | None:
        """Smallest and largest speedup over rounds."""
        return (min(found), max(found)) if (found := self._speedups(point)) else None

    def _speedups(self, point: Point) -> list[float]:
        workload = self.request.workload
        if workload is None or point.speed is None or point.full_speed is None:
            return []
        pairs = zip(_seconds(workload, point.full_speed), _seconds(workload, point.speed), strict=True)
        return [full / own for full, own in pairs]


def mask_id(mask: DropMask) -> str:
    """The same for masks that drop the same, in whatever order."""
    if not mask:
        return "full"
    windows = [mask.windows] if mask.windows else []  # ids of earlier results stay what they are
    return sha256([mask.num_hidden_layers, *(sorted(layers) for layers in mask.dropped), *windows])[:12]


def _seconds(workload: SpeedWorkload, speed: Speed) -> list[float]:
    """That the workload takes by each round's speeds: prefill, then decode, which has a speed where it has tokens."""
    prefill, decode = workload.prefill_tokens, workload.decode_tokens
    pairs = zip(speed.prefill_tokens_per_s, speed.decode_tokens_per_s, strict=True)
    return [prefill / fast + (decode / slow if decode else 0) for fast, slow in pairs]


def scores_id(scores: Scores) -> str:
    """Which scores a sweep followed: by what was measured, not by when."""
    return sha256([scores.similarity.model_dump(), scores.provenance.model.fingerprint])[:16]
