"""Groups of options that the commands of `llmdrop` share."""

import argparse
from pathlib import Path

from llmdrop_vllm.cli.values import count, factor, json_object, layers, memory, minutes, names, share
from llmdrop_vllm.masks.dialects import ON_DISK

OWN_TASKS = "llmdrop_humaneval, llmdrop_reasoning; of the embedded model: llmdrop_docstring, llmdrop_name"
RENUMBER = "layers that lose both sublayers go, and the others move up: an ordinary smaller model"
Parser = argparse.ArgumentParser
Group = argparse._ArgumentGroup


def add_model(command: Parser) -> None:
    """What every command is about."""
    command.add_argument("model", metavar="MODEL", help="a checkpoint directory, a hub id or a name of `llmdrop fetch`")


def add_file(command: Parser, what: str, *, required: bool = True) -> None:
    """Where a command's JSON goes."""
    command.add_argument("--out", type=Path, required=required, metavar="FILE", help=f"file to write {what} to (JSON)")
    command.add_argument("--overwrite", action="store_true", help="replace FILE")


def add_directory(command: Parser) -> None:
    """Where a command's checkpoint goes."""
    command.add_argument("out", type=Path, metavar="OUT", help="the new checkpoint's directory")


def add_results(command: Parser) -> None:
    """Where a sweep and what is made of it are kept."""
    what = "directory of the sweep (MODEL's name with -llmdrop, here)"
    command.add_argument("--results", type=Path, metavar="DIR", help=what)


def add_mask(command: Parser) -> None:
    """A mask in a file, or as lists of layers."""
    mask = command.add_argument_group("mask (without any, the one in MODEL's config)")
    mask.add_argument("--mask", type=Path, metavar="FILE", help="what `llmdrop select` wrote")
    mask.add_argument("--attention", type=layers, default=(), metavar="25,26", help="layers whose attention goes")
    mask.add_argument("--mlp", type=layers, default=(), metavar="24", help="layers whose MLP goes")
    add_windows(mask)
    what = "take a mask that was chosen for another model's weights"
    mask.add_argument("--other-model", action="store_true", help=what)


def add_windows(command: Parser | Group) -> None:
    """Layers with windows, beside whatever the mask drops."""
    what = "layers whose attention sees a text's first tokens and the last --window"
    command.add_argument("--window-attention", type=layers, default=(), metavar="3,5", help=what)
    command.add_argument("--window", type=int, metavar="TOKENS", help="how many at least, a token itself among them")


def add_calibration(
    command: Parser, samples: str = "256", seq_len: str = "2048, or the model's context", other: str = ""
) -> None:
    """What to score with; as much of it as is said, and what other data may be."""
    group = command.add_argument_group("calibration")
    group.add_argument(
        "--data",
        help="'embedded' text (default), a .txt, a .jsonl with a text field or of `llmdrop answers`, a .json list of "
        f"token-id lists, or a `datasets` name, NAME[:CONFIG[:SPLIT]]{other}",
    )
    group.add_argument("--samples", type=int, metavar="N", help=f"sequences ({samples})")
    group.add_argument("--seq-len", type=int, metavar="N", help=f"tokens in each ({seq_len})")
    # `select` has a seed of its own for --random; together they are one.
    if command.get_default("seed") is None:
        group.add_argument("--seed", type=int, default=0, help="of the choice of sequences")


def add_importance(command: Parser) -> None:
    """By what sublayers are compared."""
    command.add_argument(
        "--after-healing",
        action="store_true",
        help="importance is what healing leaves undone of a sublayer's work, not 1 - cosine similarity; takes longer",
    )


def add_precision(command: Parser) -> None:
    """What to score on."""
    command.add_argument("--device", help="cpu or cuda; default a GPU where there is one")
    command.add_argument("--dtype", help="float32, bfloat16 or float16; default the checkpoint's")


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
        group.add_argument(f"--{name}", type=int, metavar="N", help=what)
    group.add_argument("--kv-budget", metavar="50%", help="attention until the KV cache is at most this share")
    kinds = ("attention", "mlp", "blocks", "joint")
    group.add_argument("--kind", choices=kinds, help="for --last, --random, --least (attention)")
    group.add_argument("--keep-last-layer", action="store_true", help="for --last: spare the very last layer")
    group.add_argument("--seed", type=int, default=0, help="for --random")
    group.add_argument("--iterative", action="store_true", help="score again after each drop")
    group.add_argument("--protect", type=layers, default=(), metavar="0,1,31", help="layers that keep everything")
    group.add_argument("--mixers", choices=("all", "attention", "recurrent"), default="all", help="of a hybrid (all)")
    group.add_argument("--allow-padding", action="store_true", help="never trade importance against KV cache padding")


