"""Latency under HTTP load: the same weights in full behind `vllm serve`, with a mask behind `llmdrop serve`.

    python benchmarks/load.py                                        # cpu-small, half of the attention dropped
    python benchmarks/load.py --rates 1,2,4,8,inf --repeats 5
    python benchmarks/load.py --shape llama-3-8b --attention 16 --prompt-tokens 1024 --output-tokens 1024 --fit 16
    python benchmarks/load.py --smoke

vLLM's own `vllm bench serve` sends random prompts, as a Poisson process at each rate, and takes the times. All servers
are up, one has something to do, and they take turns. All have the same KV memory, so little that requests of the full
model must wait for each other's (--fit). Rates in per cent are shares of what the full model serves when everything
comes at once, which is measured first. At a rate above what a server serves, its latencies grow with --seconds.
Writes results/load-SHAPE.jsonl, .md and .json.
"""

import argparse
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import options
from benchmarks.bench_serve import LATENCIES, requests_that_fit
from benchmarks.contenders import Contender
from benchmarks.limit import Ceilings, Model, measure_ceilings, predict
from benchmarks.lineup import NO_OP, TRANSFORMERS, Lineup
from benchmarks.load_turns import Rate, Turns, serving_all
from benchmarks.memory import free_bytes
from benchmarks.record import finish
from benchmarks.servers import engine_cores
from benchmarks.shapes import find
from benchmarks.table import rows, verdict
from benchmarks.turns import Plan, with_room_for
from benchmarks.weights import write_random, write_tokenizer
from benchmarks.workloads import Workload
from llmdrop_vllm import InputError
from llmdrop_vllm.cli.values import count

SMOKE = {"shape": "smoke", "rates": "80%,inf", "repeats": 2, "seconds": 1, "fit": 2, "prompt_tokens": 120}
SMOKE |= {"output_tokens": 8, "attention": [2], "layers": None}
COLUMNS = ("requests/s sent", "contender", "served/s", "output tokens/s")
COLUMNS += ("TTFT ms, median / p95", "TPOT ms, median / p95", "whole request ms, median / p95")
COLUMNS += ("in the queue ms, mean", "preempted", "failed", "TTFT shorter", "whole request shorter", "more served")


def make_plan(args: argparse.Namespace) -> tuple[Plan, Workload, list[Rate]]:
    """Everything that can be refused is refused here, before the first slow step."""
    shape, settings = find(args.shape, args.layers), options.settings(args)
    rates = [*dict.fromkeys(Rate.parse(each) for each in args.rates.split(","))]
    if args.output_tokens < 2:  # a single token has no time per output token
        raise InputError(f"--output-tokens {args.output_tokens}: expected 2 or more")
    workload = Workload("load", 1, args.prompt_tokens, args.output_tokens)
    if args.kv_gib is None:
        settings = with_room_for(args.fit, workload, shape, settings)
    plan = Plan(shape, settings, options.masks(args, shape), args.repeats, (NO_OP, TRANSFORMERS))
    plan.check_fits(workload)
    lineup = Lineup(shape, settings, Path())
    need, free = sum(map(lineup.need_bytes, plan.line())), free_bytes(settings.device)
    if need > free:
        raise InputError(f"all servers need {need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free")
    return plan, workload, rates


