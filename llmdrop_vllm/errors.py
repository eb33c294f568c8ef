"""What users can get wrong: every error here says what was found, what is expected and where."""


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
