"""The house rules that a machine can hold: which room sees which, and how large files may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"llmdrop_vllm": ROOT / "llmdrop_vllm", "llmdrop_server": ROOT / "server" / "llmdrop_server"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 50
FRAMEWORKS = {"torch", "transformers", "vllm", "lm_eval", "matplotlib"}
# The rooms from the ground up, each floor's beside one another: a room sees those below it, and none on its own floor.
FLOORS = (
    ("errors", "shares", "versions", "embedded"),
    ("masks",),
    ("architectures", "kv_cache"),
    ("checkpoints", "hf_windows", "hf_passthrough", "hf_configs"),
    ("hf", "artifacts", "serving"),
    ("data", "selection", "writing", "mask_file"),
    ("scoring", "fetching"),
    ("healing", "quantizing"),
    ("search",),
    ("evaluation",),
    ("report",),
    ("cli",),
)
FLOOR_OF = {f"llmdrop_vllm.{room}": floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The server takes what is asked for from where it stands; it measures nothing and draws nothing.
SERVER, NOT_FOR_THE_SERVER = "llmdrop_server", ("evaluation", "report", "writing", "scoring", "search", "cli")
# What runs inside vLLM, and what everything else is made without.
NOT_FOR_TOOLS = "llmdrop_vllm.serving"
# Files outside any room: what everybody uses and what users import.
MAX_LOOSE_FILES = 10
# Rooms that no framework may enter: they are read by every process of vLLM, and by tools that want an answer at once.
LIGHT = ("errors", "shares", "versions", "masks", "architectures", "kv_cache")
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


def room_of(name: str) -> str:
    """The room that a module stands in: its folder in the package, or itself; the server is one."""
    return SERVER if inside(name, SERVER) else ".".join(name.split(".")[:2])


def test_every_module_has_a_floor():
    loose = {name for name in FILES if inside(name, "llmdrop_vllm")} - {"llmdrop_vllm"}
    assert {room_of(name) for name in loose} == set(FLOOR_OF)


def test_few_files_stand_outside_any_room():
    assert len([*PACKAGES["llmdrop_vllm"].glob("*.py")]) <= MAX_LOOSE_FILES


@pytest.mark.parametrize("room", FLOOR_OF)
def test_rooms_see_only_those_below(room):
    for name in FILES:
        if not inside(name, room):
            continue
        seen = {room_of(each) for each in OURS[name] if each != "llmdrop_vllm"} - {room, SERVER}
        above = {each for each in seen if FLOOR_OF[each] >= FLOOR_OF[room]}
        assert not above, f"{name} imports {', '.join(sorted(above))}"
        # The command line only hands `llmdrop serve` on.
        assert room == "llmdrop_vllm.cli" or not any(inside(each, SERVER) for each in OURS[name]), name


def test_tools_do_without_the_engine():
    found = {name for name in FILES if any(inside(each, NOT_FOR_TOOLS) for each in OURS[name])}
    assert {name for name in found if not inside(name, NOT_FOR_TOOLS)} == {"llmdrop_vllm"}  # `register` hands on


def test_the_server_measures_and_draws_nothing():
    forbidden = tuple(f"llmdrop_vllm.{each}" for each in NOT_FOR_THE_SERVER)
    for name in FILES:
        if inside(name, SERVER):
            assert not {each for each in OURS[name] for other in forbidden if inside(each, other)}, name


@pytest.mark.parametrize("room", LIGHT)
def test_what_everything_stands_on_is_light(room):
    for name in FILES:
        if inside(name, f"llmdrop_vllm.{room}"):
            assert not {each.partition(".")[0] for each in imports(name)} & FRAMEWORKS, name


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
