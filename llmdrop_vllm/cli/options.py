"""Groups of options that the commands of `llmdrop` share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmdrop_vllm.cli.values import count, factor, json_object, layers, memory, minutes, named_layers, names, share
from llmdrop_vllm.masks.dialects import ON_DISK

OWN_TASKS = "llmdrop_humaneval, llmdrop_reasoning; of the embedded model: llmdrop_docstring, llmdrop_name"
RENUMBER = "layers that lose both sublayers go, and the others move up: an ordinary smaller model"
REPLACE = "replace OUT, if it is a checkpoint"
Parser = argparse.ArgumentParser
Group = argparse._ArgumentGroup


def option(to: Parser | Group, said: str, what: str, kind: Callable[[str], Any] = str, **others: Any) -> None:
    """An option as its help shows it: `--samples N`, and what is said of it; or an argument without a name."""
    name, _, shown = said.partition(" ")
    to.add_argument(name, metavar=shown or None, type=kind, help=what, **others)


def flag(to: Parser | Group, name: str, what: str) -> None:
    """One that is there or not."""
    to.add_argument(name, action="store_true", help=what)


def add_model(command: Parser) -> None:
    """What every command is about."""
    option(command, "model MODEL", "a checkpoint directory, a hub id or a name of `llmdrop fetch`")


def add_file(command: Parser, what: str, *, required: bool = True) -> None:
    """Where a command's JSON goes."""
    option(command, "--out FILE", f"file to write {what} to (JSON)", Path, required=required)
    flag(command, "--overwrite", "replace FILE")


def add_directory(command: Parser, *, may_replace: bool = False) -> None:
    """Where a command's checkpoint goes."""
    option(command, "out OUT", "the new checkpoint's directory", Path)
    if may_replace:
        flag(command, "--overwrite", REPLACE)


def add_results(command: Parser) -> None:
    """Where a sweep and what is made of it are kept."""
    option(command, "--results DIR", "directory of the sweep (MODEL's name with -llmdrop, here)", Path)


def add_mask(command: Parser) -> None:
    """A mask in a file, or as lists of layers."""
    mask = command.add_argument_group("mask (without any, the one in MODEL's config)")
    option(mask, "--mask FILE", "what `llmdrop select` wrote", Path)
    option(mask, "--attention 25,26", "layers whose attention goes; '25,' for one", named_layers, default=())
    option(mask, "--mlp 24,25", "layers whose MLP goes", named_layers, default=())
    add_windows(mask)
    flag(mask, "--other-model", "take a mask that was chosen for another model's weights")


def add_windows(to: Parser | Group) -> None:
    """Layers with windows, beside whatever the mask drops."""
    what = "layers whose attention sees a text's first tokens and the last --window"
    option(to, "--window-attention 3,5", what, layers, default=())
    option(to, "--window TOKENS", "how many at least, a token itself among them", int)


def add_calibration(
    command: Parser, samples: str = "256", seq_len: str = "2048, or the model's context", other: str = ""
) -> None:
    """What to score with; as much of it as is said, and what other data may be."""
    group = command.add_argument_group("calibration")
    what = "'embedded' text (default), a .txt, a .jsonl with a text field or of `llmdrop answers`, a .json list of "
    option(group, "--data", f"{what}token-id lists, or a `datasets` name, NAME[:CONFIG[:SPLIT]]{other}")
    option(group, "--samples N", f"sequences ({samples})", int)
    option(group, "--seq-len N", f"tokens in each ({seq_len})", int)
    # `select` has a seed of its own for --random; together they are one.
    if command.get_default("seed") is None:
        option(group, "--seed", "of the choice of sequences", int, default=0)


def add_importance(command: Parser) -> None:
    """By what sublayers are compared."""
    what = "importance is what healing leaves undone of a sublayer's work, not 1 - cosine similarity; takes longer"
    flag(command, "--after-healing", what)


def add_precision(command: Parser) -> None:
    """What to score on."""
    option(command, "--device", "cpu or cuda; default a GPU where there is one")
    option(command, "--dtype", "float32, bfloat16 or float16; default the checkpoint's")


