"""`llmdrop drop | heal`: each makes values of its arguments, calls the library and prints."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from llmdrop_vllm.artifacts import EVALUATION_FILE, HEAL_FILE, MASK_FILE, SCORES_FILE, Record, Scores
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli.arguments import parser
from llmdrop_vllm.cli.commands import opened, plan_of, write_plan
from llmdrop_vllm.cli.console import show_next, show_search, show_selection, warn
from llmdrop_vllm.cli.evaluation_commands import ask, evaluate, measures_of
from llmdrop_vllm.cli.scoring import Scoring, beside, forget, mask_file, selected, selection_of
from llmdrop_vllm.cli.search_commands import by_answers, check_answers, check_search_options, given, searched
from llmdrop_vllm.data.answers import is_answers
from llmdrop_vllm.data.calibration import EMBEDDED, load_calibration
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import InputError, MaskError, OutputError
from llmdrop_vllm.healing.cost import Cost, closed_form_cost, training_cost
from llmdrop_vllm.healing.distill import TrainOptions
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.parents import check_parent, check_plain
from llmdrop_vllm.healing.records import healing_of
from llmdrop_vllm.healing.run import HealOptions, Run
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.space import Space
from llmdrop_vllm.selection.candidates import Candidates
from llmdrop_vllm.selection.selection import KVBudget
from llmdrop_vllm.writing.plan import SurgeryPlan, plan_surgery
from llmdrop_vllm.writing.write import check_destination

# Of text that does not say how much of it to take; a model's own answers are taken whole.
TEXT_SAMPLES, TEXT_TOKENS = 128, 512
TOKENS_PER_COLUMN = 20
MANY = 0.25  # of all layers
NOT_FOR_SEARCH = ("blocks", "consecutive", "joint", "last", "random", "least", "iterative", "allow_padding")
OWN_ANSWERS = "answers"  # of `--heal`: the full model is asked


def drop(args: Namespace) -> None:
    """`llmdrop drop`: scores and mask stay with the new checkpoint, for whoever asks what was dropped and why."""
    checkpoint = opened(args)
    measuring = _measuring(checkpoint, args)
    # What cannot be chosen or written is refused before the scores, which may take hours.
    possible = selected(Scores.unmeasured(checkpoint), args).mask
    # Which layers go as a whole is not known yet.
    unnumbered = plan_of(args, checkpoint, possible, renumber=False)
    check_destination(unnumbered, args.out, overwrite=args.overwrite)
    _warn_of_many(checkpoint, possible)
    _check_can_heal(checkpoint, args)
    if args.search:
        _space(checkpoint, Scores.unmeasured(checkpoint), args)
    check_search_options(args, searches=args.search)
    answers, text = _learnt_from(checkpoint, args)
    searching = by_answers(checkpoint, answers, args) if args.search and answers is not None else None
    if answers is not None and text is args.data is args.samples is args.seq_len is None:
        args.data = str(answers)  # what healing mends shows there
    scoring = Scoring.asked(checkpoint, args, args.out)
    scores = scoring.kept("scores")
    if searching is None:
        show_selection(chosen := selection_of(scores, args, scoring))
        file = mask_file(chosen.mask, chosen.method, scores.provenance)
    else:
        spaces = [_space(checkpoint, scores, args)]
        file = searched(*searching, spaces, scores, args, beside(args.out, "trials.jsonl"))
        show_search(file)
    plan = plan_of(args, checkpoint, file.mask)
    records: dict[str, Record] = {SCORES_FILE: scores, MASK_FILE: file}
    if args.heal is None:
        write_plan(plan, args, records)
    else:
        args.samples = args.seq_len = None  # of the scores' data
        learnt = text or healing_data(checkpoint, str(answers), args)
        if args.heal == OWN_ANSWERS:  # the file is gone when this has come to its end
            named = learnt.identity.model_copy(update={"source": "its own answers to our prompts"})
            learnt = replace(learnt, identity=named)
        _write_healed(plan, checkpoint, learnt, args, records)
    forget(args.out)
    if measuring is not None:
        evaluate(measuring)
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
        warn(
            f"without {gone} of {depth} attentions few models answer well, healed or not: evaluate OUT before you "
            "serve it. For long contexts windows lose less: llmdrop windows"
        )


def _measuring(checkpoint: Checkpoint, args: Namespace) -> Namespace | None:
    """`llmdrop drop --evaluate`: the arguments that OUT is measured by. Raises InputError where these cannot be had."""
    if not args.evaluate:
        return None
    command = ["evaluate", str(args.out), "--full", str(checkpoint.directory), "--out", str(args.out / EVALUATION_FILE)]
    asked = parser().parse_args([*command, *(("--dtype", args.dtype) if args.dtype else ())])
    measures_of(checkpoint, asked)
    return asked


def _space(checkpoint: Checkpoint, scores: Scores, args: Namespace) -> Space:
    """What --search looks among."""
    if others := given(args, *NOT_FOR_SEARCH):
        raise MaskError(f"--search chooses --attention and --mlp; {others} cannot be searched for")
    mask, attention, protect = checkpoint.mask, args.attention or 0, frozenset(args.protect)
    if args.kv_budget:
        if attention:
            raise MaskError("--search takes --attention or --kv-budget, which finds out how many go; both are given")
        left = KVBudget.parse(args.kv_budget).pick(Candidates(scores, mask, protect))
        attention = len(left.mask.attention) - len(mask.attention)
    return Space(mask, attention, args.mlp or 0, protect)


def _learnt_from(checkpoint: Checkpoint, args: Namespace) -> tuple[Path | None, Calibration | None]:
    """The file of answers that healing or search takes, asked for where none is named, None where neither does; and
    what healing learns from in place of answers.
    """
    text = None
    if args.heal not in (None, OWN_ANSWERS):
        if is_answers(named := Path(args.heal)):
            check_answers(checkpoint, named)
            return named, None
        text = healing_data(checkpoint, args.heal, args)
    if args.heal != OWN_ANSWERS and not args.search:
        return None, text
    ask(checkpoint, path := beside(args.out, "answers.jsonl"), args)
    return path, text


def heal(args: Namespace) -> None:
    """`llmdrop heal`."""
    dropped, teacher = Checkpoint.open(args.model), Checkpoint.open(args.teacher)
    check_parent(dropped, teacher)
    plan = plan_surgery(dropped, dialect=None, keep_dropped=True)
    check_destination(plan, args.out, overwrite=args.overwrite)
    if record := healing_of(dropped.directory):
        warn(f"{args.model} is {record.method} already: this goes on from there")
    if args.data is None:
        warn("text mends text; what mends answers is --data of llmdrop answers")
    _write_healed(plan, teacher, healing_data(dropped, args.data or EMBEDDED, args), args, {})


def healing_data(checkpoint: Checkpoint, source: str, args: Namespace) -> Calibration:
    """Answers as they are, or windows of text."""
    if is_answers(Path(source)):
        return load_calibration(checkpoint, source, samples=args.samples)
    samples, seq_len = args.samples or TEXT_SAMPLES, args.seq_len or TEXT_TOKENS
    if source.endswith(".json"):
        samples, seq_len = args.samples, args.seq_len
    return load_calibration(checkpoint, source, samples=samples, seq_len=seq_len, seed=args.seed)


def _write_healed(
    plan: SurgeryPlan, teacher: Checkpoint, data: Calibration, args: Namespace, records: Mapping[str, Record]
) -> None:
    """Heal with the arguments' options, streams beside OUT, and write; says what it will cost before it begins."""
    learns = (args.epochs, args.learning_rate, args.lora, args.train_parts)
    train = TrainOptions(*learns) if args.train or args.train_only else None
    if args.log_dir is not None:
        if train is None:
            raise OutputError("--log-dir is for --train, which is not given")
        import torch.utils.tensorboard  # noqa: F401  (missing, it is said before anything slow)
    options = HealOptions(later=args.later, closed_form=not args.train_only)
    how = {"device": args.device, "dtype": args.dtype, "scratch": beside(args.out, "healing"), "progress": True}
    said = {"log_directory": args.log_dir, "announce": partial(_announce, train=train)}
    whole = teacher.under(teacher.mask)
    with healed(plan.masked, whole, data, options, train=train, **how, **said) as found:
        write_plan(plan.healed(found.tensors), args, {**records, HEAL_FILE: found.record})
    print(found.record.summary())


def _announce(run: Run, train: TrainOptions | None) -> None:
    """What it will take, and whether the data suffices."""
    data = run.data.identity
    learnt = f"{data.tokens:,} tokens of {data.source}"
    if run.steps:
        cost, disk = closed_form_cost(run), f"{run.streams.disk_bytes / 2**30:.1f} GiB on disk"
        print(f"healing {run.lost} lost sublayers on {learnt}, a part held out: {_takes(cost)}, {disk}")
        if data.tokens < (enough := TOKENS_PER_COLUMN * cost.columns):
            few = f"{data.tokens:,} tokens for {cost.columns:,} columns are few"
            warn(f"{few}, so little can be learnt; {enough:,} would do better")
    if train is not None:
        takes = _takes(training_cost(run, train))
        print(f"training ({train.method}) on {learnt}, {train.epochs:g} times: {takes}")


def _takes(cost: Cost) -> str:
    return f"about {cost.seconds / 60:,.0f} min, {cost.memory_bytes / 2**30:.1f} GiB of memory"
