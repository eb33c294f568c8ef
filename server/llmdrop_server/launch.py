"""`llmdrop serve MODEL [any vllm serve option]`: a mask from the command line, then vLLM's own server."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from llmdrop_server import COMPARISON_ENVIRONMENT, LIMITS_ENVIRONMENT, SCORES_ENVIRONMENT
from llmdrop_server.limits import Limits
from llmdrop_server.mask_options import mask_entries
from llmdrop_server.preflight import check_port, check_readable, check_served_name, check_tokenizer, read_keys
from llmdrop_server.vllm_options import Told, read
from llmdrop_vllm import register
from llmdrop_vllm.errors import InputError, in_one_line
from llmdrop_vllm.fetching.fetch import resolve

PLUGIN = "llmdrop"
# Streams in flight are finished when the server is told to end, and the queue has an end.
DEFAULTS = {"--shutdown-timeout": "30", "--max-num-queued-reqs": "1024"}
# After vLLM's 5 s, a connection whose next request has come may be closed under it when the machine was busy meanwhile:
# the soak saw it. Proxies keep idle connections for a minute, and must not outlast the server's.
KEEP_ALIVE_S = 75
PORT = 8000  # vLLM's
# By which it is told to do without the model's own tokenizer.
TOKENIZER_OPTIONS = ("--tokenizer", "--tokenizer-mode", "--skip-tokenizer-init")
DESCRIPTION = """Serve MODEL, a checkpoint directory, a hub id or a name of `llmdrop fetch`, with vLLM's
OpenAI-compatible server, a page at / and the mask at /v1/drop.
Everything that `vllm serve` takes is passed on; `vllm serve --help=all` lists it."""
EXAMPLES = """examples:
  llmdrop serve ./llama-2-13b-drop8                                       # the mask is in its config
  llmdrop serve meta-llama/Llama-2-13b-hf --drop-attention 33,32,35,30    # a mask on an untouched checkpoint
  llmdrop serve meta-llama/Llama-2-13b-hf --drop-attention 8 --scores scores.json --max-model-len 4096"""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to end. The exit status is 0 then, and 1 after an error or when the engine has died."""
    ours, words = parser().parse_known_args(argv)
    try:
        register()  # refuses to, where there is no vLLM
        theirs = read(words)
        model = resolve(theirs.model)
        check_served_name(model)
        if not any(map(theirs.says, TOKENIZER_OPTIONS)):
            check_tokenizer(model)
        check_readable([ours.api_key_file, ours.comparison, *theirs.files])
        check_port(theirs.host, PORT if theirs.port is None else theirs.port)
        arguments = vllm_arguments(ours, theirs, model)
        _set_environment(ours)
    except (InputError, ImportError) as error:
        print(f"llmdrop: error: {in_one_line(error)}", file=sys.stderr)
        return 1
    if has_rust_front_end():
        lost = "no page, no /v1/drop, no bounds"
        print(f"llmdrop: VLLM_USE_RUST_FRONTEND serves vLLM's routes only: {lost}", file=sys.stderr)
    return _run_vllm(arguments)


def has_rust_front_end() -> bool:
    """Whether vLLM was told to answer clients from a process that loads no endpoint plugins."""
    return os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0")


def parser() -> argparse.ArgumentParser:
    """Our options, and those of vLLM's that are looked at before vLLM is imported."""
    top = argparse.ArgumentParser(
        prog="llmdrop serve",
        usage="llmdrop serve MODEL [options] [any vllm serve option]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    mask = top.add_argument_group("mask, for a checkpoint whose config has none")
    mask.add_argument("--drop-attention", metavar="25,26", help="layers whose attention goes; with --scores, how many")
    mask.add_argument("--drop-mlp", metavar="24,", help="layers whose MLP goes; with --scores, how many")
    mask.add_argument("--window-attention", metavar="3,5", help="layers whose attention sees a window only")
    mask.add_argument("--window", type=int, metavar="TOKENS", help="how many last tokens they see")
    mask.add_argument("--mask", type=Path, metavar="FILE", help="what `llmdrop select` wrote")
    mask.add_argument("--scores", type=Path, metavar="FILE", help="what `llmdrop score` wrote; shown on the page too")
    what = "what `llmdrop compare` wrote, shown on the page; without, the one in MODEL, if there is one"
    top.add_argument("--comparison", type=Path, metavar="FILE", help=what)
    bounds = (f"{name}  {field.description}; {field.default:,}" for name, field in Limits.model_fields.items())
    limits = top.add_argument_group("bounds on a request", "\n".join(bounds))
    limits.add_argument("--limit", action="append", default=[], metavar="NAME=N", help="another bound; may be repeated")
    keys = top.add_argument_group("keys, beside vLLM's --api-key")
    keys.add_argument("--api-key-file", type=Path, metavar="FILE", help="one per line; no process list shows them")
    return top


def vllm_arguments(ours: argparse.Namespace, theirs: Told, model: str) -> list[str]:
    """The command line for `vllm`. Raises InputError for a mask that makes no sense."""
    overrides = theirs.overrides | mask_entries(ours)
    options = {name: value for name, value in DEFAULTS.items() if not theirs.says(name)}
    if model != theirs.model and not theirs.says("--served-model-name"):
        options["--served-model-name"] = theirs.model
    words = [word for pair in options.items() for word in pair]
    if ours.api_key_file is not None:
        words += ["--api-key", *read_keys(ours.api_key_file)]
    # Last, for it goes over a YAML file's, and one value only: of two vLLM would take the last.
    said = ["--hf-overrides", json.dumps(overrides)] if overrides else []
    return ["serve", model, *words, *theirs.rest, *said]


def _set_environment(ours: argparse.Namespace) -> None:
    limits = Limits.parse(json.dumps(dict(each.partition("=")[::2] for each in ours.limit)))
    os.environ[LIMITS_ENVIRONMENT] = json.dumps(limits.model_dump(exclude_unset=True))
    for name, path in ((SCORES_ENVIRONMENT, ours.scores), (COMPARISON_ENVIRONMENT, ours.comparison)):
        if path is not None:
            os.environ[name] = str(path.absolute())
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(KEEP_ALIVE_S))
    os.environ["VLLM_PLUGINS"] = ",".join(plugins(os.environ.get("VLLM_PLUGINS")))


def plugins(allowed: str | None) -> list[str]:
    """What VLLM_PLUGINS must hold: vLLM adds routes only for plugins that stand there, and shuts out all others."""
    if allowed is not None:
        return [*dict.fromkeys([*allowed.split(","), PLUGIN])]
    groups = {group for group in entry_points().groups if group.startswith("vllm.")} - {"vllm.endpoint_plugins"}
    return sorted({PLUGIN, *(each.name for group in groups for each in entry_points(group=group))})


def _run_vllm(arguments: list[str]) -> int:
    sys.argv = ["vllm", *arguments]
    from vllm.entrypoints.cli.main import main as vllm_main

    from llmdrop_server.plugin import LlmdropEndpoints

    try:
        vllm_main()
    except (OSError, ValueError) as error:
        print(f"llmdrop: error: {arguments[1]}: {str(error).strip()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while it was starting
        return 130
    if LlmdropEndpoints.ending.engine_died:
        print("llmdrop: error: the engine has died; the log above says why", file=sys.stderr)
        return 1
    return 0
