"""What checkpoint surgery will write: decided and checked in full before anything is written."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX
from llmdrop_vllm.checkpoints import nemotron
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint, MaskedCheckpoint
from llmdrop_vllm.checkpoints.shards import INDEX_FILE, VARIANT, VARIANT_INDEX_FILE, StoredTensor, index_files
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.masks.dialects import ON_DISK
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.writing.companions import companions
from llmdrop_vllm.writing.renumbering import renumbered
from llmdrop_vllm.writing.validation import check_surgery, checked_config, output_projections

DROPPED = f"model.{VARIANT}"  # how names of files begin that no other loader takes for the whole model's
NEMOTRON_CODE = Path(nemotron.__file__).with_name("configuration_nemotron_nas.py")
NEMOTRON_CLASS = f"{NEMOTRON_CODE.stem}.NemotronNasConfig"


@dataclass(frozen=True)
class OutputShard:
    """A weight file to write: one of the checkpoint's, with what is kept of it."""

    name: str
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class SurgeryPlan:
    """Everything that will be in the new checkpoint.

    `dropped` are the tensors that the checkpoint has and the new one will not have; `zeroed` names tensors whose values
    become zeros; `links` are files to link to in place of `shards` and `index`; `copies` are other files by the names
    that they get; `left_out` are names in the checkpoint's directory; `others` are JSON files by name, in place of the
    checkpoint's and of records, None for what is not to be there; `warnings` are for the user to read.
    """

    masked: MaskedCheckpoint
    config: Mapping[str, Any]
    shards: tuple[OutputShard, ...]
    dropped: tuple[StoredTensor, ...]
    zeroed: frozenset[str]
    links: tuple[Path, ...]
    copies: Mapping[str, Path]
    others: Mapping[str, Any]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def mask(self) -> DropMask:
        """What the new checkpoint goes without."""
        return self.masked.mask

    @property
    def weight_bytes(self) -> int:
        """Size of the tensors to write; what `write_checkpoint` reports as progress adds up to it."""
        return sum(tensor.num_bytes for shard in self.shards for tensor in shard.tensors)

    @property
    def num_bytes(self) -> int:
        """Size of all files to write, without the few that are made from this plan."""
        return self.weight_bytes + sum(path.stat().st_size for path in self.copies.values())

    @property
    def index(self) -> str | None:
        """Name of the file that says which shard holds what; None where there is one shard, or none."""
        if len(self.shards) < 2:
            return None
        return VARIANT_INDEX_FILE if self.shards[0].name.startswith(DROPPED) else INDEX_FILE

    def healed(self, tensors: Mapping[str, StoredTensor]) -> Self:
        """The same with other values for some of the tensors, of the same types and shapes."""
        shards = []
        for shard in self.shards:
            others = tuple(tensors.get(tensor.name, tensor) for tensor in shard.tensors)
            for tensor, other in zip(shard.tensors, others, strict=True):
                if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
                    raise CheckpointError(f"{tensor.name} is {tensor.dtype} {tensor.shape}, healed {other}")
            shards.append(replace(shard, tensors=others))
        return replace(self, shards=tuple(shards))