def add_selection(command: Parser) -> None:
    """The methods of `llmdrop_vllm.selection.selection`."""
    group = command.add_argument_group("what to drop (several may be combined)")
    for name, what in {
        "attention": "the N least important attention sublayers",
        "mlp": "the N least important MLP sublayers",
        "blocks": "the N least important blocks (attention and MLP)",
        "consecutive": "the run of N blocks that changes the residual stream least",
        "joint": "the N least important sublayers, attention and MLP in one list",
        "last": "the N deepest",
        "random": "N at random (--seed), as a control",
        "least": "the N most important ones: reverse order, as a control",
    }.items():
        option(group, f"--{name} N", what, int)
    option(group, "--kv-budget 50%", "attention until the KV cache is at most this share")
    kinds = ("attention", "mlp", "blocks", "joint")
    option(group, "--kind", "for --last, --random, --least (attention)", choices=kinds)
    flag(group, "--keep-last-layer", "for --last: spare the very last layer")
    option(group, "--seed", "for --random", int, default=0)
    flag(group, "--iterative", "score again after each drop")
    option(group, "--protect 0,1,31", "layers that keep everything", layers, default=())
    option(group, "--mixers", "of a hybrid (all)", choices=("all", "attention", "recurrent"), default="all")
    flag(group, "--allow-padding", "never trade importance against KV cache padding")


def add_wanted(command: Parser, instead: str = "sublayers as it takes, in place of --attention") -> None:
    """What an owner wants, in place of a number of attentions."""
    group = command.add_argument_group(f"as many {instead}, for")
    option(group, "--kv-budget 50%", "a KV cache of at most this share", share)
    option(group, "--requests N", "so many requests of --context in --memory", count)
    option(group, "--decode-speedup 1.3", "decoding of --batch requests, by the bytes that it reads", factor)
    option(group, "--memory", "for weights and KV cache (80GiB)", memory, default=80 * 2**30)
    option(group, "--batch N", "requests that are decoded at once (8)", count, default=8)
    option(group, "--context N", "tokens of a request (8192, or the model's)", count)


def add_search(command: Parser) -> None:
    """How a mask is searched for."""
    group = command.add_argument_group("search")
    option(group, "--masks N", "to judge at most (400)", count)
    option(group, "--minutes N", "to judge them in at most (without an end)", minutes)
    option(group, "--tokens N", "of answers, to choose by (2048)", count)
    option(group, "--held-out-tokens N", "of held-out answers, to decide by (4096)", count)
    option(group, "--beam N", "masks that each greedy step keeps (1)", count)
    what = "heal after each greedy step, on so many tokens of answers (10000), and judge the next one on that"
    option(group, "--heal-aware TOKENS", what, count, nargs="?", const=10_000)


def add_finals(command: Parser) -> None:
    """How a search ends where KL is not to decide."""
    group = command.add_argument_group("tasks that decide in the end")
    add_tasks(group, "lm-eval tasks, which the best by KL are tried on, in vLLM")
    option(group, "--finalists N", "masks that are tried (8)", count)


def add_output(command: Parser) -> None:
    """How a checkpoint is written."""
    group = command.add_argument_group("output")
    option(group, "--dialect", "how the config says the mask (llm-drop)", choices=ON_DISK, default="llm-drop")
    how = group.add_mutually_exclusive_group()
    flag(how, "--portable", "keep the dropped weights, output projections zeroed")
    flag(how, "--config-only", "write the config and link to MODEL's weights")
    flag(group, "--renumber", RENUMBER)
    flag(group, "--overwrite", REPLACE)


def add_healing(command: Parser) -> None:
    """How what remains takes over the work of what is gone."""
    group = command.add_argument_group("healing")
    what = "refit attention's outputs behind the first layer that lost something as well (default), or nothing else"
    option(group, "--later", what, choices=("attention", "nothing"), default="attention")
    flag(group, "--train", "distil on the same data after the closed form")
    flag(group, "--train-only", "without it, such as where it was done before")
    option(group, "--epochs N", "of the training, at most (3)", float, default=3)
    option(group, "--learning-rate RATE", "its largest (2e-4)", float, default=2e-4)
    option(group, "--lora RANK", "train adapters, merged in the end, not full weights", count)
    what = "of the layers from the first drop on (mlp)"
    option(group, "--train-parts", what, choices=("mlp", "all"), default="mlp")
    option(group, "--log-dir DIR", "for TensorBoard", Path)


