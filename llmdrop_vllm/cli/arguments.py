"""The whole command line of `llmdrop`: its commands, and the options that each of them takes."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llmdrop_vllm.cli import options, values
from llmdrop_vllm.cli.options import flag, option, take
from llmdrop_vllm.fetching.wheels import MODELS as FETCHABLE
from llmdrop_vllm.masks.dialects import ON_DISK
from llmdrop_vllm.quantizing.schemes import SCHEMES
from llmdrop_vllm.versions import __version__

MODULE, MEASURING = "llmdrop_vllm.cli.commands", "llmdrop_vllm.cli.evaluation_commands"
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
    for commands_of in (_add_choosing, _add_writing, _add_saying, _add_measuring, _add_sweeping, _add_showing):
        commands_of(add)
    return top


def _add_choosing(add: Add) -> None:
    score = add("score", "measure the importance of every sublayer and block", "llmdrop score MODEL --out scores.json")
    take(score, options.model, options.windows, partial(options.file, what="the scores"))
    take(score, options.calibration, options.importance, options.precision)

    select = add("select", "choose a mask by scores", "llmdrop select scores.json --attention 8 --out mask.json")
    option(select, "scores SCORES", "what `llmdrop score` wrote", Path)
    take(select, partial(options.file, what="the mask"), options.selection)
    option(select, "--model", "for --iterative: the scored model, if it has moved")
    option(select, "--device", "for --iterative: cpu or cuda; default a GPU where there is one")

    example = "llmdrop search MODEL --answers answers.jsonl --attention 8 --out mask.json"
    search = add("search", "find a mask by what it does to the model's answers", example, SEARCHING)
    take(search, options.model, partial(options.file, what="the mask"))
    what = "what `llmdrop answers` wrote; with --window long texts, as --data of `llmdrop windows`"
    option(search, "--answers FILE", what, Path, required=True)
    option(search, "--attention N", "attention sublayers to drop", int, default=0)
    option(search, "--mlp N", "MLP sublayers to drop (0, or for a goal any number)", int)
    what = "for a goal: attention may also stay and see a text's first tokens and so many last ones"
    option(search, "--window TOKENS", what, values.count)
    option(search, "--fixed 25,26", "attentions that go in any case", values.layers, default=())
    option(search, "--protect 0,1,31", "layers that keep everything", values.layers, default=())
    what = "pipeline stages that the model will be served in, each with an attention (1)"
    option(search, "--pipeline-parallel-size N", what, values.count, default=1)
    option(search, "--seed", "of the evolution", int, default=0)
    what = "what `llmdrop score` wrote, for cosine's mask; default: scored on the answers"
    option(search, "--scores FILE", what, Path)
    take(search, options.wanted, options.search)
    finals = search.add_argument_group("tasks that decide in the end")
    options.tasks(finals, "lm-eval tasks, which the best by KL are tried on, in vLLM")
    option(finals, "--finalists N", "masks that are tried (8)", values.count)
    search.set_defaults(after_healing=False)  # of the scores, which are for cosine's mask
    options.precision(search)

    example = "llmdrop windows MODEL --window 1024 --count 14 --out mask.json"
    windows = add("windows", "choose layers whose attention needs a window only, by long texts", example, SEARCHING)
    take(windows, options.model, partial(options.file, what="the mask"))
    what = "how many last tokens they see at least, beside the first ones of a text"
    option(windows, "--window TOKENS", what, values.count, required=True)
    option(windows, "--count N", "layers with windows", values.count)
    options.wanted(windows, "windows as it takes, in place of --count")
    options.calibration(windows, "6", "four windows, or the model's context")
    options.precision(windows)


def _add_writing(add: Add) -> None:
    drop = add("drop", "score, select and apply in one go", "llmdrop drop MODEL OUT --attention 8 --heal", HEALING)
    take(drop, options.model, options.windows, options.directory, options.selection, options.calibration)
    take(drop, options.importance, options.precision, options.output)
    what = "heal what remains, on the full model's own answers to our prompts, or on DATA as for `llmdrop heal`"
    option(drop, "--heal DATA", what, nargs="?", const="answers")
    options.healing(drop)
    what = "choose attention and MLPs by KL on answers: those of --heal, or the full model's to our prompts"
    flag(drop, "--search", what)
    options.search(drop)
    flag(drop, "--evaluate", "measure OUT against MODEL in the end, into its llmdrop_evaluation.json")

    apply = add("apply", "write the checkpoint that a mask leaves", "llmdrop apply MODEL OUT --mask mask.json")
    take(apply, options.model, options.directory, options.mask, options.output)

    example = "llmdrop heal DROPPED OUT --teacher MODEL --data answers.jsonl"
    heal = add("heal", "refit what remains of a dropped model to the full one's work", example, HEALING)
    take(heal, options.model, options.replaced)
    option(heal, "--teacher MODEL", "the full model that it was dropped from", required=True)
    take(heal, options.calibration, options.precision, options.healing)

    example = "llmdrop quantize DROPPED OUT --scheme w4a16 --data answers.jsonl"
    quantize = add("quantize", "quantize what remains, by llm-compressor", example)
    take(quantize, options.model, options.replaced)
    schemes = "; ".join(f"{name}: {scheme.what}" for name, scheme in SCHEMES.items())
    option(quantize, "--scheme", schemes, choices=SCHEMES, required=True)
    what = "inputs that share a scale in w4a16 (the largest of 128, 64 and 32 that divides all)"
    option(quantize, "--group-size N", what, values.count)
    options.calibration(quantize, "64", "512", ", or 'none' for rounding to the nearest")


def _add_saying(add: Add) -> None:
    example = "llmdrop inspect MODEL --attention 25,26 --memory 80GiB"
    inspect = add("inspect", "show what is dropped, or would be, and what that saves", example)
    take(inspect, options.model, options.mask)
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
    take(convert, options.model, options.replaced)
    option(convert, "--dialect", "(the checkpoint's own)", choices=ON_DISK)
    flag(convert, "--renumber", options.RENUMBER)

    example = "llmdrop adapter DROPPED OUT --lora ADAPTER"
    adapter = add("adapter", "take out of a full model's LoRA what a dropped one has no place for", example)
    take(adapter, options.model, options.directory)
    option(adapter, "--lora ADAPTER", "its directory, as PEFT writes it", Path, required=True)


def _add_measuring(add: Add) -> None:
    example = "llmdrop answers MODEL answers.jsonl --prompts requests.jsonl --per-prompt 2"
    answers = add("answers", "have the full model answer prompts, to heal and judge with", example, MEASURING)
    options.model(answers)
    option(answers, "out OUT", "the file of answers (JSONL)", Path)
    group = answers.add_argument_group("prompts and answers")
    what = "JSONL: a string, a chat (list of messages) or a logged OpenAI request a line (ours, of many kinds)"
    option(group, "--prompts FILE", what, Path)
    option(group, "--samples N", "prompts, drawn by the seed (all)", values.count)
    option(group, "--max-tokens N", "of each answer (256)", values.count, default=256)
    option(group, "--per-prompt N", "answers to each prompt (1)", values.count, default=1)
    option(group, "--temperature T", "0 for the most likely tokens (0.8)", float, default=0.8)
    option(group, "--seed", "of prompts and answers", int, default=0)
    option(group, "--held-out 10%", "share of the prompts that is for judging only (10%%)", values.share, default=0.1)
    options.engine(answers)
    flag(answers, "--overwrite", "replace OUT")

    example = "llmdrop evaluate MODEL --attention 25,26 --tasks arc_easy,gsm8k --out dropped.json"
    evaluate = add("evaluate", "measure what is left of a model's quality under a mask", example, MEASURING)
    take(evaluate, options.model, partial(options.file, what="the measurements"), options.mask, options.measures)
    what = "the full model, where MODEL is dropped already: agreement and KL are to its answers"
    option(evaluate, "--full MODEL", what)


def _add_sweeping(add: Add) -> None:
    example = "llmdrop sweep MODEL --tasks arc_easy,gsm8k"
    sweep = add("sweep", "measure quality and speed of many masks", example, MEASURING)
    take(sweep, options.model, options.windows, options.results)
    masks = sweep.add_argument_group("masks")
    what = "attention, mlp, blocks, joint, consecutive, last, last-but-one, reverse, random:SEEDS; the last four "
    what += "also as in last/blocks (default: each of them once, random:3)"
    option(masks, "--series A,B", what, values.names, default=())
    option(masks, "--counts 1,2,4", "sublayers to drop (1/12 to 2/3 of them)", values.layers, default=())
    options.measures(sweep)
    speed = sweep.add_argument_group("speed, in the engine, without HTTP")
    option(speed, "--requests N", "at once (8)", values.count, default=8)
    option(speed, "--prompt-tokens N", "of each (128)", values.count, default=128)
    option(speed, "--output-tokens N", "of each (32)", values.count, default=32)
    flag(speed, "--no-speed", "quality only")
    option(sweep, "--scores FILE", "what `llmdrop score` wrote; default: scored anew", Path)
    take(sweep, options.calibration, options.importance)

    example = "llmdrop recommend MODEL --kv-budget 50% --out mask.json"
    recommend = add("recommend", "the mask of a sweep that meets a goal with the least loss", example, MEASURING)
    take(recommend, options.model, options.results)
    goal = recommend.add_argument_group("goal (several must be met together)")
    what = "of the full model's score in the worse of multiple choice and generation, or without tasks of perplexity"
    option(goal, "--max-loss 1%", what, values.share)
    option(goal, "--kv-budget 50%", "KV cache, as a share of the full model's", values.share)
    what = "as the sweep measured it; with --answers, of decoding by the bytes it reads"
    option(goal, "--speedup 1.3", what, values.factor)
    take(recommend, partial(options.file, what="the mask", required=False))
    what = "search by the model's answers in this file of `llmdrop answers`, not among the points of a sweep"
    option(recommend, "--answers FILE", what, Path)


def _add_showing(add: Add) -> None:
    example = "llmdrop compare HEALED --full MODEL"
    compare = add("compare", "record what the full, the dropped and the healed model answer", example, MEASURING)
    take(compare, options.model, options.mask)
    option(compare, "--full MODEL", "the full model, where MODEL is dropped already")
    what = "JSONL, a question (a string) a line (ours; the first ones are never healed on)"
    option(compare, "--prompts FILE", what, Path)
    option(compare, "--samples N", "its first N questions (6)", values.count, default=6)
    option(compare, "--max-tokens N", "of each answer (96)", values.count, default=96)
    option(compare, "--out FILE", "(in MODEL, where the page of its server finds it)", Path)
    flag(compare, "--overwrite", "replace FILE")
    options.engine(compare)

    report = add("report", "draw a sweep: one HTML file and its pictures", "llmdrop report MODEL", MEASURING)
    take(report, options.model, options.results)
    often = {"action": "append", "default": []}
    option(report, "--scores FILE", "scores of another calibration set, to compare (repeatable)", Path, **often)
    what = "what `llmdrop evaluate` wrote of a point once it was healed, or of another mask (repeatable)"
    option(report, "--healed FILE", what, Path, **often)
    option(report, "--search FILE", "the trials of `llmdrop search`, to draw what it judged", Path)
    option(report, "--compared FILE", "what `llmdrop compare` wrote, to show the answers", Path)
