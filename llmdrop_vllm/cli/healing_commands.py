"""`llmdrop drop | heal`: each makes values of its arguments, calls the library and prints."""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmdrop_vllm.artifacts import EVALUATION_FILE, HEAL_FILE, MASK_FILE, SCORES_FILE, DataIdentity, Record, Scores
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint, MaskedCheckpoint
from llmdrop_vllm.cli.commands import (
    beside,
    calibration_of,
    chosen_file,
    forget,
    methods_of,
    opened,
    plan_of,
    scored_or_kept,
    selection_of,
    write_plan,
)
from llmdrop_vllm.cli.console import show_next, show_search, show_selection
from llmdrop_vllm.cli.search_commands import SearchData, check_answers, check_search_options, searched
from llmdrop_vllm.data.answers import is_answers
from llmdrop_vllm.data.calibration import EMBEDDED, load_calibration
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import InputError, MaskError, OutputError
from llmdrop_vllm.healing.parents import check_parent, check_plain
from llmdrop_vllm.healing.records import healing_of
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.space import Space
from llmdrop_vllm.selection.candidates import Candidates
from llmdrop_vllm.selection.selection import KVBudget
from llmdrop_vllm.selection.selection import select as select_mask
from llmdrop_vllm.writing.plan import SurgeryPlan, plan_surgery
from llmdrop_vllm.writing.write import check_destination

if TYPE_CHECKING:
    from llmdrop_vllm.healing.distill import TrainOptions
    from llmdrop_vllm.healing.heal import Healed
    from llmdrop_vllm.healing.run import Run

# Of text that does not say how much of it to take; a model's own answers are taken whole.
TEXT_SAMPLES, TEXT_TOKENS = 128, 512
TOKENS_PER_COLUMN = 20
MANY = 0.25  # of all layers
OWN_ANSWERS = "answers"  # of `--heal`: the full model is asked


def drop(args: Namespace) -> None:
    """`llmdrop drop`: scores and mask stay with the new checkpoint, for whoever asks what was dropped and why."""
    checkpoint = opened(args)
    measuring = _measuring(checkpoint, args)
    # What cannot be chosen or written is refused before the scores, which may take hours.
    possible = select_mask(
        Scores.unmeasured(checkpoint), *methods_of(args), protect=args.protect, mixers=args.mixers
    ).mask
    # Which layers go as a whole is not known yet.
    unnumbered = Namespace(**{**vars(args), "renumber": False})
    check_destination(plan_of(unnumbered, checkpoint, possible), args.out, overwrite=args.overwrite)
    _warn_of_many(checkpoint, possible)
    _check_can_heal(checkpoint, args)
    if args.search:
        _space(checkpoint, Scores.unmeasured(checkpoint), args)
    check_search_options(args, searches=args.search)
    text = None  # that healing learns from, in place of answers
    if args.heal not in (None, OWN_ANSWERS) and not is_answers(Path(args.heal)):
        text = healing_data(checkpoint, args.heal, args)
    answers = _answers(checkpoint, args)
    data = SearchData.of(checkpoint, answers, args) if args.search and answers is not None else None
    if answers is not None and text is args.data is args.samples is args.seq_len is None:
        args.data = str(answers)  # what healing mends shows there
    calibration = calibration_of(checkpoint, args)
    scores = scored_or_kept("scores", checkpoint, calibration, args, args.out)
    if data is None:
        chosen = selection_of(scores, args, checkpoint, calibration)
        show_selection(chosen)
        file = chosen_file(chosen, scores)
    else:
        file = searched(
            checkpoint, [_space(checkpoint, scores, args)], data, scores, args, beside(args.out, "trials.jsonl")
        )
        show_search(file)
    plan = plan_of(args, checkpoint, file.mask)
    records: dict[str, Record] = {SCORES_FILE: scores, MASK_FILE: file}
    if args.heal is None:
        write_plan(plan, args, records)
    else:
        args.samples = args.seq_len = None  # of the scores' data
        _write_healed(plan, args, records, text or healing_data(checkpoint, str(answers), args))
    forget(args.out)
    if measuring is not None:
        measuring()
    else:
        show_next(args.out, "evaluate", args.out, "--full", args.model, "--out", "evaluation.json")


