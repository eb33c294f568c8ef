"""The house rules that a machine can hold: which way imports run, and how large rooms may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"llmdrop_vllm": ROOT / "llmdrop_vllm", "llmdrop_server": ROOT / "server" / "llmdrop_server"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 50
# What stands on the ground: nothing of ours beneath, and no engine or framework.
GROUND = {
    "llmdrop_vllm.errors": set(),
    "llmdrop_vllm.masks.dialects": {"llmdrop_vllm.errors"},
    "llmdrop_vllm.masks.mask": {"llmdrop_vllm.masks.dialects", "llmdrop_vllm.errors"},
    "llmdrop_vllm.architectures.family": set(),
    "llmdrop_vllm.architectures.families": {"llmdrop_vllm.architectures.family"},
}
FRAMEWORKS = {"torch", "transformers", "vllm", "lm_eval", "matplotlib"}
# A room, and the rooms that it may not look into; what is left runs from the command line down to the mask.
DOWNWARD = {
    "llmdrop_vllm.serving": ("surgery", "evaluation", "report", "cli", "commands", "hf"),
    "llmdrop_vllm.surgery": ("serving", "evaluation", "report", "cli", "commands"),
    "llmdrop_vllm.hf": ("serving", "surgery", "evaluation", "report", "cli", "commands"),
    "llmdrop_vllm.evaluation": ("serving", "report", "cli", "commands", "evaluation_commands"),
    "llmdrop_vllm.report": ("serving", "cli", "commands"),
    "llmdrop_server": ("evaluation", "report", "cli", "commands"),
}
# Who touches vLLM; everything else works on a machine without it.
MAY_IMPORT_VLLM = ("llmdrop_vllm.serving", "llmdrop_vllm.evaluation.engine", "llmdrop_server")


def module_files() -> dict[str, Path]:
    """Dotted name to file, of everything in the packages."""
    found = {}
    for package, directory in PACKAGES.items():
        for path in directory.rglob("*.py"):
            parts = (package, *path.relative_to(directory).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


FILES = module_files()
SCRIPTS = {f"{name}.{path.stem}": path for name in ("benchmarks", "docker") for path in (ROOT / name).glob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in (FILES | SCRIPTS).items()}


def imports(name: str) -> Iterator[str]:
    """Every module that a module imports when it runs, at its top or inside a function."""
    checked_only = {
        id(each)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for each in ast.walk(node)
    }
    for node in ast.walk(TREES[name]):
        if id(node) in checked_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            # `from package import name` runs the package's own code as well.
            yield from submodules or {node.module}


OURS = {name: {each for each in imports(name) if each in FILES} - {name} for name in FILES}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_have_no_cycle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for each in sorted(OURS[name]):
                visit(each, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


@pytest.mark.parametrize("name", GROUND)
def test_mask_and_families_stand_on_the_ground(name):
    assert OURS[name] <= GROUND[name]
    assert not {each.partition(".")[0] for each in imports(name)} & FRAMEWORKS


@pytest.mark.parametrize("room", DOWNWARD)
def test_imports_run_one_way(room):
    forbidden = tuple(f"llmdrop_vllm.{each}" for each in DOWNWARD[room])
    for name in FILES:
        if inside(name, room):
            up = {each for each in OURS[name] for other in forbidden if inside(each, other)}
            assert not up, f"{name} imports {', '.join(sorted(up))}"


def test_vllm_is_imported_in_few_places():
    found = {name for name in FILES if any(inside(each, "vllm") for each in imports(name))}
    assert not {name for name in found if not any(inside(name, room) for room in MAY_IMPORT_VLLM)}


def test_everything_of_vllm_that_is_touched_is_listed():
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    found = {
        alias.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "vllm"
        for alias in node.names
    }
    # vllm_main is how a file calls what is `main` there.
    assert {name for name in found - {"main"} if f"`{name}`" not in listed} == set()


@pytest.mark.parametrize("name", TREES)
def test_every_file_says_what_it_is_responsible_for_and_stays_small(name):
    docstring = ast.get_docstring(TREES[name])
    assert docstring, f"{name} opens without a sentence"
    lines = (FILES | SCRIPTS)[name].read_text().count("\n")
    assert lines <= MAX_FILE_LINES, f"{name} has {lines} lines"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{name}.{node.name} has {length} lines"
