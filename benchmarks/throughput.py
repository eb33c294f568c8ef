"""What dropping buys, contenders side by side: stock vLLM in full, this plugin, vLLM's no-op path, Transformers.

    python benchmarks/throughput.py --shape cpu-small --attention 2,4
    python benchmarks/throughput.py --shape cpu-small --attention 4 --workloads paper,chats --repeats 9
    python benchmarks/throughput.py --shape cpu-small --attention 4 --contexts 256,1024,4096
    python benchmarks/throughput.py --shape llama-2-13b --table paper --scale 0.25
    python benchmarks/throughput.py --shape smollm2 --dtype bfloat16 --mask search/8.json
    python benchmarks/throughput.py --smoke

Random weights, written once and read by all, or a real model's; random prompts, another set in each round. Before
anything is timed, all contenders with one mask must agree on log-probabilities. Each contender has a process of its own
and they take turns. Engines are stepped in their processes, without HTTP: prefill ends with the last request's first
token; TTFT and TPOT are taken per request, at the end of the step that made the token. Writes results/NAME.jsonl, .md
and .json.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import options, published
from benchmarks.contenders import Settings
from benchmarks.limit import measure_ceilings
from benchmarks.lineup import NO_OP, OURS, TRANSFORMERS, Lineup
from benchmarks.record import finish
from benchmarks.shapes import Shape, find
from benchmarks.table import EXPECTED_RATIO, markdown
from benchmarks.turns import Plan, against_rivals, measure, with_room_for
from benchmarks.weights import write_random
from benchmarks.workloads import PAPER, WORKLOADS, Workload, as_many_as_fit, at_contexts, chosen
from llmdrop_vllm.cli.values import count

SMOKE = {"shape": "smoke", "attention": [2], "scale": 1 / 128, "repeats": 2, "kv_gib": 1 / 32, "workloads": "chats"}


def workload_list(args: argparse.Namespace, plan: Plan, scale: float) -> tuple[Workload, ...]:
    """What the options ask for; raises InputError for what they misspell."""
    if args.contexts:
        return at_contexts(args.contexts)
    if args.table and not args.workloads:
        return (PAPER.scaled(scale),)
    found = tuple(each.scaled(scale) for each in chosen(args.workloads))
    if args.workloads is None:
        found = (*found, as_many_as_fit(max(plan.kv_tokens(mask) for mask in plan.masks.values()), scale))
    return found


def undisturbed_decode(
    work: Sequence[Workload], shape: Shape, settings: Settings, args: argparse.Namespace
) -> Settings:
    """One step for a whole prefill and KV cache for all requests: otherwise some decode while others still wait."""
    longest = max(work, key=lambda each: each.prefill_tokens)
    settings = replace(settings, max_step_tokens=max(settings.max_step_tokens, longest.prefill_tokens))
    return settings if args.kv_gib else with_room_for(longest.batch, longest, shape, settings)


def make_plan(args: argparse.Namespace) -> tuple[Plan, tuple[Workload, ...]]:
    """Everything that can be refused is refused here, before the first slow step."""
    shape, settings = find(args.shape, args.layers), options.settings(args)
    if args.contexts:
        settings = undisturbed_decode(at_contexts(args.contexts), shape, settings, args)
    scale = args.scale if args.scale is not None else (1 if settings.device == "cuda" else 1 / 32)
    plan = Plan(shape, settings, options.masks(args, shape), args.repeats, tuple(args.without), args.processes)
    work = workload_list(args, plan, scale)
    for each in work:
        plan.check_fits(each)
    return plan, work


def run(args: argparse.Namespace, directory: Path) -> None:
    """From options to files."""
    plan, work = make_plan(args)
    settings = plan.settings
    ceilings = measure_ceilings(settings.dtype, settings.device, seconds=0.2 if args.smoke else 2)
    plan = replace(plan, work=work, ceilings=ceilings)
    print(
        f"{plan.shape.name}: {plan.shape.num_parameters / 1e6:,.0f} M parameters, {settings.dtype}, {settings.device}; "
        f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s, {ceilings.flops_per_s / 1e9:.0f} GFLOP/s; "
        f"at the limit, all runs take {plan.seconds():.0f} s",
        flush=True,
    )
    lineup = Lineup(plan.shape, settings, weights(directory / "full", plan.shape, settings.dtype))
    found: list[dict[str, Any]] = []
    try:
        for line in measure(plan, lineup):
            found.append(line | published_speedup(plan.shape, line))
            show(line)
    finally:  # what was measured is kept where a contender died, or the user lost patience
        if found:
            write(args.out, plan, lineup, found)


def weights(directory: Path, shape: Shape, dtype: str) -> Path:
    """The shape's own, or random ones, where there is room for others beside them."""
    if shape.real is None:
        return write_random(directory, shape, dtype)
    directory.symlink_to(shape.real.directory)
    return directory


def published_speedup(shape: Shape, line: dict[str, Any]) -> dict[str, float]:
    """What the paper prints for the same model and number of sublayers, if it does."""
    kind, _, count = line["contender"].partition(", ")[2].partition(" ")
    speedup = published.speedups(shape).get(kind, {}).get(int(count) if count.isdigit() else 0)
    return {} if speedup is None or line["workload"]["name"] != PAPER.name else {"published_speedup": speedup}


def write(out: Path | None, plan: Plan, lineup: Lineup, found: Sequence[dict[str, Any]]) -> None:
    """JSON lines, the table, and the result whose JSON is the last line on the standard output."""
    result = {
        "benchmark": "throughput",
        **plan.description(),
        "ceilings": asdict(plan.ceilings),
        "skipped": lineup.skipped,
        "not_measured": [each.label for each in plan.work if each.label not in {line["label"] for line in found}],
        "worst_ratio_to_limit": min(line["total"]["ratio"] for line in found),
        "to_explain": [
            f"{line['label']}: {line['contender']}, ratio {line['total']['ratio']:.2f}"
            for line in found
            if not EXPECTED_RATIO[0] <= line["total"]["ratio"] <= EXPECTED_RATIO[1]
        ],
        "worst_speedup_over": against_rivals(found),
    }
    table = markdown(plan.shape, found, lineup.skipped)
    finish(f"throughput-{plan.shape.name}", result, out, lines=found, table=table)


def show(line: dict[str, Any]) -> None:
    total = line["total"]
    print(
        f"{line['label']:44} {line['contender']:28} {line['total_s']:8.3f} s  {total['verdict']:>13}  "
        f"limit {total['predicted_speedup']:.2f}x  ratio {total['ratio']:.2f}",
        flush=True,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_shared(parser)
    parser.add_argument("--table", choices=["paper"], help="the paper's workload and numbers of dropped sublayers")
    names = ", ".join(dict.fromkeys(each.name for each in WORKLOADS))
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--workloads", metavar="NAME[,NAME]", help=f"default: {names} and as many as fit")
    contexts = "instead: decode at contexts of so many tokens, batch 4"
    work.add_argument("--contexts", type=options.numbers, metavar="N[,N]", help=contexts)
    parser.add_argument("--scale", type=float, help="of the workloads' tokens; default: 1 on a GPU, 1/32 on a CPU")
    parser.add_argument("--processes", type=count, default=1, help="of each, in turn: some are lucky for life")
    others = (OURS, NO_OP, TRANSFORMERS)  # the baseline is always there
    parser.add_argument("--without", action="append", default=[], choices=others, help="may be repeated")
    args = parser.parse_args(arguments)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    options.run_in_directory("throughput", run, parse(arguments))


if __name__ == "__main__":
    main()
