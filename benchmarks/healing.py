"""What healing regains in real models: by data and its amount, by method, and by how much is gone.

    apt-get install debian-handbook
    python benchmarks/healing.py [--models smollm2,qwen2.5-coder-1.5b] [--counts 8] [--only NAME]...

The masks are those of `real_quality.py`, attention by importance, and so is what is measured of the ways to heal that
are evaluated: perplexity on prose, next tokens on the model's own answers to prompts that it was not healed on, tasks.
All others are judged by KL and agreement on the answers that `llmdrop answers` holds out. Interrupted, the same command
goes on. Healed checkpoints and answers stay in --directory, figures in benchmarks/results/real/MODEL/healed and
healing.json, the table in healing.md.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.healing_subject import Subject, run
from benchmarks.healing_ways import DROPPED, WAYS, Way
from benchmarks.options import ending, models, numbers
from benchmarks.real_quality import CONTEXT, PRECISION, measures, prose
from benchmarks.record import RESULTS, add_out, finish
from benchmarks.table import rows
from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import HEAL_FILE, read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.evaluation.records import Evaluation, Quality
from llmdrop_vllm.healing import ridge
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.records import Healing
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint


@contextmanager
def lambdas(values: tuple[float, ...] | None) -> Iterator[None]:
    """Within this context, only these are tried."""
    before = ridge.RIDGES
    ridge.RIDGES = values or before
    try:
        yield
    finally:
        ridge.RIDGES = before


def heal(subject: Subject, mask: DropMask, way: Way, out: Path, *, after: Path | None = None) -> Healing:
    """Into a checkpoint, which is made once; `after` is one that was healed before."""
    if out.exists():
        return read_record(Healing, out / HEAL_FILE)
    checkpoint = subject.checkpoint if after is None else Checkpoint.open(after)
    student, teacher = checkpoint.under(mask), subject.checkpoint.under(subject.checkpoint.mask)
    data = subject.learnt_from(way.data, way.tokens)
    scratch = out.with_name(f".{out.name}.scratch")
    with (
        lambdas(way.ridges),
        healed(
            student, teacher, data, way.options, train=way.train, dtype=way.dtype, scratch=scratch, progress=True
        ) as found,
    ):
        plan = plan_surgery(checkpoint, mask).healed(found.tensors)
        write_checkpoint(plan, out, records={HEAL_FILE: found.record})
        return found.record


def evaluated(subject: Subject, out: Path, name: str, mask: Path | None = None) -> Evaluation:
    """With the options of the sweep, kept beside it; under a mask where it is not the checkpoint's own."""
    path = subject.results / "healed" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = prose(subject.directory / "prose.txt")
        asked = ("--text", str(text), "--context", str(CONTEXT), *PRECISION, *measures(subject.name))
        asked += () if mask is None else ("--mask", str(mask))
        run(["evaluate", str(out), "--full", str(subject.checkpoint.directory), "--out", str(path), *asked])
        path.with_suffix(".lm-eval.json").unlink()  # each row of the tasks
    return read_record(Evaluation, path)


def measure(subject: Subject, count: int, way: Way) -> dict[str, Any]:
    """A way's line."""
    mask, name = subject.mask(count, way.chosen), _directory(count, way.name)
    told: dict[str, Any] = {"model": subject.name, "n": count, "way": way.name, "attention": list(mask.attention)}
    if not way.heals:
        told["judged"] = subject.judged(subject.checkpoint, mask)
        if way.evaluated:  # a search's, which alone has a file of its mask
            file = subject.searched(count)
            return told | figures(evaluated(subject, subject.checkpoint.directory, name, file).quality)
        return told if way.chosen else told | figures(subject.point(count).quality)
    out = subject.directory / name
    begin = None if out.exists() else time.monotonic()
    after = None if way.after is None else subject.directory / _directory(count, way.after)
    record = heal(subject, mask, way, out, after=after)
    seconds = None if begin is None else round(time.monotonic() - begin)
    told |= {
        "learnt_from": list(way.data),
        "tokens": record.tokens,
        "seconds": seconds,
        "judged": subject.judged(Checkpoint.open(out), mask),
    }
    if record.training is not None:
        told["training"] = record.training.model_dump(mode="json", exclude={"tensors", "history"})
    return told | (figures(evaluated(subject, out, name).quality) if way.evaluated else {})


def _directory(count: int, way: str) -> str:
    return f"{count} {way}".replace(",", "").replace(" ", "-")


def figures(quality: Quality) -> dict[str, Any]:
    """What the table tells of it."""
    apart = quality.divergence
    return {
        "prose_perplexity": round(quality.perplexity.value, 2),
        "own_kl": None if apart is None else round(apart.kl.value, 4),
        **{task.task.removeprefix("llmdrop_"): task.value for task in quality.tasks},
    }


def table(lines: list[dict[str, Any]]) -> str:
    """For people."""
    head = ("model", "n", "way", "tokens", "s", "KL, held-out answers", "same next token", "regained")
    head += ("KL, functions", "KL, asked functions", "perplexity, prose", "reasoning", "HumanEval")
    base = {(each["model"], each["n"]): each for each in lines if each["way"] == DROPPED}

    def row(each: dict[str, Any]) -> tuple[object, ...]:
        judged, before = each["judged"], base[each["model"], each["n"]]["judged"]
        own = judged["answers"]
        regained = "" if each["way"] == DROPPED else f"{1 - own['kl'] / before['answers']['kl']:.0%}"
        others = (judged[kind]["kl"] if kind in judged else "" for kind in ("functions", "asked functions"))
        tasks = (f"{each[task]:.1%}" if task in each else "" for task in ("reasoning", "humaneval"))
        cells = (each["model"], each["n"], each["way"], each.get("tokens", ""), each.get("seconds") or "")
        return (
            *cells,
            own["kl"],
            f"{own['agreement']:.1%}",
            regained,
            *others,
            each.get("prose_perplexity", ""),
            *tasks,
        )

    return f"# What healing regains\n\n{rows(head, map(row, lines))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(WAYS), metavar="A,B")
    parser.add_argument("--counts", type=numbers, metavar="N,N", help="how many attentions are gone; default all")
    parser.add_argument("--only", action="append", metavar="NAME", help="a way to heal (repeatable); default all")
    parser.add_argument(
        "--directory", type=Path, default=Path("healing"), metavar="DIR", help="of answers and checkpoints"
    )
    add_out(parser)
    args = parser.parse_args()
    with ending("healing"):
        names = models(args.models, WAYS)
        out = args.out or RESULTS / "healing.json"
        lines = json.loads(out.read_text())["points"] if out.exists() else []
        for name in names:
            subject = Subject(name, args.directory / name, RESULTS / "real" / name)
            subject.directory.mkdir(parents=True, exist_ok=True)
            for count, way in [(count, way) for count, ways in WAYS[name].items() for way in ways]:
                # What is only dropped is what the others stand against.
                wanted = args.only is None or way.name in (DROPPED, *args.only)
                wanted = wanted and (args.counts is None or count in args.counts)
                known = any((each["model"], each["n"], each["way"]) == (name, count, way.name) for each in lines)
                if wanted and not known:
                    lines.append(measure(subject, count, way))
                    finish("healing", {"points": lines}, args.out, table=table(lines))


if __name__ == "__main__":
    main()
