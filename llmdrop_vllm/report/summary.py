"""How many sublayers may go: the few sentences at the top of the page, computed from the records."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from llmdrop_vllm.evaluation.records import Estimate, Perplexity, Point, Sweep
from llmdrop_vllm.report.findings import Curve, Findings
from llmdrop_vllm.report.measures import DASH, PERPLEXITY, TASK_MEASURES, Measure, speedup_text
from llmdrop_vllm.selection.candidates import NOUNS

# What may be lost, and how that is said: perplexity grows, an average of tasks falls.
PERPLEXITY_LIMIT, TASK_LIMIT = (5.0, "% higher"), (1.0, " point lower")


@dataclass(frozen=True)
class Verdict:
    """By one measure: the largest number of sublayers whose loss stays within the limit.

    `then` says what is left with these gone, `beyond` what with the next measured one gone as well. `blind` says why
    the measure cannot judge, where it cannot.
    """

    measure: Measure
    limit: str
    full: Estimate
    n: int
    then: str
    beyond: str
    blind: str | None


def largest_within(losses: Iterable[tuple[int, float]], limit: float) -> int:
    """The largest number up to which every loss is at most `limit`: one that is good by luck after a bad one is not."""
    return max((n for n, _ in takewhile(lambda each: each[1] <= limit, sorted(losses))), default=0)


def same_within_errors(one: Estimate, other: Estimate) -> bool:
    """Whether two values differ by no more than the standard error of their difference, were they independent."""
    if one.stderr is None or other.stderr is None:
        return False
    return abs(one.value - other.value) <= math.hypot(one.stderr, other.stderr)


def loss(measure: Measure, full: Estimate, found: Estimate) -> float:
    """Percent more perplexity, or points of a task average lost; negative for a gain."""
    if measure is PERPLEXITY:
        return 100 * (found.value / full.value - 1)
    return full.value - found.value


def blind(measure: Measure, full: Point) -> str | None:
    """Why no loss could show: the full model does no better than guessing, within two standard errors."""
    estimate, chance = measure.of(full), measure.chance(full)
    if measure is PERPLEXITY or estimate is None:
        return None
    score = f"{measure.text(estimate)} in {measure.name}"
    if estimate.value <= 0:
        return f"the full model scores {score}, so no loss can show there"
    if chance is not None and estimate.value - chance <= 2 * (estimate.stderr or 0):
        return f"the full model's {score} is not clearly above guessing ({chance:.1f}), so a loss can hardly show there"
    return None


def main_curve(findings: Findings) -> Curve | None:
    """Attention by importance, or what comes nearest to it."""
    ranked = [*findings.by_importance, *findings.curves]
    return next((curve for curve in ranked if curve.series.what == "attention"), ranked[0] if ranked else None)


def verdicts(sweep: Sweep, curve: Curve) -> list[Verdict]:
    """One by each measure that the full model has."""
    found = []
    for measure in (PERPLEXITY, *TASK_MEASURES):
        full = measure.of(sweep.full)
        if full is None:
            continue
        limit, unit = PERPLEXITY_LIMIT if measure is PERPLEXITY else TASK_LIMIT
        values = {n: value for n, point in curve.points if (value := measure.of(point))}
        losses = {n: loss(measure, full, value) for n, value in values.items()}
        n = largest_within(losses.items(), limit)
        after = min((each for each in values if each > n), default=None)
        then = described(measure, full, values[n]) if n else DASH
        beyond = "not measured" if after is None else described(measure, full, values[after])
        found.append(Verdict(measure, f"at most {limit:g}{unit}", full, n, then, beyond, blind(measure, sweep.full)))
    return found


def change_of_score(full: Estimate, found: Estimate) -> str:
    """Of a task average, in points; within its standard error, none."""
    if same_within_errors(full, found):
        return "within the standard error"
    return f"{found.value - full.value:+.1f} points"


def change_of_perplexity(full: Perplexity, found: Perplexity) -> str:
    """In percent, with the standard error of the difference over the same windows."""
    ratio = found.relative_to(full)
    stderr = ratio.stderr
    if stderr is not None and abs(ratio.value - 1) <= stderr:
        return "within the standard error"
    return f"{100 * (ratio.value - 1):+.1f}{'' if stderr is None else f' ± {100 * stderr:.1f}'}%"


def described(measure: Measure, full: Estimate, found: Estimate) -> str:
    """`12.30 ± 0.30 (+3.4 ± 0.2%)`."""
    if isinstance(full, Perplexity) and isinstance(found, Perplexity):
        changed = change_of_perplexity(full, found)
    else:
        changed = change_of_score(full, found)
    return f"{measure.text(found)} ({changed})"


def agreed(found: Iterable[Verdict]) -> int:
    """What every measure that can judge allows."""
    return min(each.n for each in found if each.blind is None)


def sentences(findings: Findings) -> list[str]:
    """Plain language, most important first."""
    sweep, curve = findings.sweep, main_curve(findings)
    if curve is None:
        return ["Only the full model is measured so far; run llmdrop sweep again and it goes on."]
    found = verdicts(sweep, curve)
    total = findings.depth * (2 if curve.series.what == "joint" else 1)
    n, what = agreed(found), f"of {total} {NOUNS[curve.series.what]}"
    if n:
        head = f"{n} {what} can go ({curve.series.order}) within the limits below"
        said = [f"{head}{_gains(sweep, dict(curve.points)[n])}."]
    else:
        first = curve.points[1][0]
        said = [f"Not even {first} {what} ({curve.series.order}) can go within the limits below."]
    return [*said, *_mended(findings), *_caveats(found)]


def _mended(findings: Findings) -> Iterator[str]:
    """What may go once the rest is healed."""
    for curve in findings.mended:
        n, most = agreed(verdicts(findings.sweep, curve)), curve.points[-1][0]
        yield f"{curve.series.name}: {n} can go within the limits; measured up to {most}."


def _gains(sweep: Sweep, point: Point) -> str:
    faster = speedup_text(sweep, point)
    kept = f": the KV cache is {100 * point.kv_share:.1f}% of the full model's"
    return f"{kept}; {faster} times as fast" if faster else kept


def _caveats(found: list[Verdict]) -> list[str]:
    """What the numbers alone would let a reader believe."""
    said = [f"{each.blind[0].upper()}{each.blind[1:]}." for each in found if each.blind is not None]
    by = {each.measure.kind: each for each in found if each.blind is None}
    choice, generation = by.get("multiple choice"), by.get("generation")
    if choice and generation and generation.n < choice.n:
        said.append(f"Multiple choice alone would allow {choice.n}; generation suffers first: {generation.n}.")
    if not any(each.measure.kind == "generation" for each in found):
        said.append("No generation task was measured. It usually suffers first, so other figures may flatter a mask.")
    return said
