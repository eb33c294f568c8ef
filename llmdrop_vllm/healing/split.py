"""Which sequences are learnt from and which judge: by prompt, so that no prompt is on both sides."""

from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import DataError

# One in so many prompts judges.
HELD_OUT_EVERY = 8


def held_out_sequences(data: Calibration) -> tuple[bool, ...]:
    """Per sequence, whether it judges. Answers to one prompt are on one side; windows of text are spread evenly.

    Raises DataError for fewer than two prompts.
    """
    starts = data.starts or (None,) * len(data.sequences)
    prompts: dict[object, int] = {}
    found = []
    for place, (start, sequence) in enumerate(zip(starts, data.sequences, strict=True)):
        key = place if start is None else tuple(sequence[: start + 1].tolist())
        found.append(prompts.setdefault(key, len(prompts)))
    if len(prompts) < 2:
        raise DataError(
            f"{data.identity.source} has {len(prompts)} prompt or text; healing needs one to learn, one to judge"
        )
    every = min(HELD_OUT_EVERY, len(prompts))
    return tuple(number % every == every // 2 for number in found)
