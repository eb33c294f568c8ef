"""Records of sweeps that nobody ran, for what reads them: their points say what a test wants."""

import math

from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import DataIdentity, ModelIdentity, Provenance
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
FINGERPRINT = "f00d"
WORKLOAD = SpeedWorkload(requests=4, prompt_tokens=256, output_tokens=128)


def data(source="wikitext", sequences=64):
    return DataIdentity(source=source, sequences=sequences, tokens=sequences * 512, seq_len=512, seed=0, sha256="ab12")


def provenance(source=None, path="/models/tiny-llama", fingerprint=FINGERPRINT):
    return Provenance(
        model=ModelIdentity(path=path, architecture="LlamaForCausalLM", fingerprint=fingerprint),
        data=None if source is None else data(source),
        dtype="bfloat16",
        device="cpu",
        versions={"llmdrop-vllm": "0.1.0", "torch": "2.13.0"},
        command="llmdrop sweep /models/tiny-llama --out sweep.json",
    )


def speed(*factors):
    """A round for each factor."""
    return Speed(
        prefill_tokens_per_s=tuple(9000.0 * factor for factor in factors),
        decode_tokens_per_s=tuple(400.0 * factor for factor in factors),
    )


def measured(mask, nll, tasks, divergence, factors, kv_share, parameters):
    """A point that was as many times as fast as the full model as `factors` say, round by round; none: not timed."""
    return Point(
        quality=Quality(
            mask=mask,
            perplexity=Perplexity.of(nll, 512, data()),
            divergence=divergence,
            tasks=tasks,
        ),
        speed=speed(*factors) if factors else None,
        full_speed=speed(*[1.0] * len(factors)) if factors else None,
        kv_share=kv_share,
        parameters=parameters,
    )


def recorded(series, points, *, base="full", path="/models/tiny-llama", **request):
    """A sweep of these points by mask id."""
    asked = {
        "fingerprint": FINGERPRINT,
        "scores_sha256": "s",
        "data": data(),
        "context": 512,
        "divergence_tokens": 4096,
        "tasks": (),
        "limit": 500,
        "workload": WORKLOAD,
        "dtype": "bfloat16",
    }
    return Sweep(
        request=SweepRequest(**asked | request),
        base=base,
        series=tuple(series),
        points=points,
        provenance=provenance(path=path),
    )


def point(mask, *, perplexity=10.0, choice=0.8, generation=0.8, faster=1.0, kv_share=1.0, agreement=1.0):
    """Scores and a speed of None are not measured."""
    tasks = tuple(
        TaskScore(task=kind, metric="acc", kind=kind, value=value, samples=10)
        for kind, value in {"multiple choice": choice, "generation": generation}.items()
        if value is not None
    )
    nll = [math.log(perplexity) - 0.01, math.log(perplexity) + 0.01]
    divergence = Divergence(kl=Estimate(value=0.1), agreement=Estimate(value=agreement), tokens=32)
    return measured(mask, nll, tasks, divergence, [] if faster is None else [faster], kv_share, 1000)


def sweep(*points, full=None, workload=WORKLOAD):
    """One series of these points, each with one more attention sublayer dropped, after the full model."""
    full = full or point(DropMask(DEPTH))
    masks = [each.quality.mask for each in points]
    counts = tuple(len(mask.attention) for mask in masks)
    series = Series(
        name="attention", what="attention", order="by importance", counts=counts, masks=tuple(map(mask_id, masks))
    )
    by_id = {mask_id(each.quality.mask): each for each in (full, *points)}
    return recorded([series], by_id, base=mask_id(full.quality.mask), workload=workload)
