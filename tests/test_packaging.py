"""What a wheel puts into site-packages, and what a source distribution holds."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from llmdrop_vllm import __version__

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "llmdrop_vllm", ROOT / "server" / "llmdrop_server")


def files_of(directory, below):
    """Every file of a directory that git does not ignore, as its path below another."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", str(directory)]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    files = (ROOT / name for name in names if name)
    return {path.relative_to(below).as_posix() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with a wheel and an sdist."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "--directory", str(out)], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def wheel(built):
    """File to content."""
    with zipfile.ZipFile(built / f"llmdrop_vllm-{__version__}-py3-none-any.whl") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_wheel_holds_our_two_packages_whole_and_no_other(wheel):
    ours = set().union(*(files_of(package, package.parent) for package in PACKAGES))
    assert {name for name in wheel if ".dist-info/" not in name} == ours


def test_vllm_and_the_shell_find_what_they_look_for(wheel):
    entry_points = wheel[f"llmdrop_vllm-{__version__}.dist-info/entry_points.txt"].decode()
    for line in (
        "llmdrop = llmdrop_vllm.cli:main",
        "llmdrop = llmdrop_vllm:register",
        "llmdrop = llmdrop_server.plugin:LlmdropEndpoints",
    ):
        assert line in entry_points


def test_an_sdist_holds_all_that_the_makefile_and_the_suite_need(built):
    top = f"llmdrop_vllm-{__version__}"
    with tarfile.open(built / f"{top}.tar.gz") as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    folders = (".ci", "benchmarks", "docker", "llmdrop_vllm", "server", "tests")
    assert set().union(*(files_of(ROOT / folder, ROOT) for folder in folders)) - names == set()
    assert {"Makefile", "README.md", "LICENSE", "pyproject.toml", ".pre-commit-config.yaml"} <= names