def run(args: argparse.Namespace, directory: Path) -> None:
    """From options to files."""
    plan, workload, wanted = make_plan(args)
    model = write_random(directory / "model", plan.shape, plan.settings.dtype)
    write_tokenizer(model, plan.shape.config["vocab_size"])
    torch.set_num_threads(len(engine_cores()))
    ceilings = measure_ceilings(plan.settings.dtype, plan.settings.device, seconds=0.2 if args.smoke else 2)
    with serving_all(plan, model, workload.tokens_per_sequence) as servers:
        fits = {each: requests_that_fit(server) for each, server in servers.items()}
        turns = Turns.calibrated(servers, model, workload, args.seconds, at_once=6 * args.fit)
        gains = predicted_gains(plan, ceilings, replace(workload, batch=turns.requests(math.inf)), fits)
        for each, most in turns.saturations_per_s.items():
            print(
                f"{each.name}: KV cache for {fits[each]} requests at once, {most:.2f} requests/s at most; "
                f"at the limit {gains[each]:.2f}x the full model's",
                flush=True,
            )
        rates = [*dict.fromkeys(rate.per_s(turns.saturation_per_s) for rate in wanted)]
        print(f"all runs take {turns.predicted_s(rates, plan.repeats):.0f} s", flush=True)
        lines = [*turns.lines(turns.interleaved(rates, plan.repeats))]
    result = {
        "benchmark": "load",
        **plan.description(),
        "ceilings": asdict(ceilings),
        "workload": asdict(workload),
        "seconds": args.seconds,
        "requests_that_fit": by_name(fits),
        "saturation_per_s": by_name(turns.saturations_per_s),
        "predicted_gain": by_name(gains),
        "failures": sum(line["failures"] for line in lines),
    }
    finish(f"load-{plan.shape.name}", result, args.out, lines=lines, table=markdown(result, lines))


def predicted_gains(
    plan: Plan, ceilings: Ceilings, burst: Workload, fits: Mapping[Contender, int]
) -> dict[Contender, float]:
    """How many times more requests than the full model each serves at the limit, where all come at once."""
    seconds = {
        each: predict(
            Model.of(plan.shape, each.mask, plan.settings.dtype),
            burst,
            ceilings,
            max_step_tokens=plan.settings.max_step_tokens,
            kv_tokens=fit * burst.tokens_per_sequence,
        ).total_s
        for each, fit in fits.items()
    }
    of_full, *_ = seconds.values()
    return {each: of_full / total_s for each, total_s in seconds.items()}


def by_name(values: Mapping[Contender, float]) -> dict[str, float]:
    return {each.name: value for each, value in values.items()}


def markdown(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """One row for each rate and contender."""
    workload = result["workload"]
    fits = " or ".join(f"{fit} ({name})" for name, fit in result["requests_that_fit"].items())
    return (
        f"# {result['shape']}, {result['layers']} layers, under HTTP load\n\n"
        f"Requests of {workload['prompt_tokens']} + {workload['output_tokens']} tokens. "
        f"The same KV memory holds {fits} at once. Medians of {result['repeats']} runs.\n\n"
        + rows(COLUMNS, map(cells, lines))
    )


def cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    """The row of one line; what is compared with the full model is left out for the full model itself."""
    rate, versus = line["rate_per_s"], line["versus_full"]
    compared = ("ttft_s median", "e2e_s median", "requests_per_s")
    masked = line["attention_dropped"] or line["mlp_dropped"]
    return (
        "all at once" if rate is None else f"{rate:.2f} ({line['rate_of_saturation']:.0%})",
        line["contender"],
        f"{line['requests_per_s']:.2f}",
        f"{line['output_tokens_per_s']:.0f}",
        *(f"{1e3 * line[name]['median']:,.0f} / {1e3 * line[name]['p95']:,.0f}" for name in LATENCIES),
        f"{1e3 * line['queue_s']:,.0f}",
        f"{line['preemptions']:g}",
        str(line["failures"]),
        *(verdict(versus[name]) if masked else "" for name in compared),
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_shared(parser, repeats=3, kv_gib="for --fit requests")
    parser.add_argument("--rates", default="40%,80%,120%,160%,inf", metavar="R[,R]", help="requests/s, or N%%, or inf")
    parser.add_argument("--seconds", type=options.positive, default=8, help="for which requests come in each run")
    parser.add_argument("--prompt-tokens", type=count, default=32)
    parser.add_argument("--output-tokens", type=count, default=32)
    parser.add_argument("--fit", type=count, default=4, help="requests of the full model that fit into its KV cache")
    args = parser.parse_args(arguments)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    options.run_in_directory("load", run, parse(arguments))


if __name__ == "__main__":
    # Servers have sessions of their own: told to end, we must not go without them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
