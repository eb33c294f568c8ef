"""Run tests with the Python of the newest vLLM over the compiled libraries of the one that is installed.

vLLM comes out for GPUs weeks before anyone builds it for CPUs, and what this package touches of it is Python. What
passes here is no proof: the kernels are the old ones.
  python docker/canary.py [TEST ...]
CANARY_VLLM names another version than the newest, CANARY_HOME another place to keep it than the environment; with
CANARY_OPTIONAL=1 it is no error that there is no wheel to be had.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

TESTS = (
    "tests/serving",
    *(f"tests/{room}/test_contact.py" for room in ("server", "evaluation")),
    "tests/server/test_doctor.py",
    *("-m", "not processes", "--numprocesses", "2", "--dist", "loadfile"),
)
# Of the wheel; its compiled files are for GPUs, and its headers for compiling more.
TAKEN = {".css", ".html", ".jinja", ".js", ".json", ".py", ".sh", ".txt"}
# What newer versions import as they start and older ones do not bring along.
NEWER = ("multidict", "orjson")


class NotToBeHad(Exception):
    """No wheel: why."""


def main(tests: list[str]) -> int:
    """The exit status of pytest, or of there being no wheel."""
    try:
        wanted = os.environ.get("CANARY_VLLM") or newest()
        laid = Path(os.environ.get("CANARY_HOME") or Path(sys.prefix) / "canary") / f"vllm-{wanted}"
        if not laid.is_dir():
            lay(wanted, laid)
    except NotToBeHad as error:
        print(f"{'!' * 79}\nTHE CANARY DID NOT RUN: {error}\n{'!' * 79}", file=sys.stderr)
        return 0 if os.environ.get("CANARY_OPTIONAL") == "1" else 1
    print(f"llmdrop: the Python of vLLM {wanted} over the libraries of {version('vllm')}", flush=True)
    # For the processes that tests start too, which inherit it.
    path = os.pathsep.join([str(laid), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", *(tests or TESTS)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode


def pip(*words: str) -> str:
    """What pip printed. Raises NotToBeHad with its last line where it fails."""
    ran = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--disable-pip-version-check"], capture_output=True, text=True
    )
    if ran.returncode:
        raise NotToBeHad(f"pip {words[0]}: {(ran.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return ran.stdout


def newest() -> str:
    """The version that `pip install vllm` would take."""
    found = re.match(r"vllm \(([^)]+)\)", pip("index", "versions", "vllm"))
    if found is None:
        raise NotToBeHad("pip index names no version of vllm")
    return found[1]


def lay(wanted: str, target: Path) -> None:
    """Make `target`, for the front of PYTHONPATH: it is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheels, made = Path(folder) / "wheels", Path(folder) / "made"
        pip("download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels), f"vllm=={wanted}")
        with zipfile.ZipFile(next(wheels.glob("vllm-*.whl"))) as wheel:
            files = [name for name in wheel.namelist() if name.startswith("vllm/") and Path(name).suffix in TAKEN]
            wheel.extractall(made, files)
            # The platform is taken from the version: "+cpu" of the libraries' own.
            named = wanted + "".join(version("vllm").partition("+")[1:])
            info = made / f"vllm-{named}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {named}\n")
            theirs = f"vllm-{wanted}.dist-info"
            (info / "entry_points.txt").write_bytes(wheel.read(f"{theirs}/entry_points.txt"))
            required = wheel.read(f"{theirs}/METADATA").decode()
        libraries = Path(importlib.util.find_spec("vllm").origin).parent
        for library in libraries.rglob("*.so"):
            place = made / "vllm" / library.relative_to(libraries)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, place)
        asked = (name for name in NEWER if f"Requires-Dist: {name}" in required)
        lacking = [name for name in asked if importlib.util.find_spec(name) is None]
        if lacking:
            pip("install", "--quiet", "--no-deps", "--target", str(made), *lacking)
        made.rename(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
