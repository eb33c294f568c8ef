"""`llmdrop search | windows`: each makes values of its arguments, calls the library and prints."""

from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

from llmdrop_vllm.artifacts import Scores, read_record, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli.commands import check_new
from llmdrop_vllm.cli.console import show_finals, show_next, show_search, warn
from llmdrop_vllm.cli.engines import harness_of, refuse_skipped, settings_of
from llmdrop_vllm.cli.scoring import Scoring, checked, forget, other_weights
from llmdrop_vllm.data.answers import is_answers, load_answers, read_answers
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import DataError, InputError, MaskError
from llmdrop_vllm.evaluation.deciding import check_finals, decide
from llmdrop_vllm.evaluation.goals import Sizes, Wanted, mixes
from llmdrop_vllm.evaluation.inspection import request_context
from llmdrop_vllm.evaluation.masked_engines import Plan
from llmdrop_vllm.healing.parents import check_plain
from llmdrop_vllm.healing.task import held_out_sequences
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.scoring.scoring import precision
from llmdrop_vllm.search.judge import Judging
from llmdrop_vllm.search.search import SearchOptions, plan_search
from llmdrop_vllm.search.search import search as search_masks
from llmdrop_vllm.search.space import Space
from llmdrop_vllm.search.states import StateSpace, takers
from llmdrop_vllm.search.trials import Searched
from llmdrop_vllm.search.windows import WindowsPlan, choose_windows, long_texts
from llmdrop_vllm.selection.candidates import Candidates

# More prompts tell masks apart better than longer answers do.
TOKENS_OF_EACH = 64
TOKENS, HELD_OUT_TOKENS, SCORED_TOKENS = 2048, 4096, 32_768
FINALISTS = 8
ENOUGH_OUT_OF_SIGHT = 1000  # tokens, to compare windows by
NOT_FOR_WINDOWS = ("attention", "mlp", "tokens", "held_out_tokens", "beam", "heal_aware", "tasks")


def search(args: Namespace) -> None:
    """`llmdrop search`."""
    check_new(args.out, args.overwrite)
    check_search_options(args, searches=True)
    _check_options(args)
    checkpoint = Checkpoint.open(args.model)
    goal = wanted_of(checkpoint, args)
    # Refused before the scores: how many go depends on these only where layers differ in size.
    _spaces(checkpoint, Scores.unmeasured(checkpoint), goal, args)
    if args.window:
        judging, to_heal = judging_by(checkpoint, long_texts(checkpoint, str(args.answers), args.window), args), None
    else:
        judging, to_heal = by_answers(checkpoint, args.answers, args)
    trials, finals = (args.out.with_suffix(f".{kind}.jsonl") for kind in ("trials", "finals"))
    harness = harness_of(args)
    refuse_skipped(harness)  # without them something else would decide
    plan = Plan(checkpoint, settings_of(checkpoint, args), None, quality=True, harness=True)
    if harness.tasks:
        check_finals(plan, harness, finals)
    scores = _scores(judging, args)
    spaces = _spaces(checkpoint, scores, goal, args)
    found = searched(judging, to_heal, spaces, scores, args, trials)
    show_search(found, "long texts" if args.window else "answers")
    if harness.tasks:
        masks = _finalists(found, Searched.read(trials), spaces, args.finalists or FINALISTS)
        found = decide(found, masks, plan, harness, finals, progress=True)
        show_finals(found)
    write_record(found, args.out)
    forget(args.out)
    show_next(args.out, "apply", args.model, "OUT", "--mask", args.out)


def wanted_of(checkpoint: Checkpoint, args: Namespace) -> Wanted | None:
    """What the arguments say that a mask is wanted for; None where they do not. With windows a share of the KV cache is
    that of a request; a speedup counts bytes, which bound decoding.

    Raises InputError for more than one goal, and for more tokens than the model takes.
    """
    share, requests, speedup, batch = args.kv_budget, args.requests, args.decode_speedup, args.batch
    if sum(each is not None for each in (share, requests, speedup)) > 1:
        raise InputError("--kv-budget, --requests and --decode-speedup exclude each other")
    sizes = Sizes(checkpoint, request_context(checkpoint, args.context))
    of_context = f"of {sizes.context:,} tokens"
    if share is not None:
        stored, of = sizes.kv_share, "the KV cache"
        if args.window:
            stored, of = sizes.request_share, f"the KV cache of a request {of_context}"
        return Wanted(stored, share, f"{of} is {{:.0%}} of the full one", more_is_better=False)
    if requests is not None:
        fit = f"{{:.0f}} requests {of_context} fit in {args.memory / 2**30:g} GiB"
        return Wanted(lambda mask: sizes.requests(mask, args.memory), requests, fit)
    if speedup is not None:
        full = sizes.step_bytes(checkpoint.mask, batch)
        fast = f"decoding {batch} requests {of_context} is {{:.2f}} times as fast, by the bytes it reads"
        return Wanted(lambda mask: full / sizes.step_bytes(mask, batch), speedup, fast)
    return None


