"""The whole command line of `llmdrop`: its commands, and the options that each of them takes."""

import argparse
from collections.abc import Callable
from pathlib import Path

from llmdrop_vllm import __version__
from llmdrop_vllm.cli import options, values
from llmdrop_vllm.fetching.models import MODELS as FETCHABLE
from llmdrop_vllm.masks.dialects import ON_DISK
from llmdrop_vllm.quantizing.schemes import SCHEMES

MODULE, MEASURING = "llmdrop_vllm.cli.commands", "llmdrop_vllm.cli.evaluation_commands"
QUANTIZING = "llmdrop_vllm.cli.quantizing_commands"
HEALING, SEARCHING = "llmdrop_vllm.cli.healing_commands", "llmdrop_vllm.cli.search_commands"
ADAPTERS = "llmdrop_vllm.cli.adapter_commands"
Add = Callable[..., options.Parser]


def parser() -> options.Parser:
    """The whole command line."""
    summary = "Find what to drop in a checkpoint, write the smaller one, and say what it saves."
    top = argparse.ArgumentParser(prog="llmdrop", description=summary)
    top.add_argument("--version", action="version", version=f"llmdrop-vllm {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, example: str, module: str = MODULE) -> options.Parser:
        """A command with its summary, and an example that stands in its help; `module` holds what runs it."""
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(module=module)
        return command

    add("serve", "serve a model with vLLM, its page and its bounds", "llmdrop serve MODEL --drop-attention 25,26")
    fetch = add("fetch", "get a model: by its short name, from the hub or from a GGUF file", "llmdrop fetch smollm2")
    fetch.add_argument("what", metavar="NAME", help=f"{', '.join(FETCHABLE)}, a hub id or a .gguf file")
    fetch.add_argument("out", type=Path, nargs="?", metavar="DIR", help="where to (without: the cache, LLMDROP_CACHE)")
    fetch.add_argument("--overwrite", action="store_true", help="replace DIR, if it is a checkpoint")
    _add_choosing(add)
    _add_searching(add)
    _add_dropping(add)
    _add_writing(add)
    _add_saying(add)
    _add_measuring(add)
    return top


def _add_choosing(add: Add) -> None:
    score = add("score", "measure the importance of every sublayer and block", "llmdrop score MODEL --out scores.json")
    options.add_model(score)
    options.add_windows(score)
    options.add_file(score, "the scores")
    options.add_calibration(score)
    options.add_importance(score)
    options.add_precision(score)

    select = add("select", "choose a mask by scores", "llmdrop select scores.json --attention 8 --out mask.json")
    select.add_argument("scores", type=Path, metavar="SCORES", help="what `llmdrop score` wrote")
    options.add_file(select, "the mask")
    options.add_selection(select)
    select.add_argument("--model", help="for --iterative: the scored model, if it has moved")
    select.add_argument("--device", help="for --iterative: cpu or cuda; default a GPU where there is one")


def _add_searching(add: Add) -> None:
    example = "llmdrop search MODEL --answers answers.jsonl --attention 8 --out mask.json"
    search = add("search", "find a mask by what it does to the model's answers", example, SEARCHING)
    options.add_model(search)
    options.add_file(search, "the mask")
    search.add_argument("--answers", type=Path, required=True, metavar="FILE", help="what `llmdrop answers` wrote")
    search.add_argument("--attention", type=int, default=0, metavar="N", help="attention sublayers to drop")
    what = "MLP sublayers to drop (0, or for a goal any number)"
    search.add_argument("--mlp", type=int, metavar="N", help=what)
    search.add_argument(
        "--fixed", type=values.layers, default=(), metavar="25,26", help="attentions that go in any case"
    )
    search.add_argument(
        "--protect", type=values.layers, default=(), metavar="0,1,31", help="layers that keep everything"
    )
    what = "pipeline stages that the model will be served in, each with an attention (1)"
    search.add_argument("--pipeline-parallel-size", type=values.count, default=1, metavar="N", help=what)
    search.add_argument("--seed", type=int, default=0, help="of the evolution")
    what = "what `llmdrop score` wrote, for cosine's mask; default: scored on the answers"
    search.add_argument("--scores", type=Path, metavar="FILE", help=what)
    options.add_wanted(search)
    options.add_search(search)
    options.add_finals(search)
    search.set_defaults(after_healing=False)  # of the scores, which are for cosine's mask
    options.add_precision(search)

    example = "llmdrop windows MODEL --window 1024 --count 14 --out mask.json"
    windows = add("windows", "choose layers whose attention needs a window only, by long texts", example, SEARCHING)
    options.add_model(windows)
    options.add_file(windows, "the mask")
    what = "how many last tokens they see at least, beside the first ones of a text"
    windows.add_argument("--window", type=values.count, required=True, metavar="TOKENS", help=what)
    windows.add_argument("--count", type=values.count, metavar="N", help="layers with windows")
    options.add_wanted(windows, "windows as it takes, in place of --count")
    options.add_calibration(windows)
    options.add_precision(windows)


def _add_dropping(add: Add) -> None:
    drop = add("drop", "score, select and apply in one go", "llmdrop drop MODEL OUT --attention 8 --heal", HEALING)
    options.add_model(drop)
    options.add_windows(drop)
    options.add_directory(drop)
    options.add_selection(drop)
    options.add_calibration(drop)
    options.add_importance(drop)
    options.add_precision(drop)
    options.add_output(drop)
    drop.add_argument(
        "--heal",
        nargs="?",
        const="answers",
        metavar="DATA",
        help="heal what remains, on the full model's own answers to our prompts, or on DATA as for `llmdrop heal`",
    )
    options.add_healing(drop)
    what = "choose attention and MLPs by KL on answers: those of --heal, or the full model's to our prompts"
    drop.add_argument("--search", action="store_true", help=what)
    options.add_search(drop)


def _add_writing(add: Add) -> None:
    apply = add("apply", "write the checkpoint that a mask leaves", "llmdrop apply MODEL OUT --mask mask.json")
    options.add_model(apply)
    options.add_directory(apply)
    options.add_mask(apply)
    options.add_output(apply)

    example = "llmdrop heal DROPPED OUT --teacher MODEL --data answers.jsonl"
    heal = add("heal", "refit what remains of a dropped model to the full one's work", example, HEALING)
    options.add_model(heal)
    options.add_directory(heal)
    heal.add_argument("--teacher", required=True, metavar="MODEL", help="the full model that it was dropped from")
    options.add_calibration(heal)
    options.add_precision(heal)
    options.add_healing(heal)
    heal.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a checkpoint")

    example = "llmdrop quantize DROPPED OUT --scheme w4a16 --data answers.jsonl"
    quantize = add("quantize", "quantize what remains, by llm-compressor", example, QUANTIZING)
    options.add_model(quantize)
    options.add_directory(quantize)
    schemes = "; ".join(f"{name}: {scheme.what}" for name, scheme in SCHEMES.items())
    quantize.add_argument("--scheme", choices=SCHEMES, required=True, help=schemes)
    what = "inputs that share a scale in w4a16 (the largest of 128, 64 and 32 that divides all)"
    quantize.add_argument("--group-size", type=values.count, metavar="N", help=what)
    options.add_calibration(quantize, "64", "512", ", or 'none' for rounding to the nearest")
    quantize.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a checkpoint")


def _add_saying(add: Add) -> None:
    inspect = add("inspect", "show what is dropped and what that saves", "llmdrop inspect OUT --memory 80GiB")
    options.add_model(inspect)
    memory = "memory for weights and KV cache (80GiB)"
    inspect.add_argument("--memory", type=values.memory, default=80 * 2**30, help=memory)
    inspect.add_argument("--kv-dtype", metavar="DTYPE", help="float32, bfloat16, float16 or fp8; default the model's")
    inspect.add_argument("--context", type=values.count, metavar="N", help="of a request (8192, or the model's)")
    what = "tokens of prompts that the engine computes together, which windows hold too (2048)"
    inspect.add_argument("--max-num-batched-tokens", type=values.count, metavar="N", help=what)
    inspect.add_argument("--json", action="store_true", help="for machines")

    example = "llmdrop convert MODEL OUT --dialect transformers"
    convert = add("convert", "say a checkpoint's mask in another dialect, or give its layers new numbers", example)
    options.add_model(convert)
    options.add_directory(convert)
    convert.add_argument("--dialect", choices=ON_DISK, help="(the checkpoint's own)")
    convert.add_argument("--renumber", action="store_true", help=options.RENUMBER)
    convert.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a checkpoint")

    example = "llmdrop adapter DROPPED OUT --lora ADAPTER"
    adapter = add("adapter", "take out of a full model's LoRA what a dropped one has no place for", example, ADAPTERS)
    options.add_model(adapter)
    options.add_directory(adapter)
    what = "its directory, as PEFT writes it"
    adapter.add_argument("--lora", type=Path, required=True, metavar="ADAPTER", help=what)


def _add_measuring(add: Add) -> None:
    example = "llmdrop answers MODEL answers.jsonl --prompts requests.jsonl --per-prompt 2"
    answers = add("answers", "have the full model answer prompts, to heal and judge with", example, MEASURING)
    options.add_model(answers)
    answers.add_argument("out", type=Path, metavar="OUT", help="the file of answers (JSONL)")
    options.add_questions(answers)
    options.add_engine(answers)
    answers.add_argument("--overwrite", action="store_true", help="replace OUT")

    example = "llmdrop evaluate MODEL --attention 25,26 --tasks arc_easy,gsm8k --out dropped.json"
    evaluate = add("evaluate", "measure what is left of a model's quality under a mask", example, MEASURING)
    options.add_model(evaluate)
    options.add_file(evaluate, "the measurements")
    options.add_mask(evaluate)
    options.add_measures(evaluate)
    evaluate.add_argument("--full", metavar="MODEL", help="the full model, where MODEL lacks the dropped weights")

    example = "llmdrop sweep MODEL --tasks arc_easy,gsm8k"
    sweep = add("sweep", "measure quality and speed of many masks", example, MEASURING)
    options.add_model(sweep)
    options.add_windows(sweep)
    options.add_results(sweep)
    options.add_series(sweep)
    options.add_measures(sweep)
    options.add_speed(sweep)
    sweep.add_argument("--scores", type=Path, metavar="FILE", help="what `llmdrop score` wrote; default: scored anew")
    options.add_calibration(sweep)
    options.add_importance(sweep)

    example = "llmdrop recommend MODEL --kv-budget 50% --out mask.json"
    recommend = add("recommend", "the mask of a sweep that meets a goal with the least loss", example, MEASURING)
    options.add_model(recommend)
    options.add_results(recommend)
    options.add_goal(recommend)
    what = "search by the model's answers in this file of `llmdrop answers`, not among the points of a sweep"
    recommend.add_argument("--answers", type=Path, metavar="FILE", help=what)

    report = add("report", "draw a sweep: one HTML file and its pictures", "llmdrop report MODEL", MEASURING)
    options.add_model(report)
    options.add_results(report)
    for name, what in {
        "scores": "scores of another calibration set, to compare (repeatable)",
        "healed": "what `llmdrop evaluate` wrote of a point once it was healed, or of another mask (repeatable)",
    }.items():
        report.add_argument(f"--{name}", type=Path, action="append", default=[], metavar="FILE", help=what)
    what = "the trials of `llmdrop search`, to draw what it judged"
    report.add_argument("--search", type=Path, metavar="FILE", help=what)
