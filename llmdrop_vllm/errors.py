"""What users can get wrong: every error here says what was found, what is expected and where."""

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MOST_NAMES = 8


class InputError(ValueError):
    """Something the user gave cannot be used; the command line prints the message and nothing else."""


class MaskError(InputError):
    """A drop mask that cannot be read, written or served; the message names the key, the value and what is allowed."""


class CheckpointError(InputError):
    """A checkpoint that cannot be used; the message names the file or tensor."""


class DataError(InputError):
    """Calibration text or token ids that cannot be used."""


class OutputError(InputError):
    """A place that cannot be written to."""


@contextmanager
def refusing(what: str, kind: type[InputError] = OutputError, then: str = "") -> Iterator[None]:
    """Within this context, what the system refuses is an error of ours, between these words."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) not in what else ""
        raise kind(f"{what}: {error.strerror or error}{where}{then}") from error


def listed(names: Iterable[str]) -> str:
    """Names for a message, in order: the first ones, and how many more. A model's tensors would fill a screen."""
    found = sorted(names)
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return ", ".join(found[:MOST_NAMES]) + more


def in_one_line(error: Exception) -> str:
    """The message without the line breaks of what other packages say in it."""
    return " ".join(line.strip() for line in str(error).splitlines())


def command(*words: object) -> str:
    """A command of ours to be copied into a shell, whatever the names of files are."""
    return shlex.join(["llmdrop", *map(str, words)])
