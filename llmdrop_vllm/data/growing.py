"""A JSONL file that grows record by record under a header, and that an interrupted run goes on with."""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Generic, Self, TypeVar

from pydantic import ValidationError

from llmdrop_vllm.artifacts import Provenance, Record
from llmdrop_vllm.errors import DataError, OutputError, refusing


class Header(Record):
    """A file's first line: what was asked for."""

    provenance: Provenance

    def differs_in(self, other: Self) -> str:
        """The first entry by which they are not the same request, however it was written and wherever the model is;
        empty where what answers the one answers the other.
        """
        theirs = other.provenance
        model = self.provenance.model.model_copy(update={"path": theirs.model.path})
        provenance = self.provenance.model_copy(update={"command": theirs.command, "model": model})
        ours = self.model_copy(update={"provenance": provenance})
        names = (name for name in type(self).model_fields if getattr(ours, name) != getattr(other, name))
        return next(names, "")


H = TypeVar("H", bound=Header)
R = TypeVar("R", bound=Record)


class Growing(Generic[H, R]):
    """Records on their way into a file: what is appended stays, whatever ends the process. `count` are there, `found`
    are those of an earlier run.
    """

    def __init__(self, file: BinaryIO, header: H, kind: type[R], *, refuse: bool = False) -> None:
        """Cut off a torn last line; and what answers another request or cannot be read, unless that is refused."""
        self.file = file
        self.found: list[R] = []
        file.seek(0)
        end = 0
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            problem = ""
            try:
                if number:
                    self.found.append(kind.model_validate_json(line))
                elif difference := type(header).model_validate_json(line).differs_in(header):
                    problem = f" was written with another {difference}; go on with that, or remove it"
            except ValidationError:
                problem = f", line {number + 1}, is not of this command; remove it"
            if problem and refuse:
                raise OutputError(f"{file.name}{problem}")
            if problem:
                break
            end += len(line)
        file.truncate(end)
        if not end:
            self._write(header.model_dump_json() + "\n")
        self.count = len(self.found)

    def append(self, records: Iterable[R]) -> None:
        """Put them on the disk at once. Raises OutputError where it does not take them."""
        lines = [each.model_dump_json() + "\n" for each in records]
        self._write("".join(lines))
        self.count += len(lines)

    def _write(self, lines: str) -> None:
        left = memoryview(lines.encode())
        with _written(self.file.name):
            # Not through a buffer: where the disk is full it would be tried again, and fail again, on closing.
            while left:
                left = left[os.write(self.file.fileno(), left) :]
            os.fsync(self.file.fileno())


@contextmanager
def growing(out: Path, header: H, kind: type[R]) -> Iterator[Growing[H, R]]:
    """What an earlier run with this header left in a hidden file beside `out`, to be appended to; it becomes `out` when
    the context ends. Raises OutputError where that cannot be written, or while another process does the same.
    """
    partial = out.absolute().with_name(f".{out.name}.llmdrop-partial")
    with _open(partial, out) as file:
        records = Growing(file, header, kind)
        try:
            yield records
            with _written(out):
                partial.replace(out)
        finally:
            if not records.count:
                partial.unlink(missing_ok=True)


@contextmanager
def appended(path: Path, header: H, kind: type[R]) -> Iterator[Growing[H, R]]:
    """A file as it is, for more records with its header. Raises OutputError for one with another header, which stays as
    it is, and where it cannot be written, or while another process does the same.
    """
    with _open(path, path) as file:
        yield Growing(file, header, kind, refuse=True)


@contextmanager
def _open(path: Path, named: Path) -> Iterator[BinaryIO]:
    """Kept from other processes while it is open; errors name another file, which it is to become."""
    with _written(named):
        file = path.open("a+b")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been finished after it was opened here, and is another process's result now.
            held = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            held = False
        if not held:
            raise OutputError(f"{path} is in use: another process is writing into it")
        yield file


def read_grown(path: Path, header: type[H], kind: type[R], command: str) -> tuple[H, tuple[R, ...]]:
    """All of a file that a command wrote. Raises DataError naming the line that cannot be used."""
    with refusing(f"{path} cannot be read", DataError):
        lines = path.read_bytes().splitlines()
    if not lines:
        raise DataError(f"{path} is empty; expected what `{command}` writes")
    first = _record(header, lines[0], path, 1, command)
    return first, tuple(_record(kind, line, path, number, command) for number, line in enumerate(lines[1:], start=2))


def _record(kind: type[Any], line: bytes, path: Path, number: int, command: str) -> Any:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{key}: " for key in first["loc"][:1])
        raise DataError(f"{path}, line {number}: {where}{first['msg']}; expected what `{command}` writes") from None


def _written(path: str | Path) -> AbstractContextManager[None]:
    return refusing(f"{path} cannot be written", then="; the same command goes on")