def _check_can_heal(checkpoint: Checkpoint, args: Namespace) -> None:
    """Raise InputError for what does not go with --heal."""
    if args.heal is None:
        return
    if args.config_only:
        raise InputError("--heal changes weights, and --config-only links to MODEL's; give one of them")
    if args.renumber:
        raise InputError("--heal compares layers by their numbers; heal first: then llmdrop convert OUT NEW --renumber")
    check_plain(checkpoint)


def _warn_of_many(checkpoint: Checkpoint, mask: DropMask) -> None:
    """Of more attentions than models have come back from (benchmarks/results/README.md, "Healing")."""
    gone, depth = len(mask.attention), mask.num_hidden_layers
    if gone > MANY * depth and gone > len(checkpoint.mask.attention):
        print(
            f"llmdrop: warning: without {gone} of {depth} attentions few models answer well, healed or not: evaluate "
            "OUT before you serve it. For long contexts windows lose less: llmdrop windows",
            file=sys.stderr,
        )


def _measuring(checkpoint: Checkpoint, args: Namespace) -> Callable[[], None] | None:
    """`llmdrop drop --evaluate`: what measures OUT, by the defaults. Raises InputError where these cannot be had."""
    if not args.evaluate:
        return None
    from llmdrop_vllm.cli.arguments import parser
    from llmdrop_vllm.cli.evaluation_commands import evaluate, measures_of

    command = ["evaluate", str(args.out), "--full", str(checkpoint.directory), "--out", str(args.out / EVALUATION_FILE)]
    asked = parser().parse_args([*command, *(("--dtype", args.dtype) if args.dtype else ())])
    measures_of(checkpoint, asked)
    return lambda: evaluate(asked)


def _space(checkpoint: Checkpoint, scores: Scores, args: Namespace) -> Space:
    """What --search looks among."""
    names = ("blocks", "consecutive", "joint", "last", "random", "least", "iterative", "allow_padding")
    if others := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]:
        raise MaskError(f"--search chooses --attention and --mlp; {', '.join(others)} cannot be searched for")
    mask, attention, protect = checkpoint.mask, args.attention or 0, frozenset(args.protect)
    if args.kv_budget:
        if attention:
            raise MaskError("--search takes --attention or --kv-budget, which finds out how many go; both are given")
        left = KVBudget.parse(args.kv_budget).pick(Candidates(scores, mask, protect))
        attention = len(left.mask.attention) - len(mask.attention)
    return Space(mask, attention, args.mlp or 0, protect)


def _answers(checkpoint: Checkpoint, args: Namespace) -> Path | None:
    """The file of answers that healing or search takes, asked for where none is named; None where neither does."""
    if args.heal not in (None, OWN_ANSWERS) and is_answers(Path(args.heal)):
        check_answers(checkpoint, Path(args.heal))
        return Path(args.heal)
    if args.heal != OWN_ANSWERS and not args.search:
        return None
    from llmdrop_vllm.cli.evaluation_commands import ask

    path = beside(args.out, "answers.jsonl")
    ask(checkpoint, path, args)
    return path


def _write_healed(plan: SurgeryPlan, args: Namespace, records: Mapping[str, Record], data: Calibration) -> None:
    """`llmdrop drop --heal`: what remains learns from the full model's answers, or from what the argument names."""
    checkpoint = plan.masked.checkpoint
    if args.heal == OWN_ANSWERS:  # the file is gone when this has come to its end
        data = replace(data, identity=data.identity.model_copy(update={"source": "its own answers to our prompts"}))
    with healing(plan.masked, checkpoint.under(checkpoint.mask), data, args) as found:
        write_plan(plan.healed(found.tensors), args, {**records, HEAL_FILE: found.record})
    print(found.record.summary())


