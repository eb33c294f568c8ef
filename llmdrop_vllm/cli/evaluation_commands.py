"""`llmdrop answers | evaluate | compare | sweep | recommend | report`: each makes values of its arguments, calls the
library and prints.
"""

from argparse import Namespace
from pathlib import Path

from llmdrop_vllm.artifacts import COMPARISON_FILE, Scores, make_directory, read_record, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import console
from llmdrop_vllm.cli.commands import check_new, given_mask, opened
from llmdrop_vllm.cli.engines import dtype_of, harness_of, refuse_skipped, settings_of
from llmdrop_vllm.cli.scoring import Scoring, checked, forget, mask_file
from llmdrop_vllm.cli.search_commands import search_instead
from llmdrop_vllm.data.answers import load_answers, read_answers
from llmdrop_vllm.data.comparison import Comparison
from llmdrop_vllm.data.prompts import PROMPTS
from llmdrop_vllm.errors import InputError, MaskError, OutputError, command
from llmdrop_vllm.evaluation.answering import AnswersRequest, plan_answers, sample_answers
from llmdrop_vllm.evaluation.comparing import plan_comparison
from llmdrop_vllm.evaluation.engine import EngineSettings
from llmdrop_vllm.evaluation.evaluate import Measures, evaluate_checkpoint, load_text
from llmdrop_vllm.evaluation.harness import write_results
from llmdrop_vllm.evaluation.recommend import Goal, choose
from llmdrop_vllm.evaluation.records import DivergedOn, Evaluation, SpeedWorkload, Sweep
from llmdrop_vllm.evaluation.series import DEFAULT_SERIES, make_series
from llmdrop_vllm.evaluation.sweep import SCORES_FILE, SWEEP_FILE, SweepPlan, measure_sweep
from llmdrop_vllm.report import write_report
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.search.trials import Searched


def answers(args: Namespace) -> None:
    """`llmdrop answers`."""
    check_new(args.out, args.overwrite)
    if args.out.suffix.lower() != ".jsonl":
        raise OutputError(f"{args.out} has the suffix {args.out.suffix!r}; expected .jsonl, by which answers are known")
    checkpoint = Checkpoint.open(args.model)
    if checkpoint.mask:
        dropped = f"{checkpoint.directory}: {checkpoint.mask.summary()}"
        raise MaskError(f"{dropped}; expected the full model, whose answers show what a dropped one lacks: name that")
    names = ("samples", "max_tokens", "per_prompt", "temperature", "seed", "held_out")
    request = AnswersRequest(args.prompts or PROMPTS, **{name: getattr(args, name) for name in names})
    plan = plan_answers(checkpoint, request, dtype=dtype_of(checkpoint, args), options=args.engine_args)
    if plan.left_out:
        console.warn(plan.left_out)
    sample_answers(plan, args.out, progress=True)
    console.show_answers(read_answers(args.out)[1], args.max_tokens)
    console.show_next(args.out, "drop", args.model, "OUT", "--attention", 4, "--heal", args.out)


def ask(checkpoint: Checkpoint, out: Path, args: Namespace) -> None:
    """The full model's answers to our prompts, for what is healed on them right away; those that are there already if
    they are to the same.
    """
    plan = plan_answers(checkpoint, AnswersRequest(), dtype=dtype_of(checkpoint, args), options={})
    if not out.exists() or read_answers(out)[0].differs_in(plan.header):
        sample_answers(plan, out, progress=True)


def evaluate(args: Namespace) -> None:
    """`llmdrop evaluate`."""
    details = args.out.with_suffix(".lm-eval.json")
    for path in (args.out, details):
        check_new(path, args.overwrite)
    checkpoint = Checkpoint.open(args.model)
    full = Checkpoint.open(args.full) if args.full else None
    if full is None and checkpoint.is_stripped and args.divergence_tokens:
        lacking = f"{args.model} lacks what it dropped: agreement and KL want the full model, --full MODEL"
        if args.divergence_on != "answers":
            raise InputError(lacking)
        console.warn(lacking)
    mask, _ = given_mask(args, checkpoint)
    measures, settings = measures_of(checkpoint, args)
    found, raw = evaluate_checkpoint(checkpoint, mask, measures, settings, full=full)
    write_record(found, args.out)
    if raw is None:
        details.unlink(missing_ok=True)  # of the measurements that were replaced
    else:
        write_results(raw, details)
    console.show_evaluation(found)
    print(f"written to {args.out}")
    refuse_skipped(measures.harness)


def compare(args: Namespace) -> None:
    """`llmdrop compare`."""
    checkpoint = Checkpoint.open(args.model)
    out = args.out or checkpoint.directory / COMPARISON_FILE
    check_new(out, args.overwrite)
    mask, _ = given_mask(args, checkpoint)
    full = Checkpoint.open(args.full) if args.full else None
    what = {"prompts": args.prompts or PROMPTS, "samples": args.samples, "max_tokens": args.max_tokens}
    how = {"dtype": dtype_of(checkpoint, args), "options": args.engine_args}
    plan = plan_comparison(checkpoint, mask, full, **what, **how)
    found = plan.record()
    write_record(found, out)
    console.show_comparison(found)
    elsewhere = () if args.out is None else ("--comparison", out)
    console.show_next(out, "serve", args.model, *elsewhere)


