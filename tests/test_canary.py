"""`make canary`: a wheel of vLLM laid over the libraries that are installed, and what happens where there is none."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docker" / "canary.py"
INFO = "vllm-9.9.9.dist-info"
WHEEL = {
    "vllm/__init__.py": "newer = True",
    "vllm/template.jinja": "",
    "vllm/_C.abi3.so": "for GPUs",
    "vllm/kernel.cuh": "",
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9\n",
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{INFO}/RECORD": "",
    f"{INFO}/entry_points.txt": "[console_scripts]\nvllm = vllm:main\n",
}
SEEN = """
from importlib.metadata import version
from pathlib import Path
import vllm

def test_what_is_laid():
    home = Path(vllm.__file__).parent
    assert vllm.newer
    assert version("vllm").startswith("9.9.9")
    assert {each.name for each in home.iterdir()} >= {"template.jinja", "_C.abi3.so"}
    assert not (home / "kernel.cuh").exists()
    assert (home / "_C.abi3.so").read_bytes()[:4] == b"\\x7fELF"
"""


def canary(tmp_path, **environment):
    """Without an index; wheels are where `tmp_path` has them."""
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "CANARY_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(SCRIPT), "-q", "-p", "no:cacheprovider", str(tmp_path / "test_seen.py")]
    environment = os.environ | pip | {"CANARY_VLLM": "9.9.9"} | environment
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)


def test_tests_see_the_newer_python_and_the_installed_libraries(tmp_path):
    with zipfile.ZipFile(tmp_path / "vllm-9.9.9-py3-none-any.whl", "w") as wheel:
        for name, text in WHEEL.items():
            wheel.writestr(name, text)
    (tmp_path / "test_seen.py").write_text(SEEN)
    ran = canary(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "the Python of vLLM 9.9.9 over the libraries of" in ran.stdout
    (tmp_path / "vllm-9.9.9-py3-none-any.whl").unlink()
    (tmp_path / "test_seen.py").write_text("def test_fails(): assert False")
    assert canary(tmp_path).returncode == 1  # by the tests: what was laid once is kept


@pytest.mark.parametrize(("optional", "status"), [("0", 1), ("1", 0)])
def test_without_a_wheel_it_says_loudly_that_it_did_not_run(optional, status, tmp_path):
    ran = canary(tmp_path, CANARY_OPTIONAL=optional)
    assert ran.returncode == status
    assert "THE CANARY DID NOT RUN: pip download: " in ran.stderr
    assert not [*(tmp_path / "home").iterdir()]
