"""llmdrop_heal.json: what a checkpoint was healed on, and what each layer gained by it."""

from pathlib import Path
from typing import Literal

from llmdrop_vllm.artifacts import HEAL_FILE, DataIdentity, ModelIdentity, Provenance, Record, read_record


class HealedLayer(Record):
    """A layer whose last projections, of its MLP or attention as `mends` says, were refitted so that its output is the
    full model's after layer `target`; where it lost nothing and attention was, so that the two meet before its MLP.

    `lost` are the sublayers gone since the layer before, `tensors` what was changed; none where no change helped.
    `error_before` and `error_after` are shares of the full model's squared residual stream, on held-out sequences.
    `ridge` is lambda of the closed form, `steps` those of the descent where there is none.
    """

    layer: int
    target: int
    lost: tuple[str, ...]
    mends: str
    tensors: tuple[str, ...] = ()
    columns: int
    ridge: float | None = None
    steps: int | None = None
    error_before: float
    error_after: float


class Training(Record):
    """Distillation after the closed form: KL to the teacher on held-out sequences, before and after. `data` is what it
    learnt from, `tensors` are those that it or a training before it changed.

    `history` is what the loop logged: by step, the loss learnt from or the held-out one.
    """

    method: str
    epochs: float
    learning_rate: float
    tokens_seen: int
    kl_before: float
    kl_after: float
    tensors: tuple[str, ...] = ()
    data: DataIdentity | None = None
    history: tuple[dict[str, float], ...] = ()


class Healing(Record):
    """The whole file. `tokens` were learnt from, `held_out_tokens` chose lambda; both count answers only."""

    kind: Literal["llmdrop-healing"] = "llmdrop-healing"
    teacher: ModelIdentity
    tokens: int
    held_out_tokens: int
    layers: tuple[HealedLayer, ...]
    training: Training | None = None
    provenance: Provenance

    @property
    def trained(self) -> tuple[str, ...]:
        """Tensors that training changed."""
        return () if self.training is None else self.training.tensors

    def summary(self) -> str:
        """One line for people."""
        mended = [each for each in self.layers if each.lost and each.tensors]
        left = [each.error_after / each.error_before for each in mended if each.error_before]
        data = self.provenance.data
        source = "nothing" if data is None else Path(data.source).name  # without the way to its file
        text = f"{len(mended)} layers healed on {self.tokens:,} tokens of {source}"
        if left:
            text += f", leaving {min(left):.0%} to {max(left):.0%} of each one's error"
        if later := sum(1 for each in self.layers if each.tensors and not each.lost):
            text += f", and attention refitted in {later} behind the first"
        if self.training is not None:
            text += f"; trained, KL {self.training.kl_before:.3f} to {self.training.kl_after:.3f}"
        # Every change made their held-out error larger.
        if unhealed := [each.layer for each in self.layers if each.lost and not each.tensors]:
            text += f"; nothing helped in {', '.join(map(str, unhealed))}"
        return text

    @property
    def method(self) -> Literal["healed", "trained"]:
        """In a word."""
        return "trained" if self.trained else "healed"


def healing_of(directory: Path) -> Healing | None:
    """How a checkpoint was healed; None where it was not."""
    path = directory / HEAL_FILE
    return read_record(Healing, path) if path.is_file() else None
