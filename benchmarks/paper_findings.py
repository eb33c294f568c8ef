"""What the papers found on large models, asked again of the embedded model and of a randomly initialised twin.

    python benchmarks/paper_findings.py [--sweep DIR]

DIR holds a sweep of the embedded model (`llmdrop sweep`), measured first where it is not. The twin has the same config
and Transformers' own initialisation; it predicts nothing, so it is asked about its scores and about how far its
next-token distributions move. A finding stands as it was measured, whether it agrees or not.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, add_out, finish
from llmdrop_vllm.artifacts import Scores, read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main as llmdrop
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.evaluation.divergence import Reference, Window
from llmdrop_vllm.evaluation.records import Point, Sweep
from llmdrop_vllm.evaluation.series import make_series
from llmdrop_vllm.scoring.scoring import score

TASKS = "llmdrop_docstring,llmdrop_name"
TWIN_SERIES = ("attention", "mlp", "reverse")


def random_twin(directory: Path, seed: int = 0) -> Checkpoint:
    """The embedded model's config and tokenizer with weights as Transformers initialises them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(MODEL)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, directory)
    return Checkpoint.open(directory)


def importance(similarities: Iterable[float | None]) -> list[float]:
    """1 - similarity, of what is there."""
    return [1 - each for each in similarities if each is not None]


def depth_correlation(values: Sequence[float]) -> float:
    """Spearman's rank correlation of depth and a value per layer: -1 where every deeper layer has a smaller one."""
    ranks = np.argsort(np.argsort(values))
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


def curve(sweep: Sweep, name: str) -> dict[int, Point]:
    """Number dropped to point."""
    series = next(each for each in sweep.series if each.name == name)
    return dict(sweep.of(series))


def perplexities(sweep: Sweep, names: Iterable[str]) -> dict[str, dict[int, float]]:
    """By series and number dropped."""
    return {
        name: {n: round(point.quality.perplexity.value, 3) for n, point in curve(sweep, name).items()} for name in names
    }


def by_redundancy(trained: Scores, twin: Scores) -> list[dict[str, Any]]:
    """The findings about importance alone."""
    found = []
    for name, scores in (("embedded", trained), ("random twin", twin)):
        attention, mlp = importance(scores.similarity.attention), importance(scores.similarity.mlp)
        lower = sum(a < m for a, m in zip(attention, mlp, strict=True))
        found.append(
            {
                "finding": f"attention is more redundant than MLP ({name})",
                "agrees": fmean(attention) < fmean(mlp),
                "mean_importance": {"attention": fmean(attention), "mlp": fmean(mlp)},
                "layers_where_attention_is_less_important": f"{lower} of {len(mlp)}",
            }
        )
        correlations = {"attention": depth_correlation(attention), "mlp": depth_correlation(mlp)}
        found.append(
            {
                "finding": f"deeper layers are more redundant ({name})",
                "agrees": all(each < 0 for each in correlations.values()),
                "rank_correlation_of_importance_with_depth": correlations,
            }
        )
    return found


def by_quality(sweep: Sweep) -> list[dict[str, Any]]:
    """The findings about what dropping costs; perplexities by number dropped."""
    full = sweep.full.quality.perplexity.value
    kinds = perplexities(sweep, ("attention", "mlp", "joint"))
    orders = perplexities(sweep, [each.name for each in sweep.series if each.what == "attention"])
    tasks = {
        name: {n: point.quality.task_average() for n, point in curve(sweep, name).items()}
        for name in ("attention", "mlp")
    }
    counts = [n for n in kinds["attention"] if n and all(n in kinds[each] for each in kinds)]
    gaps = _generation_gaps(sweep)
    last = [n for n in orders["last"] if n and n in orders["last-but-one"]]
    return [
        {
            "finding": "dropping MLPs costs more than dropping as much attention",
            "agrees": all(kinds["mlp"][n] > kinds["attention"][n] for n in counts),
            "perplexity": {"full": full, **{each: kinds[each] for each in ("attention", "mlp")}},
        },
        {
            "finding": "dropping MLPs costs more than dropping as much attention, by the mean score of the tasks",
            "agrees": all(tasks["mlp"][n] < tasks["attention"][n] for n in counts),
            "task_average": tasks,
        },
        {
            "finding": "joint drop is no worse than attention or MLP alone at equal count",
            "agrees": all(kinds["joint"][n] <= min(kinds["attention"][n], kinds["mlp"][n]) for n in counts),
            "perplexity": kinds,
        },
        {
            "finding": "dropping the most important attention first is the worst order",
            "agrees": all(
                orders["reverse"][n] >= max(orders[name].get(n, 0.0) for name in orders) for n in orders["reverse"] if n
            ),
            "perplexity": orders,
        },
        {
            "finding": "the last k attention sublayers: sparing the very last layer is better",
            "agrees": all(orders["last-but-one"][n] < orders["last"][n] for n in last),
            "perplexity": {each: orders[each] for each in ("last", "last-but-one", "attention")},
        },
        {
            "finding": "generation breaks before multiple choice",
            "agrees": fmean(gaps.values()) > 0,
            "extra_share_of_generation_lost": gaps,
        },
    ]


def _generation_gaps(sweep: Sweep) -> dict[int, float]:
    """By attention dropped: the share of the generation score that is gone, less the share of multiple choice above
    chance that is gone.
    """

    def above_chance(point: Point) -> float:
        return fmean(task.value - (task.chance or 0) for task in point.quality.tasks if task.kind == "multiple choice")

    full = sweep.full.quality.task_average("generation") or 1
    return {
        n: above_chance(point) / above_chance(sweep.full) - (point.quality.task_average("generation") or 0) / full
        for n, point in curve(sweep, "attention").items()
        if n
    }


def twin_divergence(twin: Checkpoint, scores: Scores, tokens: int = 2048) -> dict[str, Any]:
    """How far the twin's next-token distributions move as sublayers go: KL in nats, by series and number dropped."""
    text = load_calibration(twin, "held-out", samples=4, seq_len=tokens // 4)
    reference = Reference(twin, twin.mask, map(Window, text.sequences), dtype="float32")
    series, masks = make_series(scores, TWIN_SERIES)
    return {
        each.name: {n: reference.under(masks[mask]).kl.value for n, mask in zip(each.counts, each.masks, strict=True)}
        for each in series
    }


def measured_sweep(directory: Path) -> tuple[Sweep, Scores]:
    """The embedded model's, measured as far as it is not there."""
    if llmdrop(["sweep", str(MODEL), "--results", str(directory), "--tasks", TASKS]):
        raise SystemExit(1)
    return read_record(Sweep, directory / "sweep.json"), read_record(Scores, directory / "scores.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, default=RESULTS / "embedded", help="a directory of `llmdrop sweep`")
    add_out(parser)
    args = parser.parse_args()
    sweep, trained = measured_sweep(args.sweep)
    with tempfile.TemporaryDirectory() as directory:
        twin = random_twin(Path(directory))
        twin_scores = score(twin, load_calibration(twin, samples=64), dtype="float32")
        divergence = twin_divergence(twin, twin_scores)
    findings = [*by_redundancy(trained, twin_scores), *by_quality(sweep)]
    for each in findings:
        print(f"{'agrees   ' if each['agrees'] else 'DISAGREES'}  {each['finding']}")
    result = {"benchmark": "paper_findings", "findings": findings, "random_twin_kl": divergence}
    finish("paper_findings", result, args.out)


if __name__ == "__main__":
    main()
