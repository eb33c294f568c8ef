"""What a wheel puts into site-packages, and what a source distribution holds."""

import json
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llmdrop_vllm import __version__
from llmdrop_vllm.versions import TESTED_VLLM, was_tested

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


@pytest.fixture(scope="module")
def required(wheel):
    """What the wheel asks for, as pip reads it."""
    metadata = message_from_bytes(wheel[f"llmdrop_vllm-{__version__}.dist-info/METADATA"])
    return [Requirement(each) for each in metadata.get_all("Requires-Dist")]


def test_without_an_extra_no_engine_is_asked_for(required):
    plain = {each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})}
    assert plain == {"numpy", "pydantic", "rich", "safetensors", "tqdm"}


def test_the_extra_takes_the_versions_of_vllm_that_the_suite_was_run_on_and_no_other(required):
    (vllm,) = [each.specifier for each in required if each.name == "vllm"]
    taken = [minor for minor in range(20, 50) if f"0.{minor}.1" in vllm]
    assert [f"0.{minor}" for minor in taken] == list(TESTED_VLLM)
    assert [minor for minor in range(20, 50) if was_tested(f"0.{minor}.1+cpu")] == taken


@pytest.mark.processes
@pytest.mark.parametrize(("extra", "engine"), [("", "0.32.0"), ("", "0.33.0"), ("", "0.50.1"), ("[cuda]", "0.33.0")])
def test_beside_an_engine_that_is_there_pip_installs_neither_another_one_nor_torch(extra, engine, built, tmp_path):
    """An empty environment that says it has them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for name, version in {"vllm": engine, "torch": "2.14.0"}.items():
        (packages / f"{name}-{version}.dist-info").mkdir()
        said = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(said)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(tmp_path / "env" / "bin" / "python"), "install", "--dry-run"]
    report = tmp_path / "report.json"
    subprocess.run([*pip, "--quiet", "--report", str(report), f"{wheel}{extra}"], check=True, capture_output=True)
    names = {each["metadata"]["name"] for each in json.loads(report.read_text())["install"]}
    assert "llmdrop-vllm" in names
    assert not {name for name in names if name.startswith(("vllm", "torch", "nvidia"))}


def test_an_sdist_holds_all_that_the_makefile_and_the_suite_need(built):
    top = f"llmdrop_vllm-{__version__}"
    with tarfile.open(built / f"{top}.tar.gz") as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    folders = (".ci", "benchmarks", "docker", "llmdrop_vllm", "server", "tests")
    assert set().union(*(files_of(ROOT / folder, ROOT) for folder in folders)) - names == set()
    assert {"Makefile", "README.md", "LICENSE", "pyproject.toml", ".pre-commit-config.yaml"} <= names


@pytest.mark.parametrize(
    ("file", "line"), [("Dockerfile", "ARG VERSION={}"), ("helm/llmdrop/Chart.yaml", "appVersion: {}")]
)
def test_the_image_and_the_chart_are_of_this_version(file, line):
    assert line.format(__version__) in (ROOT / "docker" / file).read_text().splitlines()