def add_wanted(command: Parser, instead: str = "sublayers as it takes, in place of --attention") -> None:
    """What an owner wants, in place of a number of attentions."""
    group = command.add_argument_group(f"as many {instead}, for")
    group.add_argument("--kv-budget", type=share, metavar="50%", help="a KV cache of at most this share")
    group.add_argument("--requests", type=count, metavar="N", help="so many requests of --context in --memory")
    group.add_argument(
        "--decode-speedup", type=factor, metavar="1.3", help="decoding of --batch requests, by the bytes that it reads"
    )
    group.add_argument("--memory", type=memory, default=80 * 2**30, help="for weights and KV cache (80GiB)")
    group.add_argument("--batch", type=count, default=8, metavar="N", help="requests that are decoded at once (8)")
    group.add_argument("--context", type=count, metavar="N", help="tokens of a request (8192, or the model's)")


def add_search(command: Parser) -> None:
    """How a mask is searched for."""
    group = command.add_argument_group("search")
    group.add_argument("--masks", type=count, metavar="N", help="to judge at most (400)")
    group.add_argument("--minutes", type=minutes, metavar="N", help="to judge them in at most (without an end)")
    group.add_argument("--tokens", type=count, metavar="N", help="of answers, to choose by (2048)")
    group.add_argument("--held-out-tokens", type=count, metavar="N", help="of held-out answers, to decide by (4096)")
    group.add_argument("--beam", type=count, metavar="N", help="masks that each greedy step keeps (1)")
    what = "heal after each greedy step, on so many tokens of answers (10000), and judge the next one on that"
    group.add_argument("--heal-aware", nargs="?", type=count, const=10_000, metavar="TOKENS", help=what)


def add_finals(command: Parser) -> None:
    """How a search ends where KL is not to decide."""
    group = command.add_argument_group("tasks that decide in the end")
    add_tasks(group, "lm-eval tasks, which the best by KL are tried on, in vLLM")
    group.add_argument("--finalists", type=count, metavar="N", help="masks that are tried (8)")


def add_output(command: Parser) -> None:
    """How a checkpoint is written."""
    group = command.add_argument_group("output")
    group.add_argument("--dialect", choices=ON_DISK, default="llm-drop", help="how the config says the mask (llm-drop)")
    how = group.add_mutually_exclusive_group()
    how.add_argument("--portable", action="store_true", help="keep the dropped weights, output projections zeroed")
    how.add_argument("--config-only", action="store_true", help="write the config and link to MODEL's weights")
    group.add_argument("--renumber", action="store_true", help=RENUMBER)
    group.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a checkpoint")


def add_healing(command: Parser) -> None:
    """How what remains takes over the work of what is gone."""
    group = command.add_argument_group("healing")
    group.add_argument(
        "--later",
        choices=("attention", "nothing"),
        default="attention",
        help="refit attention's outputs behind the first layer that lost something as well (default), or nothing else",
    )
    group.add_argument("--train", action="store_true", help="distil on the same data after the closed form")
    group.add_argument("--train-only", action="store_true", help="without it, such as where it was done before")
    group.add_argument("--epochs", type=float, default=3, metavar="N", help="of the training, at most (3)")
    group.add_argument("--learning-rate", type=float, default=2e-4, metavar="RATE", help="its largest (2e-4)")
    group.add_argument("--lora", type=count, metavar="RANK", help="train adapters, merged in the end, not full weights")
    what = "of the layers from the first drop on (mlp)"
    group.add_argument("--train-parts", choices=("mlp", "all"), default="mlp", help=what)
    group.add_argument("--log-dir", type=Path, metavar="DIR", help="for TensorBoard")


