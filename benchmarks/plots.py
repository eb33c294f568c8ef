"""Pictures of the results, each to be read without a caption.

    python benchmarks/plots.py [--results benchmarks/results] [--out benchmarks/results]

RESULT-speedup.svg: speedup by sublayers dropped, with what is predicted as a band. -context.svg: decode tokens/s by
context. -fits.svg: sequences that fit into the KV cache. -latency.svg: time per token by requests at once. -ttft.svg:
time to first token by requests per second. -position.svg: what windows lose, by how far into a text.
-capacity.svg: requests that fit, and what that costs.
Each is made from the result files that hold what it needs; what is missing is said.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.options import ending
from benchmarks.record import RESULTS
from benchmarks.workloads import PAPER
from llmdrop_vllm import InputError
from llmdrop_vllm.artifacts import write_atomically
from llmdrop_vllm.report.style import as_svg, styled

# Okabe and Ito's colours, which colour-blind people tell apart; markers and line styles say the same again.
STYLES: dict[str, dict[str, Any]] = {
    "vLLM": {"color": "#555555", "marker": "s", "linestyle": "--"},
    "llmdrop": {"color": "#0072B2", "marker": "o"},
    "vLLM no-op": {"color": "#E69F00", "marker": "^", "linestyle": ":"},
    "Transformers": {"color": "#D55E00", "marker": "D", "linestyle": "-."},
}
WINDOW = 1024  # tokens, of the picture that compares choices of layers
SHOWN = tuple(f", 50%, W {WINDOW}, {each}" for each in ("nothing", "first 4 tokens"))
LIMIT = {"color": "#009E73", "alpha": 0.3}
Lines = Sequence[Mapping[str, Any]]


def lines_of(result: Mapping[str, Any], benchmark: str, workload: str | None = None) -> Lines:
    """Those of a result of this benchmark, or of one workload in it; none of another benchmark's."""
    lines: Lines = result["lines"] if result.get("benchmark") == benchmark else ()
    return [each for each in lines if workload is None or each["workload"]["name"] == workload]


def speedup_by_dropped(result: Mapping[str, Any], axes: Axes) -> None:
    """Speedup of the whole workload, attention sublayers only."""
    kept = [each for each in result["lines"] if not each["mlp_dropped"] and each["variant"] in ("vLLM", "llmdrop")]
    lines = sorted(kept, key=lambda each: each["attention_dropped"])
    dropped = [each["attention_dropped"] for each in lines]
    limit = [each["total"]["predicted_speedup"] for each in lines]
    measured = [each["total"]["speedup"] for each in lines]
    spread = [each["total"]["spread"] / 2 for each in lines]
    axes.fill_between(dropped, [0.95 * each for each in limit], limit, label="predicted, and 5% below", **LIMIT)
    style = STYLES["llmdrop"]
    axes.errorbar(dropped, measured, yerr=spread, capsize=3, label="llmdrop, median and quartiles", **style)
    if published := [(each["attention_dropped"], s) for each in lines if (s := each.get("published_speedup"))]:
        axes.plot(*zip(*published, strict=True), label="arXiv 2406.15786", **STYLES["Transformers"])
    axes.axhline(1, **{**STYLES["vLLM"], "marker": ""}, label="vLLM, full model")
    axes.set(xlabel=f"attention sublayers dropped, of {result['layers']}", ylabel="speedup, prefill and decode")
    axes.set_title(f"{result['shape']}: {lines[0]['label']} tokens")


