"""What a wheel puts into site-packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names of the files in the wheel, and what its entry points say."""
    out = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run([sys.executable, *build], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        return names, archive.read(entry_points).decode()


def test_it_holds_our_two_packages_and_no_other(wheel):
    packages = {name.split("/")[0] for name in wheel[0]}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"llmdrop_vllm", "llmdrop_server"}


def test_it_holds_the_pages_and_the_embedded_model(wheel):
    assert {
        "llmdrop_server/static/index.html",
        "llmdrop_server/static/app.js",
        "llmdrop_server/static/style.css",
        "llmdrop_vllm/report/page.css",
        "llmdrop_vllm/embedded/model/model.safetensors",
    } <= {*wheel[0]}


def test_vllm_and_the_shell_find_what_they_look_for(wheel):
    for line in (
        "llmdrop = llmdrop_vllm.cli:main",
        "llmdrop = llmdrop_vllm:register",
        "llmdrop = llmdrop_server.plugin:LlmdropEndpoints",
    ):
        assert line in wheel[1]
