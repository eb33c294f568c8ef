"""A real model that is healed: its answers, masks and judges, kept in a directory."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.functions import functions
from benchmarks.healing_ways import AFTER_HEALING, BY_SEARCH, DATA, OWN_PROMPTS, SEARCHED_ON
from benchmarks.own_prompts import beginning, own_prompts
from benchmarks.real_quality import CONTEXT
from llmdrop_vllm import DropMask, InputError
from llmdrop_vllm.artifacts import Scores, read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main as llmdrop
from llmdrop_vllm.data.answers import load_answers
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.evaluation.divergence import Reference, answer_windows
from llmdrop_vllm.evaluation.records import Point, Sweep
from llmdrop_vllm.evaluation.sweep import SWEEP_FILE
from llmdrop_vllm.fetching.fetch import fetch
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.selection.selection import Ranked, select

TEXT_WINDOWS, JUDGING_TOKENS = 128, 4096
TOKENS_OF_CODE = 128
MOST = ("--minutes", "12")  # of a search


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
        if chosen == BY_SEARCH:
            return read_record(MaskFile, self.searched(count)).mask
        if chosen is not None:
            path = self.directory / f"scores {chosen}.json".replace(" ", "-")
            if not path.exists():
                command = ["score", str(self.checkpoint.directory), "--out", str(path)]
                command += ["--data", str(self.answers("answers")), "--dtype", "float32"]
                run([*command, *(["--after-healing"] if chosen == AFTER_HEALING else [])])
            return select(read_record(Scores, path), Ranked("attention", count)).mask
        return self.point(count).quality.mask

    def searched(self, count: int) -> Path:
        """The file of the mask that a search finds; what was judged for another number is not judged again."""
        found = self.directory / f"search-{count}.json"
        if not found.exists():
            trials = found.with_suffix(".trials.jsonl")
            if (before := next(iter(self.directory.glob("search-*.trials.jsonl")), None)) and not trials.exists():
                shutil.copy(before, trials)
            answers = self.answers(SEARCHED_ON[self.name])
            command = ["search", str(self.checkpoint.directory), "--answers", str(answers), *MOST]
            run([*command, "--attention", str(count), "--out", str(found), "--dtype", "bfloat16"])
        return found

    def answers(self, source: str) -> Path:
        """Those to one kind of prompts; asked for where they are not there."""
        path = self.directory / f"{source.replace(' ', '-')}.jsonl"
        if not path.exists():
            run(["answers", str(self.checkpoint.directory), str(path), "--dtype", "bfloat16", *self._asked(source)])
        return path

    def _asked(self, source: str) -> list[str]:
        """Options by which a kind of prompts is asked."""
        if source == "answers":
            return []
        asked = self.directory / f"{source.replace(' ', '-')}-prompts.jsonl"
        if source == OWN_PROMPTS:
            written = self.directory / "written.jsonl"
            begin = beginning(self.checkpoint, self.directory / "beginning.jsonl")
            run(["answers", str(self.checkpoint.directory), str(written), "--dtype", "bfloat16", *begin])
            own_prompts(written, asked)
            return ["--prompts", str(asked)]
        functions(asked, in_chat=source == "asked functions")
        return ["--prompts", str(asked), "--max-tokens", str(TOKENS_OF_CODE)]

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
