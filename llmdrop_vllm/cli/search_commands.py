"""`llmdrop search`: makes values of its arguments, calls the library and prints."""

from argparse import Namespace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from llmdrop_vllm.artifacts import MaskFile, Scores, read_record, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli.commands import check_new, check_scored, forget, scored_or_kept
from llmdrop_vllm.cli.console import show_search
from llmdrop_vllm.data.answers import is_answers, load_answers, read_answers
from llmdrop_vllm.errors import DataError
from llmdrop_vllm.search.space import Space

if TYPE_CHECKING:
    from llmdrop_vllm.search.plan import SearchPlan


def search(args: Namespace) -> None:
    """`llmdrop search`."""
    check_new(args.out, args.overwrite)
    checkpoint = Checkpoint.open(args.model)
    space = Space(checkpoint.mask, args.attention, args.mlp, frozenset(args.protect))
    found = searched(checkpoint, space, args.answers, args)
    write_record(found, args.out)
    forget(args.out)
    show_search(found)
    print(f"written to {args.out}; next: llmdrop apply {args.model} OUT --mask {args.out}")


def searched(checkpoint: Checkpoint, space: Space, answers: Path, args: Namespace) -> MaskFile:
    """What the arguments' search finds; its trials stay beside OUT, and are gone on with."""
    plan = _plan(checkpoint, space, answers, args)
    from llmdrop_vllm.search.search import search as search_masks

    return search_masks(plan, args.out.with_suffix(".trials.jsonl"), progress=True)


def _plan(checkpoint: Checkpoint, space: Space, answers: Path, args: Namespace) -> "SearchPlan":
    from llmdrop_vllm.search.plan import SearchOptions, plan_search

    check_answers(checkpoint, answers)
    options = SearchOptions(
        most=args.masks,
        seconds=inf if args.minutes is None else 60 * args.minutes,
        beam=args.beam,
        seed=args.seed,
    )
    learnt, held_out = (
        load_answers(checkpoint, answers, held_out=judging, tokens=tokens)
        for judging, tokens in ((False, args.tokens), (True, args.held_out_tokens))
    )
    to_heal = load_answers(checkpoint, answers, held_out=False, tokens=args.heal_aware) if args.heal_aware else None
    if args.scores is not None:
        scores = read_record(Scores, args.scores)
        check_scored(scores, checkpoint)
    else:
        args.after_healing = False
        scores = scored_or_kept("scores", checkpoint, learnt, args)
    return plan_search(
        scores, checkpoint, space, learnt, held_out, options, to_heal=to_heal, device=args.device, dtype=args.dtype
    )


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