def add_questions(command: Parser) -> None:
    """What a model is asked, and how it answers."""
    group = command.add_argument_group("prompts and answers")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSONL: a string, a chat (list of messages) or a logged OpenAI request a line (ours, of many kinds)",
    )
    group.add_argument("--samples", type=count, metavar="N", help="prompts, drawn by the seed (all)")
    group.add_argument("--max-tokens", type=count, default=256, metavar="N", help="of each answer (256)")
    group.add_argument("--per-prompt", type=count, default=1, metavar="N", help="answers to each prompt (1)")
    group.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 for the most likely tokens (0.8)")
    group.add_argument("--seed", type=int, default=0, help="of prompts and answers")
    group.add_argument(
        "--held-out",
        type=share,
        default=0.1,
        metavar="10%",
        help="share of the prompts that is for judging only (10%%)",
    )


def add_measures(command: Parser) -> None:
    """What quality is measured by, and the engine that it is measured with."""
    group = command.add_argument_group("quality")
    group.add_argument(
        "--text",
        default="held-out",
        metavar="DATA",
        help="for perplexity: 'held-out' (default: text that the embedded model has not seen), a .txt, a .jsonl, "
        "a .json list of token-id lists, or a dataset's name as for --data",
    )
    group.add_argument("--context", type=count, metavar="N", help="tokens in a window (512)")
    group.add_argument("--windows", type=count, metavar="N", help="windows of text (32, or as many as there are)")
    group.add_argument(
        "--divergence-tokens", type=int, default=4096, metavar="N", help="for KL and agreement (4096); 0 for neither"
    )
    group.add_argument(
        "--divergence-on",
        default="answers",
        metavar="WHAT",
        help="compare next tokens on 'answers' of the full model to our prompts (default), on the 'text', or on the "
        "held-out answers of a file of `llmdrop answers`",
    )
    add_tasks(group, f"lm-eval tasks; ours: {OWN_TASKS}")
    add_engine(command)


def add_tasks(group: Group, what: str) -> None:
    """What a model is to answer, and how it is asked."""
    group.add_argument("--tasks", type=names, default=(), metavar="A,B", help=what)
    group.add_argument("--limit", type=count, metavar="N", help="rows of each task (all)")
    group.add_argument(
        "--prompting",
        choices=("auto", "chat", "completion"),
        default="auto",
        help="ask through the chat template, or have texts completed; auto: as the task prefers and the model can",
    )
    group.add_argument(
        "--run-generated-code",
        action="store_true",
        help="let tasks run the code that the model writes: in a process without network, files to write or others",
    )


def add_engine(command: Parser) -> None:
    """The engine that models run in."""
    engine = command.add_argument_group("engine")
    engine.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default the checkpoint's, float32 on a CPU"
    )
    engine.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="""for vLLM: '{"tensor_parallel_size": 2}'""",
    )
    command.set_defaults(device=None)


def add_series(command: Parser) -> None:
    """Which masks a sweep measures."""
    group = command.add_argument_group("masks")
    group.add_argument(
        "--series",
        type=names,
        default=(),
        metavar="A,B",
        help="attention, mlp, blocks, joint, consecutive, last, last-but-one, reverse, random:SEEDS; the last four "
        "also as in last/blocks (default: each of them once, random:3)",
    )
    group.add_argument(
        "--counts", type=layers, default=(), metavar="1,2,4", help="sublayers to drop (1/12 to 2/3 of them)"
    )


def add_speed(command: Parser) -> None:
    """The workload that speed is measured with."""
    group = command.add_argument_group("speed, in the engine, without HTTP")
    group.add_argument("--requests", type=count, default=8, metavar="N", help="at once (8)")
    group.add_argument("--prompt-tokens", type=count, default=128, metavar="N", help="of each (128)")
    group.add_argument("--output-tokens", type=count, default=32, metavar="N", help="of each (32)")
    group.add_argument("--no-speed", action="store_true", help="quality only")


def add_goal(command: Parser) -> None:
    """What a mask is wanted for."""
    group = command.add_argument_group("goal (several must be met together)")
    group.add_argument(
        "--max-loss",
        type=share,
        metavar="1%",
        help="of the full model's score in the worse of multiple choice and generation, or without tasks of perplexity",
    )
    group.add_argument("--kv-budget", type=share, metavar="50%", help="KV cache, as a share of the full model's")
    group.add_argument(
        "--speedup",
        type=factor,
        metavar="1.3",
        help="as the sweep measured it; with --answers, of decoding by the bytes it reads",
    )
    add_file(command, "the mask", required=False)