def heal(args: Namespace) -> None:
    """`llmdrop heal`."""
    dropped, teacher = Checkpoint.open(args.model), Checkpoint.open(args.teacher)
    check_parent(dropped, teacher)
    plan = plan_surgery(dropped, dialect=None, keep_dropped=True)
    check_destination(plan, args.out, overwrite=args.overwrite)
    if record := healing_of(dropped.directory):
        print(f"llmdrop: warning: {args.model} is {record.method} already: this goes on from there", file=sys.stderr)
    if args.data is None:
        print(
            "llmdrop: warning: text mends text; what mends answers is --data of llmdrop answers",
            file=sys.stderr,
        )
    data = healing_data(dropped, args.data or EMBEDDED, args)
    with healing(dropped.under(dropped.mask), teacher.under(teacher.mask), data, args) as found:
        write_plan(plan.healed(found.tensors), args, {HEAL_FILE: found.record})
    print(found.record.summary())


def healing_data(checkpoint: Checkpoint, source: str, args: Namespace) -> Calibration:
    """Answers as they are, or windows of text."""
    if is_answers(Path(source)):
        return load_calibration(checkpoint, source, samples=args.samples)
    samples, seq_len = args.samples or TEXT_SAMPLES, args.seq_len or TEXT_TOKENS
    if source.endswith(".json"):
        samples, seq_len = args.samples, args.seq_len
    return load_calibration(checkpoint, source, samples=samples, seq_len=seq_len, seed=args.seed)


def healing(
    student: MaskedCheckpoint, teacher: MaskedCheckpoint, data: Calibration, args: Namespace
) -> AbstractContextManager["Healed"]:
    """Heal with the arguments' options, streams beside OUT; says what it will cost before it begins."""
    from llmdrop_vllm.healing.heal import healed
    from llmdrop_vllm.healing.run import HealOptions

    train = None
    if args.train or args.train_only:
        from llmdrop_vllm.healing.distill import TrainOptions

        train = TrainOptions(
            epochs=args.epochs, learning_rate=args.learning_rate, rank=args.lora, parts=args.train_parts
        )
    if args.log_dir is not None:
        if train is None:
            raise OutputError("--log-dir is for --train, which is not given")
        import torch.utils.tensorboard  # noqa: F401  (missing, it is said before anything slow)
    return healed(
        student,
        teacher,
        data,
        HealOptions(later=args.later, closed_form=not args.train_only),
        train=train,
        log_directory=args.log_dir,
        device=args.device,
        dtype=args.dtype,
        scratch=beside(args.out, "healing"),
        progress=True,
        announce=lambda run: _announce(run, train),
    )


def _announce(run: "Run", train: "TrainOptions | None") -> None:
    """What it will take, and whether the data suffices."""
    data = run.data.identity
    if run.steps:
        _announce_closed_form(run, data)
    if train is not None:
        from llmdrop_vllm.healing.training_cost import training_cost

        cost = training_cost(run, train)
        print(
            f"training ({train.method}) on {data.tokens:,} tokens of {data.source}, {train.epochs:g} "
            f"times: about {cost.seconds / 60:,.0f} min, {cost.memory_bytes / 2**30:.1f} GiB of memory"
        )


def _announce_closed_form(run: "Run", data: DataIdentity) -> None:
    cost, tokens = run.cost, data.tokens
    minutes = cost.seconds(run.streams.device, run.streams.student.dtype) / 60
    print(
        f"healing {run.lost} lost sublayers on {tokens:,} tokens of {data.source}, a part held out: about "
        f"{minutes:,.0f} min, {cost.memory_bytes / 2**30:.1f} GiB of memory, {run.disk_bytes / 2**30:.1f} GiB on disk"
    )
    if tokens < (enough := TOKENS_PER_COLUMN * cost.columns):
        print(
            f"llmdrop: warning: {tokens:,} tokens for {cost.columns:,} columns are few, so little can be learnt; "
            f"{enough:,} would do better",
            file=sys.stderr,
        )
