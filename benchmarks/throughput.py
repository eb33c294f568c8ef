"""What dropping buys, contenders side by side: stock vLLM in full, this plugin, vLLM's no-op path, Transformers.

    python benchmarks/throughput.py --shape cpu-small --attention 2,4
    python benchmarks/throughput.py --shape cpu-small --attention 4 --workloads paper,chats --repeats 9
    python benchmarks/throughput.py --shape cpu-small --attention 4 --contexts 256,1024,4096
    python benchmarks/throughput.py --shape llama-2-13b --table paper --scale 0.25
    python benchmarks/throughput.py --smoke

Random weights, written once and read by all; random prompts, another set in each round. Before anything is timed, all
contenders with one mask must agree on log-probabilities. Each contender has a process of its own and they take turns.
Every engine is stepped in its own process, without HTTP: prefill ends with the last request's first token; TTFT and
TPOT are taken per request, at the end of the step that made the token. Writes results/NAME.jsonl, .md and .json.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import published
from benchmarks.contenders import Settings
from benchmarks.limit import measure_ceilings
from benchmarks.lineup import Lineup
from benchmarks.record import RESULTS, finish, provenance
from benchmarks.shapes import Shape, find
from benchmarks.table import EXPECTED_RATIO, markdown
from benchmarks.turns import Plan, against_rivals, measure
from benchmarks.weights import write_random
from benchmarks.workloads import PAPER, WORKLOADS, Workload, as_many_as_fit, at_contexts, chosen
from llmdrop_vllm import DropMask, InputError, MaskError
from llmdrop_vllm.artifacts import MaskFile, read_record

KINDS = ("attention", "mlp", "block")
SMOKE = {"shape": "smoke", "attention": "2", "scale": 1 / 128, "repeats": 2, "kv_gib": 1 / 32, "workloads": "chats"}


def masks(args: argparse.Namespace, shape: Shape) -> dict[str, DropMask]:
    """Label to mask. Raises InputError for a mask that does not fit the shape."""
    wanted = [(kind, count) for kind in KINDS for count in numbers(f"--{kind}", getattr(args, kind))]
    if args.table:
        wanted += [(kind, count) for kind, count, _ in published.table(shape.name, shape.num_layers)]
    found = {f"{kind} {count}": shape.mask(kind, count) for kind, count in wanted}
    if args.mask is not None:
        mask = read_record(MaskFile, args.mask).mask
        if mask.num_hidden_layers != shape.num_layers:
            raise MaskError(f"{args.mask} is for {mask.num_hidden_layers} layers; {shape.name} has {shape.num_layers}")
        found[args.mask.stem] = mask
    return found or {f"attention {shape.num_layers // 2}": shape.mask("attention", shape.num_layers // 2)}


def numbers(option: str, text: str | None) -> list[int]:
    """`2,4` as numbers."""
    if text is None:
        return []
    if not all(each.isdigit() for each in text.split(",")):
        raise InputError(f"{option} {text}: expected whole numbers separated by commas")
    return [int(each) for each in text.split(",")]


def workload_list(args: argparse.Namespace, plan: Plan, scale: float) -> tuple[Workload, ...]:
    """What the options ask for; raises InputError for what they misspell."""
    if args.contexts:
        return at_contexts(numbers("--contexts", args.contexts))
    if args.table and not args.workloads:
        return (PAPER.scaled(scale),)
    found = tuple(each.scaled(scale) for each in chosen(args.workloads))
    if args.workloads is None:
        found = (*found, as_many_as_fit(max(plan.kv_tokens(mask) for mask in plan.masks.values()), scale))
    return found


def make_plan(args: argparse.Namespace) -> tuple[Plan, tuple[Workload, ...]]:
    """Everything that can be refused is refused here, before the first slow step."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    scale = args.scale if args.scale is not None else (1 if on_gpu else 1 / 32)
    shape = find(args.shape, args.layers)
    if args.repeats < 1:
        raise InputError(f"--repeats {args.repeats}: expected 1 or more")
    settings = Settings(
        dtype=args.dtype or ("bfloat16" if on_gpu else "float32"),
        device=device,
        kv_bytes=int((args.kv_gib or (8 if on_gpu else 0.2)) * 2**30),
        max_step_tokens=8192 if on_gpu else 2048,
        compiled=on_gpu if args.compile is None else args.compile,
    )
    plan = Plan(shape, settings, masks(args, shape), args.repeats, tuple(args.without))
    work = workload_list(args, plan, scale)
    for each in work:
        plan.check_fits(each)
    return plan, work


