"""What users can get wrong: every error here says what was found, what is expected and where."""

import re


class InputError(ValueError):
    """Something the user gave cannot be used; the command line prints the message and nothing else."""


class MaskError(InputError):
    """A drop mask that cannot be read, written or served; the message names the key, the value and what is allowed."""


class CheckpointError(InputError):
    """A checkpoint that cannot be used; the message names the file or tensor, in one line, whatever it quotes."""

    def __init__(self, message: object) -> None:
        super().__init__(re.sub(r"\s*\n\s*", " ", str(message)))


class DataError(InputError):
    """Calibration text or token ids that cannot be used."""


class OutputError(InputError):
    """A place that cannot be written to."""
