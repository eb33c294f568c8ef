"""A directory that appears whole or not at all, whatever ends the process that makes it."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmdrop_vllm.artifacts import hold
from llmdrop_vllm.errors import OutputError, refusing

AT_FDCWD, RENAME_EXCHANGE = -100, 2
WRITING = "writing the same checkpoint"


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory next to `out`; when the context ends it becomes `out`, and if it fails it is gone.

    Only one process at a time makes an `out`; what a killed one left behind is removed first. With `overwrite`, `out`
    is replaced in one step, and its content removed after that. Raises OutputError for a place that cannot be used, and
    for whatever the system refuses meanwhile.
    """
    out = out.absolute()
    with refusing(f"{out} cannot be written"), _parents(out), held(partial_of(out), WRITING) as partial:
        replaced = out.with_name(f".{out.name}.llmdrop-replaced")
        try:
            _recover(out, replaced)
            # Asked again under the lock: another process may have made it meanwhile.
            check_free(out, overwrite=overwrite)
            _empty(partial)
            yield partial
            # And again: writing took long, and anybody else may have put something of theirs there.
            check_free(out, overwrite=overwrite)
            _put_in_place(partial, out, replaced)
        except BaseException:
            # Only now: once it is renamed, the directory of this name is another process's.
            _recover(out, replaced)
            _remove(partial)
            raise
        _recover(out, replaced)


def partial_of(out: Path) -> Path:
    """Where `out` is made, and what a killed run leaves behind."""
    return out.with_name(f".{out.name}.llmdrop-partial")


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless `out` does not exist or is a checkpoint that may be replaced."""
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise OutputError(f"{out} exists; choose another place, or replace it with --overwrite")
    if out.is_symlink() or not (out / "config.json").is_file():
        raise OutputError(f"{out} is not a directory with a config.json; only a checkpoint is overwritten")


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the missing parents of `out`, and remove them again if nothing came to stand in them."""
    missing = [parent for parent in out.parents if not parent.exists()]
    nearest = out.parents[len(missing)]
    if not nearest.is_dir():
        raise OutputError(f"{out} cannot be written: {nearest} is not a directory")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):  # not empty, or never made
            for parent in missing:
                parent.rmdir()


@contextmanager
def held(directory: Path, use: str, *, wait: bool = False) -> Iterator[Path]:
    """Make the directory and hold it until the context ends. While another process holds it, it is waited for, or
    OutputError says what that one does.
    """
    directory.mkdir(exist_ok=True)
    while (descriptor := _lock(directory, use, wait)) is None:
        directory.mkdir(exist_ok=True)
    try:
        yield directory
    finally:
        os.close(descriptor)


def _lock(directory: Path, use: str = WRITING, wait: bool = False) -> int | None:
    """A descriptor that holds the directory while it is open; None if it has just been renamed or removed."""
    try:
        descriptor = hold(directory, use, wait=wait)
    except FileNotFoundError:
        return None
    with suppress(FileNotFoundError):
        if os.path.samestat(directory.stat(), os.fstat(descriptor)):
            return descriptor
    os.close(descriptor)
    return None


def _recover(out: Path, replaced: Path) -> None:
    """Finish what was interrupted between the two renames of `_put_in_place`, or after them."""
    if replaced.exists():
        if out.exists():
            _remove(replaced)
        else:
            replaced.rename(out)


def _put_in_place(partial: Path, out: Path, replaced: Path) -> None:
    """Give the new directory its name; what had it is then called `partial` or `replaced`, or has been removed."""
    # What is now `out` is `partial` in a moment: nobody may take it for a place to write to before it is removed.
    if (descriptor := _lock(out)) is None:
        partial.rename(out)
        return
    try:
        _sync(partial)
        if not _exchange(partial, out):
            out.rename(replaced)
            partial.rename(out)
        _remove(partial)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Whether Linux's renameat2 has exchanged the two names."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS):  # this file system or kernel has no such thing
        return False
    raise OSError(code, os.strerror(code), str(second))


def _sync(directory: Path) -> None:
    """Have everything on the disk before the old checkpoint is removed: it may be the only other copy."""
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(directory: Path) -> None:
    # What cannot be removed now is found by the next run; an error here would hide the one that is being reported.
    shutil.rmtree(directory, ignore_errors=True)