def style_of(line: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A contender's; the more is dropped, the stronger."""
    shade = 0.5 + 0.5 * line["attention_dropped"] / layers
    return STYLES[line["variant"]] | {"alpha": shade if line["variant"] == "llmdrop" else 1}


def by_workload(
    result: Mapping[str, Any],
    lines: Lines,
    axes: Axes,
    x: Callable[[Mapping[str, Any]], float],
    y: Callable[[Mapping[str, Any]], float],
) -> None:
    """A curve for each contender, over workloads whose x multiplies from one to the next."""
    for name in dict.fromkeys(each["contender"] for each in lines):
        curve = sorted((each for each in lines if each["contender"] == name), key=x)
        axes.plot([*map(x, curve)], [*map(y, curve)], label=name, **style_of(curve[0], result["layers"]))
    axes.set_ylim(bottom=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def decode_by_context(result: Mapping[str, Any], axes: Axes) -> None:
    """Decode tokens per second where the context grows."""
    lines = result["lines"]
    by_workload(
        result, lines, axes, lambda each: each["workload"]["prompt_tokens"], lambda each: each["decode_tokens_per_s"]
    )
    batch = lines[0]["workload"]["batch"]
    axes.set(xlabel="context, tokens", ylabel="decode, tokens/s", title=f"{result['shape']}: {batch} requests at once")


def latency_by_load(result: Mapping[str, Any], axes: Axes) -> None:
    """Median time per output token of the paper's requests."""
    paper = lines_of(result, "throughput", PAPER.name)
    by_workload(
        result, paper, axes, lambda each: each["workload"]["batch"], lambda each: 1e3 * each["tpot_s"]["median"]
    )
    axes.set(xlabel="requests at once", ylabel="time per output token, ms (median)", title=result["shape"])


def ttft_under_load(result: Mapping[str, Any], axes: Axes) -> None:
    """Median and 95th percentile of the time to first token by the rate of requests, and the rate served at most."""
    for name in dict.fromkeys(each["contender"] for each in result["lines"]):
        lines = [each for each in result["lines"] if each["contender"] == name]
        style = style_of(lines[0], result["layers"])
        at_once = [each for each in lines if each["rate_per_s"] is None]
        at_rates = sorted((each for each in lines if each not in at_once), key=lambda each: each["rate_per_s"])
        for part, look in {"median": {}, "p95": {"markerfacecolor": "white", "linewidth": 0.8}}.items():
            points = [(each["rate_per_s"], 1e3 * each["ttft_s"][part]) for each in at_rates]
            axes.plot(*zip(*points, strict=True), label=f"{name}: {part}", **style | look)
        for each in at_once:
            axes.axvline(each["requests_per_s"], color=style["color"], linestyle=":", label=f"{name}: served at most")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    fits, workload = result["requests_that_fit"], result["workload"]
    axes.set(xlabel="requests sent per second", ylabel="time to first token, ms")
    axes.set_title(
        f"{result['shape']}: requests of {workload['prompt_tokens']} + {workload['output_tokens']} tokens; the same KV "
        f"memory holds {' or '.join(map(str, fits.values()))}",
        fontsize=13,
    )


def sequences_that_fit(result: Mapping[str, Any], axes: Axes) -> None:
    """Bars: measured capacity in tokens as a share of the full model's, with and without the mask."""
    lines = [each for each in result["capacity"] if "padding_layers" in each and each["mask"] != "full"][::-1]
    names = [f"{each['shape']}, {each['mask']}" for each in lines]
    axes.barh(names, [each["gain_measured"] for each in lines], color=STYLES["llmdrop"]["color"])
    for place, each in enumerate(lines):
        padded = f", {each['padding_layers']} layers of padding" if each["padding_layers"] else ""
        axes.text(each["gain_measured"] + 0.02, place, f"{each['gain_measured']:.2f}x{padded}", va="center")
    axes.axvline(1, **{**STYLES["vLLM"], "marker": ""}, label="vLLM, full model")
    axes.set_xlim(0, 1.35 * max(each["gain_measured"] for each in lines))
    axes.set(
        xlabel="requests that fit into the same KV cache memory, full model = 1", title="KV cache capacity, measured"
    )


def loss_by_position(result: Mapping[str, Any], axes: Axes) -> None:
    """Perplexity above the full models', a curve for each choice of half of the layers that see 1,024 tokens, with the
    first ones in sight and without.
    """
    for colour, model in enumerate(dict.fromkeys(each["model"] for each in result["points"])):
        points = [each for each in result["points"] if each["model"] == model]
        full = next(each for each in points if each["way"] == "full")["perplexity"]
        spans = [each for each in full if int(each.partition("-")[0]) >= WINDOW]
        shown = [each for each in points if each["way"].endswith(SHOWN) and "needles" not in each["way"]]
        for each, marker in zip(shown, "osD^", strict=False):
            rises = [100 * (each["perplexity"][span] / full[span] - 1) for span in spans]
            label = f"{model.partition('-')[0]}: {each['way'].replace(f', 50%, W {WINDOW}', '')}"
            axes.plot(spans, rises, label=label, marker=marker, color=f"C{colour}", alpha=1 if marker == "^" else 0.5)
    axes.axhline(5, color="#777777", linestyle=":", label="5%")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="position in the text, tokens", ylabel="perplexity above the full model's, %")
    axes.set_title(f"half of the layers see the last {WINDOW:,} tokens: which half, and what else is in sight")


def capacity_and_quality(result: Mapping[str, Any], axes: Axes) -> None:
    """What each contender holds in the same memory, and what it costs."""
    points = result["points"]
    full = points[0]
    for place, each in enumerate(points):
        rise = 100 * (each["perplexity"] / full["perplexity"] - 1)
        found = f"{each['contender']}: {each['needles']:.0%} found"
        axes.plot(each["fits"], max(rise, 0.1), "osD^vP"[place % 6], markersize=11, color=f"C{place}", label=found)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel=f"requests of {result['context']:,} tokens that fit", ylabel="perplexity above the full model's, %")
    memory = f"{result['kv_bytes'] / 2**30:g} GiB of KV cache"
    axes.set_title(
        f"{full['model']}, {memory}, and numbers in the text that are found (0.1% stands for less)", fontsize=13
    )


