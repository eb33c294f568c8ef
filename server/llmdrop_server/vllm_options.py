"""What a command line says to `vllm serve`: which model, where to listen, what goes over the config.

The usual one, with the model first, is read without vLLM, whose import takes a quarter of a minute; whatever else there
may be (options first, a YAML file, overrides with dots) is what vLLM's own parser makes of it.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdrop_vllm.errors import InputError

OVERRIDES = re.compile(r"--hf[-_]overrides(?=$|[=.])")
NAMED = re.compile(r"--model(?=$|=)")
# What only vLLM's parser can tell the meaning of.
INVOLVED = re.compile(rf"{NAMED.pattern}|--config$|--hf[-_]overrides\.")
SSL_FILES = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")


@dataclass(frozen=True)
class Told:
    """`rest` are the words without the model and what goes over its config; `in_file` the options that a YAML gives."""

    model: str
    overrides: dict[str, Any]
    rest: list[str]
    host: str | None = None
    port: int | None = None
    files: tuple[Path, ...] = ()
    in_file: frozenset[str] = frozenset()

    def says(self, option: str) -> bool:
        """Whether the words or the file have it."""
        given = {each.partition("=")[0].replace("_", "-") for each in self.rest}
        return option in given or option in self.in_file


def read(words: Sequence[str]) -> Told:
    """Raises InputError for words without a model, and for overrides that are no JSON object. Words that vLLM's parser
    does not take end the process with its own message.
    """
    if words and not words[0].startswith("-") and not any(map(INVOLVED.match, words)):
        return _plainly(words[0], words[1:])
    if not any(NAMED.match(each) or each == "--config" or not each.startswith("-") for each in words):
        raise InputError("no model is named; expected a checkpoint directory, a hub id or a name of `llmdrop fetch`")
    said = _parsed(words)
    others = _without(OVERRIDES, words)
    rest = _without(NAMED, others)
    if said.model_tag is not None and rest == others:
        rest.pop(_place_of(said.model_tag, rest))
    model, overrides = said.model_tag or said.model, dict(said.hf_overrides or {})
    return Told(model, overrides, rest, said.host, said.port, _files(said), _in_file(words))


def _plainly(model: str, words: Sequence[str]) -> Told:
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument("--host")
    look.add_argument("--port", type=int)
    look.add_argument("--hf-overrides", "--hf_overrides", default="{}")
    for name in SSL_FILES:
        look.add_argument(f"--{name.replace('_', '-')}", f"--{name}")
    said, _ = look.parse_known_args(words)
    return Told(model, _object(said.hf_overrides), _without(OVERRIDES, words), said.host, said.port, _files(said))


def _files(said: argparse.Namespace) -> tuple[Path, ...]:
    return tuple(Path(file) for name in SSL_FILES if (file := getattr(said, name)))


def _object(text: str) -> dict[str, Any]:
    try:
        overrides = json.loads(text)
    except ValueError as error:
        raise InputError(f"--hf-overrides is not JSON: {error}") from None
    if not isinstance(overrides, dict):
        raise InputError(f"--hf-overrides is {text}; expected a JSON object")
    return overrides


def _without(option: re.Pattern[str], words: Sequence[str]) -> list[str]:
    """The words less an option in all its forms, each with its value."""
    left, rest = [], iter(words)
    for word in rest:
        if not option.match(word):
            left.append(word)
        elif "=" not in word:
            next(rest, None)
    return left


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """By vLLM's parser for `vllm serve`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    parser = _parser()
    ServeSubcommand().subparser_init(parser.add_subparsers(required=True))
    try:
        found: argparse.Namespace = parser.parse_args(["serve", *words])
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    return found


def _parser() -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return FlexibleArgumentParser(prog="llmdrop", add_help=False)


def _place_of(model: str, words: Sequence[str]) -> int:
    """Where the model stands among words that may say the same as an option's value."""
    places = [place for place, word in enumerate(words) if word == model]
    if len(places) == 1:
        return places[0]
    said = vars(_parsed(words))
    for place in places:
        if vars(_parsed([model, *words[:place], *words[place + 1 :]])) == said:
            return place
    raise InputError(f"{model} is named {len(places)} times; put the model first")


def _in_file(words: Sequence[str]) -> frozenset[str]:
    if "--config" not in words:
        return frozenset()
    entries = _parser().load_config_file(words[words.index("--config") + 1])
    return frozenset(each.replace("_", "-") for each in entries if each.startswith("--"))