def add_questions(command: Parser) -> None:
    """What a model is asked, and how it answers."""
    group = command.add_argument_group("prompts and answers")
    what = "JSONL: a string, a chat (list of messages) or a logged OpenAI request a line (ours, of many kinds)"
    option(group, "--prompts FILE", what, Path)
    option(group, "--samples N", "prompts, drawn by the seed (all)", count)
    option(group, "--max-tokens N", "of each answer (256)", count, default=256)
    option(group, "--per-prompt N", "answers to each prompt (1)", count, default=1)
    option(group, "--temperature T", "0 for the most likely tokens (0.8)", float, default=0.8)
    option(group, "--seed", "of prompts and answers", int, default=0)
    option(group, "--held-out 10%", "share of the prompts that is for judging only (10%%)", share, default=0.1)


def add_measures(command: Parser) -> None:
    """What quality is measured by, and the engine that it is measured with."""
    group = command.add_argument_group("quality")
    what = "for perplexity: 'held-out' (default: text that the embedded model has not seen), a .txt, a .jsonl, "
    what += "a .json list of token-id lists, or a dataset's name as for --data"
    option(group, "--text DATA", what, default="held-out")
    option(group, "--context N", "tokens in a window (512)", count)
    option(group, "--windows N", "windows of text (32, or as many as there are)", count)
    option(group, "--divergence-tokens N", "for KL and agreement (4096); 0 for neither", int, default=4096)
    what = "compare next tokens on 'answers' of the full model to our prompts (default), on the 'text', or on the "
    option(group, "--divergence-on WHAT", f"{what}held-out answers of a file of `llmdrop answers`", default="answers")
    add_tasks(group, f"lm-eval tasks; ours: {OWN_TASKS}")
    add_engine(command)


def add_tasks(group: Group, what: str) -> None:
    """What a model is to answer, and how it is asked."""
    option(group, "--tasks A,B", what, names, default=())
    option(group, "--limit N", "rows of each task (all)", count)
    what = "ask through the chat template, or have texts completed; auto: as the task prefers and the model can"
    option(group, "--prompting", what, choices=("auto", "chat", "completion"), default="auto")
    what = "let tasks run the code that the model writes: in a process without network, files to write or others"
    flag(group, "--run-generated-code", what)


def add_engine(command: Parser) -> None:
    """The engine that models run in."""
    group = command.add_argument_group("engine")
    kinds = ("float32", "bfloat16", "float16")
    option(group, "--dtype", "default the checkpoint's, float32 on a CPU", choices=kinds)
    option(group, "--engine-args JSON", """for vLLM: '{"tensor_parallel_size": 2}'""", json_object, default={})
    command.set_defaults(device=None)


def add_series(command: Parser) -> None:
    """Which masks a sweep measures."""
    group = command.add_argument_group("masks")
    what = "attention, mlp, blocks, joint, consecutive, last, last-but-one, reverse, random:SEEDS; the last four "
    option(
        group, "--series A,B", f"{what}also as in last/blocks (default: each of them once, random:3)", names, default=()
    )
    option(group, "--counts 1,2,4", "sublayers to drop (1/12 to 2/3 of them)", layers, default=())


def add_speed(command: Parser) -> None:
    """The workload that speed is measured with."""
    group = command.add_argument_group("speed, in the engine, without HTTP")
    option(group, "--requests N", "at once (8)", count, default=8)
    option(group, "--prompt-tokens N", "of each (128)", count, default=128)
    option(group, "--output-tokens N", "of each (32)", count, default=32)
    flag(group, "--no-speed", "quality only")


def add_goal(command: Parser) -> None:
    """What a mask is wanted for."""
    group = command.add_argument_group("goal (several must be met together)")
    what = "of the full model's score in the worse of multiple choice and generation, or without tasks of perplexity"
    option(group, "--max-loss 1%", what, share)
    option(group, "--kv-budget 50%", "KV cache, as a share of the full model's", share)
    what = "as the sweep measured it; with --answers, of decoding by the bytes it reads"
    option(group, "--speedup 1.3", what, factor)
    add_file(command, "the mask", required=False)
