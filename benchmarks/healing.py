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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.functions import functions
from benchmarks.healing_ways import AFTER_HEALING, DATA, DROPPED, WAYS, Way
from benchmarks.options import ending, models, numbers
from benchmarks.real_quality import CONTEXT, PRECISION, measures, prose
from benchmarks.record import RESULTS, add_out, finish
from benchmarks.table import rows
from llmdrop_vllm import DropMask, InputError
from llmdrop_vllm.artifacts import Scores, read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main as llmdrop
from llmdrop_vllm.data.answers import load_answers
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.evaluation.divergence import Reference, answer_windows
from llmdrop_vllm.evaluation.records import Evaluation, Point, Quality, Sweep
from llmdrop_vllm.evaluation.sweep import SWEEP_FILE
from llmdrop_vllm.fetching.fetch import fetch
from llmdrop_vllm.healing import ridge
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.records import HEAL_FILE, Healing
from llmdrop_vllm.selection.selection import Ranked, select
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint

TEXT_WINDOWS, JUDGING_TOKENS = 128, 4096
TOKENS_OF_CODE = 128


@dataclass(frozen=True)
class Subject:
    """A real model, its own answers and where everything of it is kept."""

    name: str
    directory: Path
    results: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(fetch(self.name))

    @property
    def dtype(self) -> str:
        """What judges: exact where that is quick."""
        return "float32" if self.name == "smollm2" else "bfloat16"

    def point(self, count: int) -> Point:
        """Of the sweep: so many attentions gone, and nothing healed."""
        found = read_record(Sweep, self.results / SWEEP_FILE)
        series = next(each for each in found.series if each.name == "attention")
        return found.points[series.steps[count]]

    def mask(self, count: int, chosen: str | None) -> DropMask:
        """That of the sweep, or one that is chosen on answers."""
        if chosen is not None:
            path = self.directory / f"scores {chosen}.json".replace(" ", "-")
            if not path.exists():
                command = ["score", str(self.checkpoint.directory), "--out", str(path)]
                command += ["--data", str(self.answers("answers")), "--dtype", "float32"]
                run([*command, *(["--after-healing"] if chosen == AFTER_HEALING else [])])
            return select(read_record(Scores, path), Ranked("attention", count)).mask
        return self.point(count).quality.mask

    def answers(self, source: str) -> Path:
        """Those to one kind of prompts; asked for where they are not there."""
        path = self.directory / f"{source.replace(' ', '-')}.jsonl"
        if not path.exists():
            command = ["answers", str(self.checkpoint.directory), str(path), "--dtype", "bfloat16"]
            if source != "answers":
                asked = self.directory / f"{path.stem}-prompts.jsonl"
                functions(asked, in_chat=source == "asked functions")
                command += ["--prompts", str(asked), "--max-tokens", str(TOKENS_OF_CODE)]
            run(command)
        return path

    def learnt_from(self, sources: tuple[str, ...], tokens: int | None) -> Calibration:
        """Answers and text together, longest first."""
        parts = [
            load_calibration(self.checkpoint, samples=TEXT_WINDOWS, seq_len=CONTEXT)
            if source == "text"
            else load_answers(self.checkpoint, self.answers(source), held_out=False, tokens=tokens)
            for source in sources
        ]
        if len(parts) == 1:
            return parts[0]
        pairs = [
            pair
            for each in parts
            for pair in zip(each.sequences, each.starts or [0] * len(each.sequences), strict=True)
        ]
        pairs.sort(key=lambda pair: -len(pair[0]))
        identity = parts[0].identity.model_copy(
            update={
                "source": " and ".join(sources),
                "sequences": len(pairs),
                "tokens": sum(each.identity.tokens for each in parts),
                "sha256": "-".join(each.identity.sha256[:16] for each in parts),
            }
        )
        return Calibration(tuple(ids for ids, _ in pairs), identity, starts=tuple(start for _, start in pairs))

    @cached_property
    def references(self) -> dict[str, Reference]:
        """What judges: the full model on held-out answers of each kind."""
        found = {}
        for source in DATA[self.name]:
            held_out = load_answers(self.checkpoint, self.answers(source), held_out=True, tokens=JUDGING_TOKENS)
            windows = answer_windows(held_out)
            found[source] = Reference(self.checkpoint, self.checkpoint.mask, windows, dtype=self.dtype)
        return found

    def judged(self, checkpoint: Checkpoint, mask: DropMask) -> dict[str, Any]:
        """KL and agreement of a checkpoint under a mask, by what it is judged on."""

        told = {}
        for source, reference in self.references.items():
            own = checkpoint is self.checkpoint
            found = reference.under(mask) if own else reference.of(checkpoint, mask, dtype=self.dtype)
            told[source] = {
                "kl": round(found.kl.value, 4),
                "stderr": None if found.kl.stderr is None else round(found.kl.stderr, 4),
                "agreement": round(found.agreement.value, 4),
                "tokens": found.tokens,
            }
        return told


def run(command: list[str]) -> None:
    """A command of ours, in this process."""
    if llmdrop(command):
        raise InputError(f"llmdrop {' '.join(command)} did not come to its end")


@contextmanager
def lambdas(values: tuple[float, ...] | None) -> Iterator[None]:
    """Within this context, only these are tried."""
    before = ridge.RIDGES
    ridge.RIDGES = values or before
    try:
        yield
    finally:
        ridge.RIDGES = before


def heal(subject: Subject, mask: DropMask, way: Way, out: Path) -> Healing:
    """Into a checkpoint, which is made once."""
    if out.exists():
        return read_record(Healing, out / HEAL_FILE)
    checkpoint = subject.checkpoint
    student, teacher = checkpoint.under(mask), checkpoint.under(checkpoint.mask)
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


def evaluated(subject: Subject, out: Path, name: str) -> Evaluation:
    """With the options of the sweep, kept beside it."""
    path = subject.results / "healed" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = prose(subject.directory / "prose.txt")
        asked = ("--text", str(text), "--context", str(CONTEXT), *PRECISION, *measures(subject.name))
        run(["evaluate", str(out), "--full", str(subject.checkpoint.directory), "--out", str(path), *asked])
        path.with_suffix(".lm-eval.json").unlink()  # each row of the tasks
    return read_record(Evaluation, path)


def measure(subject: Subject, count: int, way: Way) -> dict[str, Any]:
    """A way's line."""
    mask, name = subject.mask(count, way.chosen), f"{count} {way.name}".replace(",", "").replace(" ", "-")
    told: dict[str, Any] = {"model": subject.name, "n": count, "way": way.name, "attention": list(mask.attention)}
    if not way.heals:
        told["judged"] = subject.judged(subject.checkpoint, mask)
        return told if way.chosen else told | figures(subject.point(count).quality)
    out = subject.directory / name
    begin = None if out.exists() else time.monotonic()
    record = heal(subject, mask, way, out)
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