def windows(args: Namespace) -> None:
    """`llmdrop windows`."""
    check_new(args.out, args.overwrite)
    checkpoint = Checkpoint.open(args.model)
    goal = wanted_of(checkpoint, args)
    if (args.count is None) == (goal is None):
        raise InputError("give --count, or one of --kv-budget, --requests and --decode-speedup")
    own = len(checkpoint.mask.windows)
    texts = long_texts(checkpoint, args.data, args.window, args.samples, args.seq_len, args.seed)
    judging = judging_by(checkpoint, texts, args)
    plan = WindowsPlan(judging, args.window, goal or (lambda mask: len(mask.windows) - own >= args.count))
    _announce_windows(plan)
    found = choose_windows(plan, args.out.with_suffix(".trials.jsonl"), progress=True)
    show_search(found, "long texts")
    write_record(found, args.out)
    show_next(args.out, "serve", args.model, "--mask", args.out)


def _announce_windows(plan: WindowsPlan) -> None:
    """How much is judged, and whether that is enough to tell layers apart."""
    answers, held_out = plan.judging.answers, plan.judging.held_out
    texts, judging = sum(answers.predicted), sum(held_out.predicted)
    print(
        f"{len(plan.layers) + 2} masks, nearly all on {texts:,} tokens of {len(answers.sequences)} texts that are "
        "out of a window's sight; less with --samples, --seq-len"
    )
    if judging < ENOUGH_OUT_OF_SIGHT:
        few = f"{judging:,} tokens of {len(held_out.sequences)} texts are few to compare by"
        warn(f"{few}; {ENOUGH_OUT_OF_SIGHT:,} would do better")


def search_instead(args: Namespace) -> None:
    """`llmdrop recommend --answers`: no sweep is asked, and a search meets the goal."""
    from llmdrop_vllm.cli.arguments import parser

    if args.max_loss is not None:
        raise MaskError("--max-loss is of what a sweep measures; with --answers give --kv-budget or --speedup")
    if args.kv_budget is not None and args.speedup is not None:
        raise MaskError("a search meets one goal; give --kv-budget or --speedup, or no --answers")
    if args.results is not None:
        raise InputError("--results is where a sweep lies, and --answers asks for none; give one of them")
    if args.out is None:
        raise InputError("--answers needs --out, for the mask that is searched for")
    command = ["search", args.model, "--answers", str(args.answers), "--out", str(args.out)]
    command += ["--overwrite"] if args.overwrite else []
    command += [] if args.kv_budget is None else ["--kv-budget", f"{100 * args.kv_budget:.12g}%"]
    command += [] if args.speedup is None else ["--decode-speedup", f"{args.speedup:.12g}"]
    search(parser().parse_args(command))


def given(args: Namespace, *names: str) -> str:
    """Those of some options that the arguments have, as they are written; empty where there is none."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(args, name))


def check_search_options(args: Namespace, *, searches: bool) -> None:
    """Raise InputError for options of a search where none is, or that exclude each other."""
    if not searches and (idle := given(args, "masks", "minutes", "tokens", "held_out_tokens", "beam", "heal_aware")):
        raise InputError(f"{idle} belong to --search, which is not given")
    if args.beam is not None and args.heal_aware is not None:
        raise InputError("--beam and --heal-aware exclude each other: one mask is healed at each step")


def judging_by(checkpoint: Checkpoint, texts: tuple[Calibration, Calibration], args: Namespace) -> Judging:
    """By texts to choose by and those that decide, computed as the arguments say."""
    return Judging(checkpoint, *texts, *precision(checkpoint, args.device, args.dtype))


def by_answers(checkpoint: Checkpoint, path: Path, args: Namespace) -> tuple[Judging, Calibration | None]:
    """By a file's answers; and those that healing on the way learns from.

    Raises DataError unless the file holds enough answers of these weights, CheckpointError where they are to be healed
    on the way and are quantized.
    """
    check_answers(checkpoint, path)
    load = partial(load_answers, checkpoint, path, tokens_each=TOKENS_OF_EACH)
    learnt = load(held_out=False, tokens=args.tokens or TOKENS)
    held_out = load(held_out=True, tokens=args.held_out_tokens or HELD_OUT_TOKENS)
    to_heal = None
    if args.heal_aware is not None:
        check_plain(checkpoint)
        to_heal = load_answers(checkpoint, path, held_out=False, tokens=args.heal_aware)
        held_out_sequences(to_heal)
    return judging_by(checkpoint, (learnt, held_out), args), to_heal


def searched(
    judging: Judging, to_heal: Calibration | None, spaces: list[Space], scores: Scores, args: Namespace, trials: Path
) -> MaskFile:
    """What the arguments' search finds; its trials are gone on with."""
    asked = {"most": args.masks, "seconds": args.minutes and 60 * args.minutes, "beam": args.beam, "seed": args.seed}
    options = SearchOptions(**{name: value for name, value in asked.items() if value is not None})
    return search_masks(plan_search(scores, judging, spaces, options, to_heal), trials, progress=True)


