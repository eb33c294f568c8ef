"""The whole command line of `llmdrop`: its commands, and the options that each of them takes."""

import argparse
from collections.abc import Callable
from pathlib import Path

from llmdrop_vllm.cli import options, values
from llmdrop_vllm.cli.options import flag, option
from llmdrop_vllm.fetching.wheels import MODELS as FETCHABLE
from llmdrop_vllm.masks.dialects import ON_DISK
from llmdrop_vllm.quantizing.schemes import SCHEMES
from llmdrop_vllm.versions import __version__

MODULE, MEASURING = "llmdrop_vllm.cli.commands", "llmdrop_vllm.cli.evaluation_commands"
QUANTIZING = "llmdrop_vllm.cli.quantizing_commands"
HEALING, SEARCHING = "llmdrop_vllm.cli.healing_commands", "llmdrop_vllm.cli.search_commands"
DOCTOR = "llmdrop_server.doctor"
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
        command.set_defaults(module=module, refuse=command.error)
        return command

    add("serve", "serve a model with vLLM, its page and its bounds", "llmdrop serve MODEL --drop-attention 25,26")
    add("doctor", "say whether masks can be served here: ten lines for an issue", "llmdrop doctor", DOCTOR)
    fetch = add("fetch", "get a model: by its short name, from the hub or from a GGUF file", "llmdrop fetch smollm2")
    option(fetch, "what NAME", f"{', '.join(FETCHABLE)}, a hub id or a .gguf file")
    option(fetch, "out DIR", "where to (without: the cache, LLMDROP_CACHE)", Path, nargs="?")
    flag(fetch, "--overwrite", "replace DIR, if it is a checkpoint")
    _add_choosing(add)
    _add_searching(add)
    _add_dropping(add)
    _add_writing(add)
    _add_saying(add)
    _add_measuring(add)
    _add_showing(add)
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
    option(select, "scores SCORES", "what `llmdrop score` wrote", Path)
    options.add_file(select, "the mask")
    options.add_selection(select)
    option(select, "--model", "for --iterative: the scored model, if it has moved")
    option(select, "--device", "for --iterative: cpu or cuda; default a GPU where there is one")


def _add_searching(add: Add) -> None:
    example = "llmdrop search MODEL --answers answers.jsonl --attention 8 --out mask.json"
    search = add("search", "find a mask by what it does to the model's answers", example, SEARCHING)
    options.add_model(search)
    options.add_file(search, "the mask")
    what = "what `llmdrop answers` wrote; with --window long texts, as --data of `llmdrop windows`"
    option(search, "--answers FILE", what, Path, required=True)
    option(search, "--attention N", "attention sublayers to drop", int, default=0)
    what = "MLP sublayers to drop (0, or for a goal any number)"
    option(search, "--mlp N", what, int)
    what = "for a goal: attention may also stay and see a text's first tokens and so many last ones"
    option(search, "--window TOKENS", what, values.count)
    option(search, "--fixed 25,26", "attentions that go in any case", values.layers, default=())
    option(search, "--protect 0,1,31", "layers that keep everything", values.layers, default=())
    what = "pipeline stages that the model will be served in, each with an attention (1)"
    option(search, "--pipeline-parallel-size N", what, values.count, default=1)
    option(search, "--seed", "of the evolution", int, default=0)
    what = "what `llmdrop score` wrote, for cosine's mask; default: scored on the answers"
    option(search, "--scores FILE", what, Path)
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
    option(windows, "--window TOKENS", what, values.count, required=True)
    option(windows, "--count N", "layers with windows", values.count)
    options.add_wanted(windows, "windows as it takes, in place of --count")
    options.add_calibration(windows, "6", "four windows, or the model's context")
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
    what = "heal what remains, on the full model's own answers to our prompts, or on DATA as for `llmdrop heal`"
    option(drop, "--heal DATA", what, nargs="?", const="answers")
    options.add_healing(drop)
    what = "choose attention and MLPs by KL on answers: those of --heal, or the full model's to our prompts"
    flag(drop, "--search", what)
    options.add_search(drop)
    flag(drop, "--evaluate", "measure OUT against MODEL in the end, into its llmdrop_evaluation.json")


def _add_writing(add: Add) -> None:
    apply = add("apply", "write the checkpoint that a mask leaves", "llmdrop apply MODEL OUT --mask mask.json")
    options.add_model(apply)
    options.add_directory(apply)
    options.add_mask(apply)
    options.add_output(apply)

    example = "llmdrop heal DROPPED OUT --teacher MODEL --data answers.jsonl"
    heal = add("heal", "refit what remains of a dropped model to the full one's work", example, HEALING)
    options.add_model(heal)
    options.add_directory(heal, may_replace=True)
    option(heal, "--teacher MODEL", "the full model that it was dropped from", required=True)
    options.add_calibration(heal)
    options.add_precision(heal)
    options.add_healing(heal)

    example = "llmdrop quantize DROPPED OUT --scheme w4a16 --data answers.jsonl"
    quantize = add("quantize", "quantize what remains, by llm-compressor", example, QUANTIZING)
    options.add_model(quantize)
    options.add_directory(quantize, may_replace=True)
    schemes = "; ".join(f"{name}: {scheme.what}" for name, scheme in SCHEMES.items())
    option(quantize, "--scheme", schemes, choices=SCHEMES, required=True)
    what = "inputs that share a scale in w4a16 (the largest of 128, 64 and 32 that divides all)"
    option(quantize, "--group-size N", what, values.count)
    options.add_calibration(quantize, "64", "512", ", or 'none' for rounding to the nearest")


