"""`llmdrop search`: makes values of its arguments, calls the library and prints."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from llmdrop_vllm.artifacts import Scores, read_record, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli.commands import check_new, check_scored, forget, scored_or_kept
from llmdrop_vllm.cli.console import show_search
from llmdrop_vllm.data.answers import is_answers, load_answers, read_answers
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import DataError, InputError, MaskError
from llmdrop_vllm.evaluation.goals import Wanted, wanted
from llmdrop_vllm.healing.split import held_out_sequences
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.space import Space
from llmdrop_vllm.selection.candidates import Candidates
from llmdrop_vllm.selection.selection import Ranked

# More prompts tell masks apart better than longer answers do.
TOKENS_OF_EACH = 64
TOKENS, HELD_OUT_TOKENS, SCORED_TOKENS = 2048, 4096, 32_768


def search(args: Namespace) -> None:
    """`llmdrop search`."""
    check_new(args.out, args.overwrite)
    check_search_options(args, searches=True)
    checkpoint = Checkpoint.open(args.model)
    goal = wanted(
        checkpoint,
        kv_share=args.kv_budget,
        requests=args.requests,
        memory_bytes=args.memory,
        decode_speedup=args.decode_speedup,
        batch=args.batch,
        context=args.context,
    )
    # Refused before the scores: how many go depends on these only where layers differ in size.
    _space(checkpoint, Scores.unmeasured(checkpoint), goal, args)
    data = SearchData.of(checkpoint, args.answers, args)
    trials = args.out.with_suffix(".trials.jsonl")
    scores = _scores(checkpoint, args)
    found = searched(checkpoint, _space(checkpoint, scores, goal, args), data, scores, args, trials)
    write_record(found, args.out)
    forget(args.out)
    show_search(found)
    print(f"written to {args.out}; next: llmdrop apply {args.model} OUT --mask {args.out}")


def check_search_options(args: Namespace, *, searches: bool) -> None:
    """Raise InputError for options of a search where none is, or that exclude each other."""
    names = ("masks", "minutes", "tokens", "held_out_tokens", "beam", "heal_aware")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given and not searches:
        raise InputError(f"{', '.join(given)} belong to --search, which is not given")
    if args.beam is not None and args.heal_aware is not None:
        raise InputError("--beam and --heal-aware exclude each other: one mask is healed at each step")


@dataclass(frozen=True)
class SearchData:
    """Answers that masks are chosen by, those that decide, and those that healing on the way learns from."""

    learnt: Calibration
    held_out: Calibration
    to_heal: Calibration | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: Path, args: Namespace) -> Self:
        """Raises DataError unless a file holds enough answers of these weights."""
        check_answers(checkpoint, path)
        sizes = ((False, args.tokens or TOKENS), (True, args.held_out_tokens or HELD_OUT_TOKENS))
        learnt, held_out = (
            load_answers(checkpoint, path, held_out=judging, tokens=tokens, tokens_each=TOKENS_OF_EACH)
            for judging, tokens in sizes
        )
        if args.heal_aware is None:
            return cls(learnt, held_out, None)
        to_heal = load_answers(checkpoint, path, held_out=False, tokens=args.heal_aware)
        held_out_sequences(to_heal)
        return cls(learnt, held_out, to_heal)


def searched(
    checkpoint: Checkpoint, space: Space, data: SearchData, scores: Scores, args: Namespace, trials: Path
) -> MaskFile:
    """What the arguments' search finds; its trials are gone on with."""
    from llmdrop_vllm.search.plan import SearchOptions, plan_search
    from llmdrop_vllm.search.search import search as search_masks

    asked = {"most": args.masks, "seconds": args.minutes and 60 * args.minutes, "beam": args.beam, "seed": args.seed}
    options = SearchOptions(**{name: value for name, value in asked.items() if value is not None})
    plan = plan_search(
        scores,
        checkpoint,
        space,
        data.learnt,
        data.held_out,
        options,
        to_heal=data.to_heal,
        device=args.device,
        dtype=args.dtype,
    )
    return search_masks(plan, trials, progress=True)


def _space(checkpoint: Checkpoint, scores: Scores, goal: Wanted | None, args: Namespace) -> Space:
    """What the arguments ask to look among: so many attentions, or as many as a goal takes by importance; those of
    --fixed go in any case.
    """
    own, protect = checkpoint.mask, frozenset(args.protect)
    if both := sorted(protect.intersection(args.fixed)):
        raise MaskError(f"layers {both} are in --protect and in --fixed")
    start = DropMask(own.num_hidden_layers, (*own.attention, *args.fixed), own.mlp)
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}; expected 0 or more")
    if goal is None:
        if args.attention < len(args.fixed):
            raise MaskError(f"--attention is {args.attention}, and {len(args.fixed)} go in any case (--fixed)")
        return Space(start, args.attention - len(args.fixed), args.mlp, protect)
    if args.attention:
        raise InputError("--attention is how many go, which --kv-budget, --requests and --decode-speedup find out")
    candidates = Candidates(scores, start, protect)
    if args.mlp:
        candidates = candidates.without(Ranked("mlp", args.mlp).pick(candidates).units)
    most = candidates.available(candidates.units("attention"))
    picked = (Ranked("attention", count).pick(candidates) for count in range(1, most + 1))
    if goal(candidates.mask):
        raise MaskError(f"what is asked for is met by {candidates.mask.summary()}; nothing is left to search")
    smallest = goal.smallest([candidates.mask, *(candidates.without(each.units).mask for each in picked)])
    return Space(start, len(smallest.attention) - len(start.attention), args.mlp, protect, meets=goal)


def _scores(checkpoint: Checkpoint, args: Namespace) -> Scores:
    """As given, or on the answers that masks are chosen by."""
    if args.scores is None:
        learnt = load_answers(checkpoint, args.answers, held_out=False, tokens=SCORED_TOKENS)
        return scored_or_kept("scores", checkpoint, learnt, args)
    scores = read_record(Scores, args.scores)
    check_scored(scores, checkpoint)
    return scores


def check_answers(checkpoint: Checkpoint, path: Path) -> None:
    """Raise DataError unless a file holds answers of these weights."""
    if not is_answers(path):
        raise DataError(f"{path} does not hold answers; expected what `llmdrop answers` writes")
    header, _ = read_answers(path)
    theirs = header.provenance.model
    if theirs.fingerprint != checkpoint.fingerprint:
        raise DataError(
            f"{path} holds answers of {theirs.path} (weights {theirs.fingerprint}), and {checkpoint.directory} has "
            f"other weights ({checkpoint.fingerprint}); a mask is searched for by the model's own"
        )
