"""The environment that llm-compressor lives in: it pins another compressed-tensors than vLLM does.

`python -m llmdrop_vllm.quantizing.environment` makes it beforehand.
"""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import llmdrop_vllm
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.fetching.fetch import held_in_cache

PINS = ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0")
READY = "llmdrop-ready"  # written last: an environment without it was interrupted, and is made anew


def pins() -> tuple[str, ...]:
    """What is installed there, with the torch that this environment has: it fits the machine."""
    return (*PINS, f"torch=={version('torch').partition('+')[0]}")


def environment() -> Path:
    """Its python, made first where it is missing: that takes minutes, and the network.

    Raises InputError with pip's last words where it cannot be made.
    """
    with held_in_cache("quantize", "making it") as place:
        venv = place / "venv"
        python, ready = venv / "bin" / "python", venv / READY
        if not ready.is_file() or ready.read_text().split() != [*pins()]:
            print(f"llmdrop: making the environment that quantizes, {venv}: {', '.join(pins())}", file=sys.stderr)
            shutil.rmtree(venv, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(venv)])
            _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins()])
            ready.write_text("\n".join(pins()))
        _lend_this_package(venv)
    return python


def _run(command: list[str]) -> None:
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        said = (found.stderr.strip() or found.stdout.strip() or "nothing was said").splitlines()[-1]
        raise InputError(f"the environment that quantizes cannot be made: {' '.join(command[1:4])} ...: {said}")


def _lend_this_package(venv: Path) -> None:
    """This package as it runs here, whatever way it was installed; its dependencies come with llm-compressor."""
    (site_packages,) = venv.glob("lib/python*/site-packages")
    link, package = site_packages / "llmdrop_vllm", Path(llmdrop_vllm.__file__).parent
    if not link.is_symlink() or link.readlink() != package:
        link.unlink(missing_ok=True)
        link.symlink_to(package)


if __name__ == "__main__":
    print(environment())
