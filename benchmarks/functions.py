"""Python functions that a coder is asked for: signatures with docstrings of packages that are always here."""

import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import networkx
import numpy as np
import rich
import sympy

from llmdrop_vllm.artifacts import write_atomically

FUNCTIONS = 1200
ASKED = (
    "Complete this Python function.",
    "Write the body of this function.",
    "Implement the following in Python; explain it in one sentence.",
)


def functions(out: Path, *, in_chat: bool) -> None:
    """Prompts: signatures with docstrings from the standard library and packages that are always here, each in one of
    two files, to be completed or asked for.
    """
    roots = [Path(sysconfig.get_paths()["stdlib"]), *(Path(each.__path__[0]) for each in (np, networkx, sympy, rich))]
    found: dict[str, str] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if not {"site-packages", "test", "tests", "idlelib"} & {*path.relative_to(root).parts}:
                found |= dict(_documented(path))
    names = sorted(found)
    order = np.random.default_rng(0).permutation(len(names))[: 2 * FUNCTIONS]
    chosen = [found[names[place]] for place in order[in_chat::2]]
    if in_chat:
        chosen = [f"{ASKED[place % len(ASKED)]}\n\n```python\n{each}```" for place, each in enumerate(chosen)]
    write_atomically(out, "".join(json.dumps(each) + "\n" for each in chosen))


def _documented(path: Path) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            return
    for node in tree.body:
        plain = isinstance(node, ast.FunctionDef) and not node.decorator_list and len(node.body) > 1
        if plain and 40 < len(ast.get_docstring(node) or "") < 700:
            node.body = node.body[:1]
            yield node.name, ast.unparse(node) + "\n"