def run(args: argparse.Namespace, directory: Path) -> None:
    """From options to files."""
    plan, work = make_plan(args)
    settings = plan.settings
    ceilings = measure_ceilings(settings.dtype, settings.device, seconds=0.2 if args.smoke else 2)
    plan = plan.with_work(work, ceilings)
    print(
        f"{plan.shape.name}: {plan.shape.num_parameters / 1e6:,.0f} M parameters, {settings.dtype}, {settings.device}; "
        f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s, {ceilings.flops_per_s / 1e9:.0f} GFLOP/s; "
        f"at the limit, all runs take {plan.seconds():.0f} s",
        flush=True,
    )
    lineup = Lineup(plan.shape, settings, write_random(directory / "full", plan.shape, settings.dtype))
    found = []
    for line in measure(plan, lineup):
        found.append(line | published_speedup(plan.shape, line))
        show(line)
    write(args.out or RESULTS / f"throughput-{plan.shape.name}.json", plan, lineup, found)


def published_speedup(shape: Shape, line: dict[str, Any]) -> dict[str, float]:
    """What the paper prints for the same model and number of sublayers, if it does."""
    kind, _, count = line["contender"].partition(", ")[2].partition(" ")
    speedup = published.SPEEDUPS.get(shape.name, {}).get(kind, {}).get(int(count) if count.isdigit() else 0)
    return {} if speedup is None or line["workload"]["name"] != PAPER.name else {"published_speedup": speedup}


def write(out: Path, plan: Plan, lineup: Lineup, found: Sequence[dict[str, Any]]) -> None:
    """JSON lines, the table, and the result whose JSON is the last line on the standard output."""
    origin = {"shape": plan.shape.name, "layers": plan.shape.num_layers, **provenance()}
    out.with_suffix(".jsonl").write_text("".join(json.dumps({**line, **origin}) + "\n" for line in found))
    out.with_suffix(".md").write_text(markdown(plan.shape, found, lineup.skipped))
    finish(
        {
            "benchmark": "throughput",
            "shape": plan.shape.name,
            "layers": plan.shape.num_layers,
            "masks": {label: {"attention": mask.attention, "mlp": mask.mlp} for label, mask in plan.masks.items()},
            "settings": asdict(plan.settings),
            "ceilings": asdict(plan.ceilings),
            "repeats": plan.repeats,
            "skipped": lineup.skipped,
            "worst_ratio_to_limit": min(line["total"]["ratio"] for line in found),
            "to_explain": [
                f"{line['label']}: {line['contender']}, ratio {line['total']['ratio']:.2f}"
                for line in found
                if not EXPECTED_RATIO[0] <= line["total"]["ratio"] <= EXPECTED_RATIO[1]
            ],
            "worst_speedup_over": against_rivals(found),
            "lines": found,
        },
        out,
    )


def show(line: dict[str, Any]) -> None:
    total = line["total"]
    print(
        f"{line['label']:44} {line['contender']:28} {line['total_s']:8.3f} s  {total['verdict']:>13}  "
        f"limit {total['predicted_speedup']:.2f}x  ratio {total['ratio']:.2f}",
        flush=True,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="cpu-small", help="one of benchmarks/shapes.py")
    parser.add_argument("--layers", type=int, help="the shape's layers at another depth")
    for kind in ("attention", "mlp", "block"):
        parser.add_argument(f"--{kind}", metavar="N[,N]", help=f"masks that drop so many {kind} sublayers each")
    parser.add_argument("--mask", type=Path, help="a mask that `llmdrop select` wrote")
    parser.add_argument("--table", choices=["paper"], help="the paper's workload and numbers of dropped sublayers")
    names = ", ".join(dict.fromkeys(each.name for each in WORKLOADS))
    parser.add_argument("--workloads", metavar="NAME[,NAME]", help=f"default: {names} and as many as fit")
    parser.add_argument("--contexts", metavar="N[,N]", help="instead: decode at contexts of so many tokens, batch 4")
    parser.add_argument("--scale", type=float, help="of the workloads' tokens; default: 1 on a GPU, 1/32 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: what torch finds")
    parser.add_argument("--kv-gib", type=float, help="KV cache; default: 8 on a GPU, 0.2 on a CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--without", action="append", default=[], metavar="CONTENDER", help="such as Transformers")
    parser.add_argument("--directory", type=Path, help="where there is room for the checkpoint")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/throughput-SHAPE.json")
    parser.add_argument("--smoke", action="store_true", help="seconds, to see that everything works")
    args = parser.parse_args(arguments)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            run(args, Path(directory))
    except InputError as error:
        raise SystemExit(f"throughput: error: {error}") from None


if __name__ == "__main__":
    main()
