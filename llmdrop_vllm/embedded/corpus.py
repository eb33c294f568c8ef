"""The text at hand on any machine: docstrings, sources and language reference of Python's own standard library."""

import ast
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
HELD_OUT_ONE_IN = 20
# Short functions only: code is easy text, and more of it would leave the docstrings too few steps.
MIN_SOURCE_CHARS, MAX_SOURCE_CHARS = 80, 800
# Tests and vendored tools repeat each other; encodings are tables of numbers.
LEFT_OUT = frozenset(
    ["site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"]
)

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One question and its answer; `subject` is the dotted name or topic it is about."""

    subject: str
    question: str
    answer: str

    @property
    def text(self) -> str:
        """The document as the model reads it, in the form that its chat template writes."""
        return f"{USER}{self.question}{ASSISTANT}{self.answer}{END}"

    @property
    def held_out(self) -> bool:
        """Split by subject, so that a source never shows a held-out docstring to the training run."""
        return zlib.crc32(self.subject.encode()) % HELD_OUT_ONE_IN == 0


def documents() -> Iterator[Document]:
    """Every document once, in a fixed order for a given Python version; equal answers are not repeated."""
    seen: set[str] = set()
    for document in _all_documents():
        if document.answer not in seen:
            seen.add(document.answer)
            yield document


def _all_documents() -> Iterator[Document]:
    for topic, text in sorted(topics.items()):
        yield Document(topic, f"Explain {topic} in Python.", text.strip())
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            module = ".".join(parts).removesuffix(".__init__")
            yield from _module_documents(module, path)


def _module_documents(module: str, path: Path) -> Iterator[Document]:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # templates and files kept in another encoding on purpose
        return
    if docstring := ast.get_docstring(tree):
        yield Document(module, f"What is {module}?", docstring)
    yield from _definition_documents(module, tree, source.splitlines(keepends=True))


def _definition_documents(scope: str, node: ast.Module | Definition, lines: list[str]) -> Iterator[Document]:
    for child in node.body:
        if not isinstance(child, Definition):
            continue
        name = f"{scope}.{child.name}"
        if docstring := ast.get_docstring(child):
            yield Document(name, f"What is {name}?", f"{_signature(child)}\n\n{docstring}")
        if isinstance(child, ast.ClassDef):
            yield from _definition_documents(name, child, lines)
        else:
            # ast.get_source_segment splits the whole file again at every call: minutes instead of seconds.
            code = textwrap.dedent("".join(lines[child.lineno - 1 : child.end_lineno]))
            if MIN_SOURCE_CHARS < len(code) <= MAX_SOURCE_CHARS:
                yield Document(name, f"Show the source of {name}.", code)


def _signature(node: Definition) -> str:
    inside = ", ".join(map(ast.unparse, node.bases)) if isinstance(node, ast.ClassDef) else ast.unparse(node.args)
    return f"{node.name}({inside})"