def sweep(args: Namespace) -> None:
    """`llmdrop sweep`."""
    checkpoint = opened(args)
    measures, settings = measures_of(checkpoint, args)
    chosen = args.series or DEFAULT_SERIES
    make_series(Scores.unmeasured(checkpoint), chosen, args.counts)  # refused before the scores, which may take hours
    directory = _results_directory(args)
    scores = _scores(checkpoint, args, directory / SCORES_FILE)
    series, masks = make_series(scores, chosen, args.counts)
    names = ("requests", "prompt_tokens", "output_tokens")
    workload = None if args.no_speed else SpeedWorkload(**{name: getattr(args, name) for name in names})
    plan = SweepPlan(checkpoint, scores, series, masks, measures, settings, workload)
    found = measure_sweep(plan, directory, progress=True)
    console.show_sweep(found)
    elsewhere = ("--results", args.results) if args.results else ()
    console.show_next(directory / SWEEP_FILE, "report", args.model, *elsewhere)
    refuse_skipped(measures.harness)


def recommend(args: Namespace) -> None:
    """`llmdrop recommend`; the exit status is 1 where no point meets the goal."""
    goal = Goal(args.max_loss, args.kv_budget, args.speedup)
    if args.answers is not None:
        search_instead(args)
        return
    if args.out is not None:
        check_new(args.out, args.overwrite)
    found = _sweep_of(args)
    choice, meets = choose(found, goal)
    console.show_choice(found, choice, goal, meets=meets)
    if not meets:
        raise MaskError(f"no point of the sweep has {goal}; the nearest is above")
    if args.out is not None:
        mask = choice.point.quality.mask
        write_record(mask_file(mask, f"recommended for {goal}", found.provenance), args.out)
        console.show_next(args.out, "apply", args.model, "OUT", "--mask", args.out)


def report(args: Namespace) -> None:
    """`llmdrop report`."""
    directory = _results_directory(args)
    found = _sweep_of(args)
    scores = [read_record(Scores, path) for path in (directory / SCORES_FILE, *args.scores)]
    evaluations = [read_record(Evaluation, path) for path in args.healed]
    searched = None if args.search is None else Searched.read(args.search)
    compared = None if args.compared is None else read_record(Comparison, args.compared)
    written = write_report(Findings(found, scores, evaluations, searched, compared), directory)
    print(f"{len(written)} files written; open {directory / 'report.html'}")


def _results_directory(args: Namespace) -> Path:
    """Where a model's sweep and report are: a directory here, named after it, unless another is given."""
    return args.results or Path(f"{Path(args.model).resolve().name}-llmdrop")


def _sweep_of(args: Namespace) -> Sweep:
    """The sweep in the results directory. Raises InputError for one of other weights."""
    path = _results_directory(args) / SWEEP_FILE
    if not path.exists():
        raise InputError(f"{path} does not exist; run `{command('sweep', args.model)}` first, or give its --results")
    found = read_record(Sweep, path)
    if found.request.fingerprint != (fingerprint := Checkpoint.open(args.model).fingerprint):
        raise InputError(f"{path} is of the weights {found.request.fingerprint}; {args.model} has {fingerprint}")
    return found


def measures_of(checkpoint: Checkpoint, args: Namespace) -> tuple[Measures, EngineSettings]:
    """What can be refused without an engine is refused here."""
    harness = harness_of(args)
    text, context = load_text(checkpoint, args.text, context=args.context, windows=args.windows)
    named: dict[str, DivergedOn] = {"answers": "own answers", "text": "text"}
    on, held_out = named.get(args.divergence_on, "held-out answers"), None
    if on == "held-out answers" and args.divergence_tokens:
        file = Path(args.divergence_on)
        held_out = load_answers(checkpoint, file, held_out=True, tokens=args.divergence_tokens)
    measures = Measures(text, context, args.divergence_tokens, harness, on, held_out)
    return measures, settings_of(checkpoint, args, context)


def _scores(checkpoint: Checkpoint, args: Namespace, kept: Path) -> Scores:
    """Those given, those in the results directory, or new ones, which are kept there at once: they may take hours."""
    if args.scores is None and not kept.exists():
        make_directory(kept.parent)
        scores = Scoring.asked(checkpoint, args, kept).run()
        write_record(scores, kept)
        forget(kept)
        return scores
    scores = checked(read_record(Scores, args.scores or kept), checkpoint)
    if args.scores is None:
        _check_calibration(scores, args, kept)
    return scores


def _check_calibration(scores: Scores, args: Namespace, kept: Path) -> None:
    """Raise OutputError where the arguments ask to score with something else than the scores that are there."""
    data = scores.provenance.data
    kept_as = {**(data.model_dump() if data else {}), "after_healing": scores.after_healing}
    asked = {"source": args.data, "sequences": args.samples, "seq_len": args.seq_len, "seed": args.seed}
    for name, value in {**asked, "after_healing": args.after_healing}.items():
        if value is not None and value != (found := kept_as.get(name, value)):
            differs = f"{kept} was measured otherwise: {name} was {found} and is {value}"
            raise OutputError(f"{differs}; choose another directory, or give --scores {kept} to go on with it")
