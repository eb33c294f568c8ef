"""Sweeps that were never measured, for what reads them."""

import math

from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import DataIdentity, MaskRecord, ModelIdentity, Provenance
from llmdrop_vllm.evaluation.records import (
    Divergence,
    Estimate,
    Perplexity,
    Point,
    Quality,
    Series,
    Speed,
    SpeedWorkload,
    Sweep,
    SweepRequest,
    TaskScore,
    mask_id,
)

DEPTH = 8
DATA = DataIdentity(source="held-out", sequences=2, tokens=32, seq_len=16, seed=0, sha256="d")
WORKLOAD = SpeedWorkload(requests=2, prompt_tokens=100, output_tokens=51)


def speed(*factors):
    """The workload takes 2 s of prefill and 1 s of decode at factor 1; a round for each factor."""
    rates = tuple(100.0 * factor for factor in factors)
    return Speed(prefill_tokens_per_s=rates, decode_tokens_per_s=rates)


def point(mask, *, perplexity=10.0, choice=0.8, generation=0.8, faster=1.0, kv_share=1.0, agreement=1.0):
    """Scores of None are not measured."""
    tasks = {"multiple choice": choice, "generation": generation}
    return Point(
        quality=Quality(
            mask=MaskRecord.of(mask),
            perplexity=Perplexity.of([math.log(perplexity) - 0.01, math.log(perplexity) + 0.01], 16, DATA),
            divergence=Divergence(kl=Estimate(value=0.1), agreement=Estimate(value=agreement), tokens=32),
            tasks=tuple(
                TaskScore(task=kind, metric="acc", kind=kind, value=value, samples=10)
                for kind, value in tasks.items()
                if value is not None
            ),
        ),
        speed=None if faster is None else speed(faster),
        full_speed=None if faster is None else speed(1.0),
        kv_share=kv_share,
        parameters=1000,
    )


def sweep(*points, full=None, workload=WORKLOAD):
    """One series of these points, each with one more attention sublayer dropped, after the full model."""
    full = full or point(DropMask(DEPTH))
    masks = [each.quality.mask.mask for each in points]
    counts = tuple(len(mask.attention) for mask in masks)
    series = Series(
        name="attention", what="attention", order="by importance", counts=counts, masks=tuple(map(mask_id, masks))
    )
    request = SweepRequest(
        fingerprint="f",
        scores_sha256="s",
        data=DATA,
        context=16,
        divergence_tokens=32,
        tasks=(),
        limit=None,
        workload=workload,
        dtype="float32",
    )
    return Sweep(
        request=request,
        base=mask_id(full.quality.mask.mask),
        series=(series,),
        points={mask_id(each.quality.mask.mask): each for each in (full, *points)},
        provenance=Provenance(model=ModelIdentity(path="m", architecture="a", fingerprint="f")),
    )