def _add_saying(add: Add) -> None:
    example = "llmdrop inspect MODEL --attention 25,26 --memory 80GiB"
    inspect = add("inspect", "show what is dropped, or would be, and what that saves", example)
    options.add_model(inspect)
    options.add_mask(inspect)
    option(inspect, "--memory", "memory for weights and KV cache (80GiB)", values.memory, default=80 * 2**30)
    option(inspect, "--kv-dtype DTYPE", "float32, bfloat16, float16 or fp8; default the model's")
    what = "that keep the model's dtype, as vLLM's --kv-cache-dtype-skip-layers has it"
    option(inspect, "--kv-dtype-skip-layers LAYERS", what, values.layers, default=())
    option(inspect, "--context N", "of a request (8192, or the model's)", values.count)
    what = "tokens of prompts that the engine computes together, which windows hold too (2048)"
    option(inspect, "--max-num-batched-tokens N", what, values.count)
    flag(inspect, "--json", "for machines")

    example = "llmdrop convert MODEL OUT --dialect transformers"
    convert = add("convert", "say a checkpoint's mask in another dialect, or give its layers new numbers", example)
    options.add_model(convert)
    options.add_directory(convert, may_replace=True)
    option(convert, "--dialect", "(the checkpoint's own)", choices=ON_DISK)
    flag(convert, "--renumber", options.RENUMBER)

    example = "llmdrop adapter DROPPED OUT --lora ADAPTER"
    adapter = add("adapter", "take out of a full model's LoRA what a dropped one has no place for", example)
    options.add_model(adapter)
    options.add_directory(adapter)
    option(adapter, "--lora ADAPTER", "its directory, as PEFT writes it", Path, required=True)


def _add_measuring(add: Add) -> None:
    example = "llmdrop answers MODEL answers.jsonl --prompts requests.jsonl --per-prompt 2"
    answers = add("answers", "have the full model answer prompts, to heal and judge with", example, MEASURING)
    options.add_model(answers)
    option(answers, "out OUT", "the file of answers (JSONL)", Path)
    options.add_questions(answers)
    options.add_engine(answers)
    flag(answers, "--overwrite", "replace OUT")

    example = "llmdrop evaluate MODEL --attention 25,26 --tasks arc_easy,gsm8k --out dropped.json"
    evaluate = add("evaluate", "measure what is left of a model's quality under a mask", example, MEASURING)
    options.add_model(evaluate)
    options.add_file(evaluate, "the measurements")
    options.add_mask(evaluate)
    options.add_measures(evaluate)
    what = "the full model, where MODEL is dropped already: agreement and KL are to its answers"
    option(evaluate, "--full MODEL", what)

    example = "llmdrop sweep MODEL --tasks arc_easy,gsm8k"
    sweep = add("sweep", "measure quality and speed of many masks", example, MEASURING)
    options.add_model(sweep)
    options.add_windows(sweep)
    options.add_results(sweep)
    options.add_series(sweep)
    options.add_measures(sweep)
    options.add_speed(sweep)
    option(sweep, "--scores FILE", "what `llmdrop score` wrote; default: scored anew", Path)
    options.add_calibration(sweep)
    options.add_importance(sweep)

    example = "llmdrop recommend MODEL --kv-budget 50% --out mask.json"
    recommend = add("recommend", "the mask of a sweep that meets a goal with the least loss", example, MEASURING)
    options.add_model(recommend)
    options.add_results(recommend)
    options.add_goal(recommend)
    what = "search by the model's answers in this file of `llmdrop answers`, not among the points of a sweep"
    option(recommend, "--answers FILE", what, Path)


def _add_showing(add: Add) -> None:
    example = "llmdrop compare HEALED --full MODEL"
    compare = add("compare", "record what the full, the dropped and the healed model answer", example, MEASURING)
    options.add_model(compare)
    options.add_mask(compare)
    option(compare, "--full MODEL", "the full model, where MODEL is dropped already")
    what = "JSONL, a question (a string) a line (ours; the first ones are never healed on)"
    option(compare, "--prompts FILE", what, Path)
    option(compare, "--samples N", "its first N questions (6)", values.count, default=6)
    option(compare, "--max-tokens N", "of each answer (96)", values.count, default=96)
    option(compare, "--out FILE", "(in MODEL, where the page of its server finds it)", Path)
    flag(compare, "--overwrite", "replace FILE")
    options.add_engine(compare)

    report = add("report", "draw a sweep: one HTML file and its pictures", "llmdrop report MODEL", MEASURING)
    options.add_model(report)
    options.add_results(report)
    for name, what in {
        "scores": "scores of another calibration set, to compare (repeatable)",
        "healed": "what `llmdrop evaluate` wrote of a point once it was healed, or of another mask (repeatable)",
    }.items():
        option(report, f"--{name} FILE", what, Path, action="append", default=[])
    option(report, "--search FILE", "the trials of `llmdrop search`, to draw what it judged", Path)
    option(report, "--compared FILE", "what `llmdrop compare` wrote, to show the answers", Path)