def _check_options(args: Namespace) -> None:
    """Raise InputError for options that a search for windows has no use for, for those of tasks where there are none,
    and for tasks where an engine could answer none.
    """
    if args.window and (others := given(args, *NOT_FOR_WINDOWS)):
        raise InputError(f"{others} and --window exclude each other")
    if args.window and args.kv_budget is None and args.requests is None and args.decode_speedup is None:
        raise InputError("--window wants one of --kv-budget, --requests and --decode-speedup")
    if args.tasks and args.heal_aware is not None:
        raise InputError("--tasks and --heal-aware exclude each other: in the engine nothing is healed")
    if not args.tasks and (idle := given(args, "limit", "finalists", "run_generated_code")):
        raise InputError(f"{idle} belong to --tasks, which is not given")


def _spaces(checkpoint: Checkpoint, scores: Scores, goal: Wanted | None, args: Namespace) -> list[Space]:
    """What the arguments ask to look among: so many attentions and MLPs, or as many as a goal takes by importance;
    attentions of --fixed go in any case, and with --window some see less.
    """
    own, protect, mlps, stages = checkpoint.mask, frozenset(args.protect), args.mlp, args.pipeline_parallel_size
    if both := sorted(protect.intersection(args.fixed)):
        raise MaskError(f"layers {both} are in --protect and in --fixed")
    start = replace(own, attention=(*own.attention, *args.fixed))
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}; expected 0 or more")
    if goal is None:
        if args.attention < len(args.fixed):
            raise MaskError(f"--attention is {args.attention}, and {len(args.fixed)} go in any case (--fixed)")
        return [Space(start, args.attention - len(args.fixed), mlps or 0, protect, stages)]
    if args.attention:
        raise InputError("--attention is how many go, which --kv-budget, --requests and --decode-speedup find out")
    candidates = Candidates(scores, start, protect)
    if goal(candidates.mask):
        raise MaskError(f"what is asked for is met by {candidates.mask.summary()}; nothing is left to search")
    masks = mixes(candidates, goal, stages, 0 if args.window else mlps)
    if args.window:
        gone = len(masks[0].attention) - len(start.attention)
        seeing = {"window": args.window, "takers": frozenset(takers(checkpoint, args.window))}
        stored = Sizes(checkpoint, request_context(checkpoint, args.context)).request_bytes
        return [StateSpace(start, gone, protect=protect, stages=stages, meets=goal, stored=stored, **seeing)]
    counts = ((len(mask.attention) - len(start.attention), len(mask.mlp) - len(start.mlp)) for mask in masks)
    return [Space(start, *each, protect, stages, meets=goal) for each in counts]


def _finalists(found: MaskFile, judged: Searched, spaces: list[Space], count: int) -> list[DropMask]:
    """The search's own, which wins where others are only as good, and the best by KL beside it that were asked for."""
    ranked = [mask for mask, _ in sorted(judged.masks, key=lambda each: each[1])]
    asked_for = (mask for mask in ranked if any(space.holds(mask) for space in spaces))
    return [*{mask.dropped: mask for mask in (found.mask, *asked_for)}.values()][:count]


def _scores(judging: Judging, args: Namespace) -> Scores:
    """As given, or on the answers or texts that masks are chosen by."""
    checkpoint, learnt = judging.checkpoint, judging.answers
    if args.scores is not None:
        return checked(read_record(Scores, args.scores), checkpoint)
    if not args.window:
        learnt = load_answers(checkpoint, args.answers, held_out=False, tokens=SCORED_TOKENS)
    return Scoring.asked(checkpoint, args, args.out, learnt).kept("scores")


def check_answers(checkpoint: Checkpoint, path: Path) -> None:
    """Raise DataError unless a file holds answers of these weights."""
    if not is_answers(path):
        raise DataError(f"{path} does not hold answers; expected what `llmdrop answers` writes")
    header, _ = read_answers(path)
    theirs = header.provenance.model
    if theirs.fingerprint != checkpoint.fingerprint:
        others = other_weights(theirs, checkpoint)
        raise DataError(f"{path} holds answers of {others}; a mask is searched for by the model's own")
