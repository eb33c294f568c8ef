"""Records of a sweep that nobody ran: 12 layers, in which deep attention matters least, as in trained models."""

import math
import random

from llmdrop_vllm.artifacts import (
    AttentionDiagnostics,
    Diagnostics,
    Scores,
    Similarities,
    SublayerDiagnostics,
)
from llmdrop_vllm.evaluation.records import Divergence, Estimate, Evaluation, Series, TaskScore, mask_id, scores_id
from llmdrop_vllm.masks.mask import DropMask
from tests.evaluation.sweeps import FINGERPRINT, WORKLOAD, measured, provenance, recorded

TASKS = (
    ("arc_easy", "acc", "multiple choice", 0.62, 0.25),
    ("boolq", "acc", "multiple choice", 0.71, 0.5),
    ("gsm8k", "exact_match", "generation", 0.31, None),
)


def weight(layer, depth, mlp=False):
    """How much a sublayer matters: the first most, the deeper the less, MLPs more than attention."""
    return (0.5 if layer == 0 else 0.3 * math.exp(-3 * layer / depth) + 0.01 * (layer % 3)) * (2.5 if mlp else 1)


def scores(source="embedded", depth=12, tilt=1.0, fingerprint=FINGERPRINT, diagnostics=True):
    """`tilt` makes one calibration set differ from another."""
    attention = tuple(1 - tilt * weight(layer, depth) for layer in range(depth))
    mlp = tuple(1 - 0.8 * tilt * weight(layer, depth, mlp=True) / 2 for layer in range(depth))
    block = tuple((a + m) / 2 - 0.02 for a, m in zip(attention, mlp, strict=True))
    falling = tuple(0.9 * tilt * math.exp(-2 * layer / depth) if diagnostics else None for layer in range(depth))
    rising = tuple(0.2 + 0.6 * layer / depth / tilt if diagnostics else None for layer in range(depth))
    common = {"magnitude_ratio": falling, "token_cosine_before": rising, "token_cosine_after": rising[::-1]}
    return Scores(
        num_hidden_layers=depth,
        similarity=Similarities(attention=attention, mlp=mlp, block=block),
        block_similarity_by_gap=tuple((block[layer],) * (depth - layer) for layer in range(depth)),
        gap_tokens=512,
        diagnostics=Diagnostics(
            attention=AttentionDiagnostics(**common, concentration=rising, first_token=falling),
            mlp=SublayerDiagnostics(**common),
        ),
        kv_groups=("full",) * depth,
        dropped=DropMask(depth),
        provenance=provenance(source, fingerprint=fingerprint),
    )


def point(mask, tasks=TASKS, speed=True, divergence=True):
    """What such a mask would measure: it follows from `weight`, so that tests can expect an order."""
    depth = mask.num_hidden_layers
    cost = sum(weight(layer, depth) for layer in mask.attention) + sum(weight(x, depth, True) for x in mask.mlp)
    cost *= 0.4 + 0.05 * (len(mask.attention) + len(mask.mlp))
    kept = math.exp(-1.2 * cost)
    # The full model's windows differ by more than a mask changes any of them.
    nll = [math.log(11.9) + cost * (1 + 0.02 * side) + 0.2 * side for side in (-1, 1) * 32]
    found = tuple(
        TaskScore(task=t, metric=m, kind=k, value=(c or 0) + (v - (c or 0)) * kept, stderr=0.012, chance=c, samples=500)
        if k != "generation"
        else TaskScore(task=t, metric=m, kind=k, value=v * kept**3, stderr=0.014, chance=c, samples=500)
        for t, m, k, v, c in tasks
    )
    apart = Divergence(
        kl=Estimate(value=0.6 * cost, stderr=0.01), agreement=Estimate(value=0.95 * kept, stderr=0.004), tokens=4096
    )
    gain = 1 + 0.03 * len(mask.attention) + 0.02 * len(mask.mlp)
    return measured(
        mask,
        nll,
        found,
        apart if divergence and mask else None,
        [gain * (0.98 + 0.02 * turn) for turn in range(3)] if speed else [],
        kv_share=1 - len(mask.attention) / depth,
        parameters=10_000_000 - 400_000 * len(mask.attention) - 600_000 * len(mask.mlp),
    )


def orders(depth):
    """Series name to (what, order, layers in order of dropping)."""
    layers = range(depth)
    ranked = sorted(layers, key=lambda layer: weight(layer, depth))
    found = {
        "attention": ("attention", "by importance", ranked),
        "mlp": ("mlp", "by importance", ranked),
        "blocks": ("blocks", "by importance", ranked),
        "consecutive": ("blocks", "consecutive", [*range(depth // 2, depth)]),
        "last": ("attention", "from the last", [*layers][::-1]),
        "last keeping the last layer": ("attention", "from the last but one", [*layers][-2::-1]),
        "reverse": ("attention", "by importance, reversed", ranked[::-1]),
    }
    for seed in range(3):
        found[f"random {seed}"] = ("attention", f"at random, seed {seed}", random.Random(seed).sample(layers, depth))
    return found


def mask_of(what, layers, depth):
    if what == "joint":
        gone = sorted((weight(x, depth, kind), x, kind) for x in range(depth) for kind in (False, True))[: len(layers)]
        return DropMask(depth, [x for _, x, mlp in gone if not mlp], [x for _, x, mlp in gone if mlp])
    return DropMask(depth, layers if what != "mlp" else (), layers if what != "attention" else ())


def sweep(
    depth=12, counts=tuple(range(1, 11)), names=None, keep=1.0, workload=WORKLOAD, path="/models/tiny-llama", **kinds
):
    """`keep` of the points are there, from the start, as in a sweep that was interrupted; `kinds` go to `point`."""
    listed = {**orders(depth), "joint": ("joint", "by importance", [*range(depth)])}
    series, masks = [], {"full": DropMask(depth)}
    for name, (what, order, layers) in listed.items():
        if names is not None and name not in names:
            continue
        steps = {n: mask_of(what, layers[:n], depth) for n in counts if n <= len(layers)}
        masks |= {mask_id(mask): mask for mask in steps.values()}
        ids = tuple(map(mask_id, steps.values()))
        series.append(Series(name=name, what=what, order=order, counts=tuple(steps), masks=ids))
    speed = kinds.get("speed", True)
    kept = [*masks.items()][: max(1, round(keep * len(masks)))]
    return recorded(
        series,
        {name: point(mask, **kinds) for name, mask in kept},
        path=path,
        scores_sha256=scores_id(scores(depth=depth)),
        divergence_tokens=4096 if kinds.get("divergence", True) else 0,
        tasks=tuple(task for task, *_ in kinds.get("tasks", TASKS)),
        workload=workload if speed else None,
    )


def healed(found, count, how="healed", name="attention"):
    """An evaluation of a series' mask whose healing brought back what its first half had lost."""
    series = next(each for each in found.series if each.name == name)
    mended, dropped = (found.points[series.steps[n]].quality for n in (count // 2, count))
    quality = mended.model_copy(update={"mask": dropped.mask})
    return Evaluation(quality=quality, healed=how, provenance=provenance(path=f"/models/healed-{count}"))