def plan_surgery(
    model: str | Path | Checkpoint,
    mask: DropMask | None = None,
    *,
    dialect: str | None = "llm-drop",
    portable: bool = False,
    config_only: bool = False,
    keep_dropped: bool = False,
    renumber: bool = False,
) -> SurgeryPlan:
    """Plan a checkpoint of `model` with a mask, by default its own, and check all that can be known beforehand.

    The tensors of dropped sublayers go, unless: `portable` keeps them with their output projections zeroed, for engines
    that know no masks; `config_only` links to the weights as they are; `keep_dropped` only says the mask in another
    dialect, by None its own. With `renumber` layers that lose both sublayers go in any case, and the others move up.
    Raises InputError for what cannot be done; nothing is written here.
    """
    source = checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    dialect = dialect or next(iter(DropMask.dialects(checkpoint.config)), ON_DISK[0])
    masked = checkpoint.under(checkpoint.mask if mask is None else mask)
    check_surgery(masked, dialect, portable, config_only, keep_dropped, renumber)
    masked, others = renumbered(masked) if renumber else (masked, {})
    checkpoint = masked.checkpoint
    # Loaders of Nemotron-NAS checkpoints refuse tensors of sublayers that are not there.
    for_nemotron = dialect == "nemotron-nas"
    keeps_all = portable or config_only or (keep_dropped and not for_nemotron) or masked.loses_nothing
    whole = keeps_all and checkpoint.is_whole
    reference = checked_config(checkpoint.under(checkpoint.decoder.whole) if whole else masked)
    plain_files = for_nemotron or (whole and not masked.mask.windows)
    shards = () if config_only else _shards(masked, keeps_all, "model" if plain_files else DROPPED)
    # A whole checkpoint under its plain name may be portable, and stays so when its mask is only said anew.
    has_plain_name = plain_files and whole and checkpoint.config["architectures"] == [checkpoint.architecture]
    explicit = bool(masked.mask) and not (portable or for_nemotron or (keep_dropped and has_plain_name))
    silent = for_nemotron or (renumber and not masked.mask)
    copies, left_out = companions(checkpoint, without=frozenset({"config.json", NEMOTRON_CODE.name, *others}))
    return SurgeryPlan(
        masked=masked,
        config=_config(masked, dialect, reference, explicit, silent),
        shards=shards,
        dropped=() if config_only else _not_in(shards, source),
        zeroed=output_projections(masked) if portable else frozenset(),
        links=(*checkpoint.metadata, *index_files(checkpoint.directory)) if config_only else (),
        copies=copies | ({NEMOTRON_CODE.name: NEMOTRON_CODE} if for_nemotron else {}),
        others=others,
        left_out=left_out,
        warnings=(*source.remarks, *_warnings(masked, dialect, reference)),
    )


def _shards(masked: MaskedCheckpoint, keeps_all: bool, prefix: str) -> tuple[OutputShard, ...]:
    """One for each weight file that keeps anything, numbered as Transformers does."""
    checkpoint = masked.checkpoint
    sources: dict[Path, list[StoredTensor]] = {}
    for tensor in (checkpoint.tensors if keeps_all else masked.kept).values():
        sources.setdefault(tensor.path, []).append(tensor)
    shards = []
    for number, (path, tensors) in enumerate(sources.items(), start=1):
        numbers = f"-{number:05}-of-{len(sources):05}" if len(sources) > 1 else ""
        shards.append(OutputShard(f"{prefix}{numbers}.safetensors", tuple(tensors), checkpoint.metadata[path]))
    return tuple(shards)


def _not_in(shards: Collection[OutputShard], source: Checkpoint) -> tuple[StoredTensor, ...]:
    """The source's tensors that no shard has, whatever it calls them."""
    written = {(tensor.path, tensor.start) for shard in shards for tensor in shard.tensors if tensor.num_bytes}
    return tuple(each for each in source.tensors.values() if each.num_bytes and (each.path, each.start) not in written)


def _config(masked: MaskedCheckpoint, dialect: str, reference: Any, explicit: bool, silent: bool) -> Mapping[str, Any]:
    """config.json of the new checkpoint, its keys in the order of the old one's; `silent`: it speaks of no mask."""
    checkpoint, said = masked.checkpoint, {} if silent else masked.mask.to_config(dialect)
    # Engines without this package refuse an architecture that they do not know, instead of ignoring the mask.
    name = f"{EXPLICIT_PREFIX}{checkpoint.architecture}" if explicit else checkpoint.architecture
    entries = checkpoint.decoder.config_with(said) | {"architectures": [name]}
    if dialect == "nemotron-nas":  # what the model is called above is what it is called when it gets its name back
        entries = nemotron.renamed(entries, masked.mask, reference, NEMOTRON_CLASS)
    return {key: entries[key] for key in checkpoint.config if key in entries} | entries


def _warnings(masked: MaskedCheckpoint, dialect: str, reference: Any) -> list[str]:
    if reference is not None:
        return nemotron.warnings(masked.mask, reference) if dialect == "nemotron-nas" else []
    model_type = masked.checkpoint.decoder.whole_config.get("model_type")
    return [
        f"Transformers does not know model_type {model_type!r}: "
        "names and shapes of the tensors were not compared with the architecture"
    ]
