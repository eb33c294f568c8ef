"""Texts so long that windows are felt in them."""

from pathlib import Path

from llmdrop_vllm.artifacts import sha256
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.answers import is_answers
from llmdrop_vllm.data.calibration import EMBEDDED, load_calibration
from llmdrop_vllm.data.tokens import Calibration, TokenIds
from llmdrop_vllm.errors import DataError
from llmdrop_vllm.masks.stretches import STRETCH, span
from llmdrop_vllm.search.states import takers, windowed

LONG_TEXTS, TIMES_THE_WINDOW = 6, 4


def long_texts(
    checkpoint: Checkpoint,
    data: str | None,
    window: int,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
) -> tuple[Calibration, Calibration]:
    """Those to choose by, and the last third: of text as long ones as show what is out of sight; token ids and answers
    as they are. The tokens that count are those that do not see everything.

    Raises DataError for one text, and for texts that are shorter than what is seen.
    """
    data = data or EMBEDDED
    if not (data.endswith(".json") or is_answers(Path(data))):
        enough = max(TIMES_THE_WINDOW * window, 3 * (STRETCH + span(window)))
        samples, seq_len = samples or LONG_TEXTS, seq_len or min(enough, checkpoint.context or enough)
    texts = load_calibration(checkpoint, data, samples=samples, seq_len=seq_len, seed=seed)
    if len(texts.sequences) < 2:
        raise DataError("one text was given; layers are chosen by some, and compared on others")
    seen = _seen_in_full(checkpoint, window)
    if (shortest := min(map(len, texts.sequences))) <= seen + 1:
        raise DataError(f"texts of {shortest} tokens see everything under windows of {window}; take longer")
    held_out = -(-len(texts.sequences) // 3)

    def part(sequences: tuple[TokenIds, ...]) -> Calibration:
        hashed = sha256(each.tolist() for each in sequences)
        tokens = {"sequences": len(sequences), "tokens": sum(map(len, sequences)), "sha256": hashed}
        return Calibration(sequences, texts.identity.model_copy(update=tokens), starts=(seen,) * len(sequences))

    return part(texts.sequences[:-held_out]), part(texts.sequences[-held_out:])


def _seen_in_full(checkpoint: Checkpoint, window: int) -> int:
    """Tokens at a text's beginning that see everything, whichever layer has the window."""
    seen = 0
    for layer in takers(checkpoint, window):
        mask = windowed(checkpoint.mask, [layer], window)
        kinds = dict(zip(mask.kept_attention, checkpoint.decoder.layout(mask).kinds, strict=True))
        seen = max(seen, kinds[layer].seen_in_full or 0)
    return seen