def answers_and_capacity(result: Mapping[str, Any], axes: Axes) -> None:
    """What each variant answers right, and how many requests it leaves room for."""
    variants = [each for each in result["variants"] if each["tasks"]]
    task = next(iter(variants[0]["tasks"]))
    for place, each in enumerate(variants):
        share, error = each["tasks"][task]
        style = {"fmt": "osD^vP"[place % 6], "color": f"C{place}", "label": each["label"]}
        axes.errorbar(each["requests"], 100 * share, yerr=100 * error, markersize=10, capsize=3, **style)
    memory = f"weights and KV cache in {result['memory_bytes'] / 2**30:g} GiB"
    axes.set(
        xlabel=f"requests of {result['context']:,} tokens that fit",
        ylabel="HumanEval, problems solved, %",
        ylim=(0, 100),
    )
    axes.set_title(f"{result['model']}, {memory}", fontsize=13)


def drops_differ(result: Mapping[str, Any]) -> bool:
    """Whether one workload was measured at three numbers of attention sublayers dropped or more."""
    lines = lines_of(result, "throughput")
    return len({each["label"] for each in lines}) == 1 and len({each["attention_dropped"] for each in lines}) > 2


def batches_differ(result: Mapping[str, Any]) -> bool:
    """Whether the paper's requests were measured in several numbers at once."""
    return len({each["workload"]["batch"] for each in lines_of(result, "throughput", PAPER.name)}) > 1


def is_of_windows(result: Mapping[str, Any]) -> bool:
    """Whether a model was measured with windows."""
    points = result.get("points")
    return isinstance(points, list) and any("needle" in each for each in points)


# What a picture's name ends in, what it needs, how it is painted, and whether a result has what it needs.
PICTURES: tuple[
    tuple[str, str, Callable[[Mapping[str, Any], Axes], None], Callable[[Mapping[str, Any]], bool]], ...
] = (
    ("speedup", "a run with --table paper", speedup_by_dropped, drops_differ),
    ("context", "a run with --contexts", decode_by_context, lambda r: bool(lines_of(r, "throughput", "context"))),
    ("latency", "a run over all workloads", latency_by_load, batches_differ),
    ("ttft", "a run of load.py", ttft_under_load, lambda r: any(each["rate_per_s"] for each in lines_of(r, "load"))),
    ("position", "a run of windows.py", loss_by_position, is_of_windows),
    ("capacity", "a run of windows_served.py", capacity_and_quality, lambda r: "step_tokens" in r),
    ("answers", "a run of quantized.py", answers_and_capacity, lambda r: "variants" in r),
    ("fits", "a run of kv_capacity.py", sequences_that_fit, lambda r: r.get("benchmark") == "kv_capacity"),
)


def draw(results: Mapping[str, Mapping[str, Any]], out: Path) -> list[Path]:
    """A picture for each result that has what one needs, named after both."""
    drawn = []
    for picture, needed, paint, suits in PICTURES:
        suitable = {name: result for name, result in results.items() if suits(result)}
        if not suitable:
            print(f"no {picture} picture: it needs {needed}")
        for name, result in suitable.items():
            with styled():
                figure = Figure(figsize=(9.1, 6.2), layout="constrained")
                paint(result, figure.subplots())
                # Below the axes, where it covers nothing.
                labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
                figure.legend(loc="outside lower center", ncols=2, fontsize=10 if max(map(len, labels)) > 50 else None)
                figure.text(0.995, 0.005, result["machine"], ha="right", va="bottom", fontsize=8, color="#777777")
                drawn.append(out / f"{name}-{picture}.svg")
                write_atomically(drawn[-1], as_svg(figure))
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    with ending("plots"):
        results = {path.stem: read(path) for path in sorted(args.results.glob("*.json"))}
        print(json.dumps({"pictures": [str(path) for path in draw(results, args.out)]}))


def read(path: Path) -> Mapping[str, Any]:
    """A result file, whatever benchmark wrote it."""
    try:
        found = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; expected the object that a benchmark wrote")
    return found


if __name__ == "__main__":
    main()
