"""How an option is declared, and the groups of them that the commands of `llmdrop` share."""

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


def take(command: Parser, *parts: Callable[[Parser], None]) -> None:
    """Groups of options, in this order."""
    for part in parts:
        part(command)


def model(command: Parser) -> None:
    """What every command is about."""
    option(command, "model MODEL", "a checkpoint directory, a hub id or a name of `llmdrop fetch`")


def file(command: Parser, what: str, *, required: bool = True) -> None:
    """Where a command's JSON goes."""
    option(command, "--out FILE", f"file to write {what} to (JSON)", Path, required=required)
    flag(command, "--overwrite", "replace FILE")


def directory(command: Parser) -> None:
    """Where a command's checkpoint goes."""
    option(command, "out OUT", "the new checkpoint's directory", Path)


def replaced(command: Parser) -> None:
    """The same where one may be replaced, for commands without `output`."""
    directory(command)
    flag(command, "--overwrite", REPLACE)


def results(command: Parser) -> None:
    """Where a sweep and what is made of it are kept."""
    option(command, "--results DIR", "directory of the sweep (MODEL's name with -llmdrop, here)", Path)


def mask(command: Parser) -> None:
    """A mask in a file, or as lists of layers."""
    group = command.add_argument_group("mask (without any, the one in MODEL's config)")
    option(group, "--mask FILE", "what `llmdrop select` wrote", Path)
    option(group, "--attention 25,26", "layers whose attention goes; '25,' for one", named_layers, default=())
    option(group, "--mlp 24,25", "layers whose MLP goes", named_layers, default=())
    windows(group)
    flag(group, "--other-model", "take a mask that was chosen for another model's weights")


def windows(to: Parser | Group) -> None:
    """Layers with windows, beside whatever the mask drops."""
    what = "layers whose attention sees a text's first tokens and the last --window"
    option(to, "--window-attention 3,5", what, layers, default=())
    option(to, "--window TOKENS", "how many at least, a token itself among them", int)


def calibration(
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


def importance(command: Parser) -> None:
    """By what sublayers are compared."""
    what = "importance is what healing leaves undone of a sublayer's work, not 1 - cosine similarity; takes longer"
    flag(command, "--after-healing", what)


def precision(command: Parser) -> None:
    """What to score on."""
    option(command, "--device", "cpu or cuda; default a GPU where there is one")
    option(command, "--dtype", "float32, bfloat16 or float16; default the checkpoint's")


def selection(command: Parser) -> None:
    """The methods of `llmdrop_vllm.selection.selection`."""
    group = command.add_argument_group("what to drop (several may be combined)")
    option(group, "--attention N", "the N least important attention sublayers", int)
    option(group, "--mlp N", "the N least important MLP sublayers", int)
    option(group, "--blocks N", "the N least important blocks (attention and MLP)", int)
    option(group, "--consecutive N", "the run of N blocks that changes the residual stream least", int)
    option(group, "--joint N", "the N least important sublayers, attention and MLP in one list", int)
    option(group, "--last N", "the N deepest", int)
    option(group, "--random N", "N at random (--seed), as a control", int)
    option(group, "--least N", "the N most important ones: reverse order, as a control", int)
    option(group, "--kv-budget 50%", "attention until the KV cache is at most this share")
    kinds = ("attention", "mlp", "blocks", "joint")
    option(group, "--kind", "for --last, --random, --least (attention)", choices=kinds)
    flag(group, "--keep-last-layer", "for --last: spare the very last layer")
    option(group, "--seed", "for --random", int, default=0)
    flag(group, "--iterative", "score again after each drop")
    option(group, "--protect 0,1,31", "layers that keep everything", layers, default=())
    option(group, "--mixers", "of a hybrid (all)", choices=("all", "attention", "recurrent"), default="all")
    flag(group, "--allow-padding", "never trade importance against KV cache padding")


def wanted(command: Parser, instead: str = "sublayers as it takes, in place of --attention") -> None:
    """What an owner wants, in place of a number of attentions."""
    group = command.add_argument_group(f"as many {instead}, for")
    option(group, "--kv-budget 50%", "a KV cache of at most this share", share)
    option(group, "--requests N", "so many requests of --context in --memory", count)
    option(group, "--decode-speedup 1.3", "decoding of --batch requests, by the bytes that it reads", factor)
    option(group, "--memory", "for weights and KV cache (80GiB)", memory, default=80 * 2**30)
    option(group, "--batch N", "requests that are decoded at once (8)", count, default=8)
    option(group, "--context N", "tokens of a request (8192, or the model's)", count)


def search(command: Parser) -> None:
    """How a mask is searched for."""
    group = command.add_argument_group("search")
    option(group, "--masks N", "to judge at most (400)", count)
    option(group, "--minutes N", "to judge them in at most (without an end)", minutes)
    option(group, "--tokens N", "of answers, to choose by (2048)", count)
    option(group, "--held-out-tokens N", "of held-out answers, to decide by (4096)", count)
    option(group, "--beam N", "masks that each greedy step keeps (1)", count)
    what = "heal after each greedy step, on so many tokens of answers (10000), and judge the next one on that"
    option(group, "--heal-aware TOKENS", what, count, nargs="?", const=10_000)


def output(command: Parser) -> None:
    """How a checkpoint is written."""
    group = command.add_argument_group("output")
    option(group, "--dialect", "how the config says the mask (llm-drop)", choices=ON_DISK, default="llm-drop")
    how = group.add_mutually_exclusive_group()
    flag(how, "--portable", "keep the dropped weights, output projections zeroed")
    flag(how, "--config-only", "write the config and link to MODEL's weights")
    flag(group, "--renumber", RENUMBER)
    flag(group, "--overwrite", REPLACE)


def healing(command: Parser) -> None:
    """How what remains takes over the work of what is gone."""
    group = command.add_argument_group("healing")
    what = "refit attention's outputs behind the first layer that lost something as well (default), or nothing else"
    option(group, "--later", what, choices=("attention", "nothing"), default="attention")
    flag(group, "--train", "distil on the same data after the closed form")
    flag(group, "--train-only", "without it, such as where it was done before")
    option(group, "--epochs N", "of the training, at most (3)", float, default=3)
    option(group, "--learning-rate RATE", "its largest (2e-4)", float, default=2e-4)
    option(group, "--lora RANK", "train adapters, merged in the end, not full weights", count)
    option(group, "--train-parts", "of the layers from the first drop on (mlp)", choices=("mlp", "all"), default="mlp")
    option(group, "--log-dir DIR", "for TensorBoard", Path)


def measures(command: Parser) -> None:
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
    tasks(group, f"lm-eval tasks; ours: {OWN_TASKS}")
    engine(command)


def tasks(group: Group, what: str) -> None:
    """What a model is to answer, and how it is asked."""
    option(group, "--tasks A,B", what, names, default=())
    option(group, "--limit N", "rows of each task (all)", count)
    what = "ask through the chat template, or have texts completed; auto: as the task prefers and the model can"
    option(group, "--prompting", what, choices=("auto", "chat", "completion"), default="auto")
    what = "let tasks run the code that the model writes: in a process without network, files to write or others"
    flag(group, "--run-generated-code", what)


def engine(command: Parser) -> None:
    """The engine that models run in."""
    group = command.add_argument_group("engine")
    kinds = ("float32", "bfloat16", "float16")
    option(group, "--dtype", "default the checkpoint's, float32 on a CPU", choices=kinds)
    option(group, "--engine-args JSON", """for vLLM: '{"tensor_parallel_size": 2}'""", json_object, default={})
    command.set_defaults(device=None)
