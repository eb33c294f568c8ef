"""README and docs/: links lead somewhere, commands have the options shown with them, and the front page is short."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from llmdrop_server import launch, vllm_options
from llmdrop_vllm.cli.arguments import parser

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("docker/**/README.md"),
]


@cache
def anchors(page: Path) -> frozenset[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return frozenset(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings)


def commands(page: Path) -> Iterator[list[str]]:
    """Each line of the page's bash blocks, and after a prompt of its console blocks, without comments, as words."""
    for kind, block in re.findall(r"```(bash|console)\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if kind == "console" and not line.startswith("$ "):
                continue
            for part in re.split(r" && |;(?= )", line.removeprefix("$ ")):
                yield shlex.split(part, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if path.startswith("http"):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_has_the_options_that_it_is_shown_with(page, capsys):
    for words in commands(page):
        try:
            match words:
                case ["llmdrop", "serve", *rest]:
                    vllm_options.read(launch.parser().parse_known_args(rest)[1])
                case ["llmdrop", *rest]:
                    parser().parse_args(rest)
                case ["make", target, *_]:
                    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
                case ["python", script, *_] if script.endswith(".py"):
                    assert (ROOT / script).is_file() or (page.parent / script).is_file(), script
        except SystemExit:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {capsys.readouterr().err}")


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250
