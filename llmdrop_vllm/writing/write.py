"""Checkpoint surgery's second half: what was planned, written beside OUT and renamed into place."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from llmdrop_vllm.artifacts import Record, write_record
from llmdrop_vllm.errors import OutputError, refusing
from llmdrop_vllm.writing.plan import SurgeryPlan
from llmdrop_vllm.writing.staging import check_free, partial_of, staged
from llmdrop_vllm.writing.stream import Progress, write_shard

MARGIN_BYTES = 1 << 20  # for headers, JSON and the file system's own


def write_checkpoint(
    plan: SurgeryPlan,
    out: str | Path,
    *,
    overwrite: bool = False,
    records: Mapping[str, Record] = MappingProxyType({}),
    progress: Progress = lambda _: None,
) -> None:
    """Write the planned checkpoint to the directory `out`, which appears when it is whole.

    `records`, such as the mask with its provenance, are written into it under their file names, in place of the
    model's. `progress` is called with numbers of bytes that add up to `plan.weight_bytes`. Raises OutputError for a
    place that cannot be written to and CheckpointError for weights with NaN; nothing is left behind then, and an `out`
    that was there is as it was. Killed at any moment, the process leaves a hidden directory that the next run removes.
    """
    out = Path(out).absolute()
    with refusing(f"{out} cannot be written"):
        check_destination(plan, out, overwrite=overwrite)
        with staged(out, overwrite=overwrite) as partial:
            _check_space(plan, partial, out)
            for shard in plan.shards:
                write_shard(shard, partial / shard.name, plan.zeroed, progress)
            for path in plan.links:
                (partial / path.name).symlink_to(path.resolve())
            _write_others(plan, partial, records)


def check_destination(plan: SurgeryPlan, out: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless the planned checkpoint can be written there, as far as can be told beforehand."""
    out, checkpoint = out.absolute(), plan.masked.checkpoint
    target, model = out.resolve(), checkpoint.directory.resolve()
    if target == model or model in target.parents or target in model.parents:
        raise OutputError(f"{out} is, contains or lies inside the model {checkpoint.directory}; choose another")
    for path in checkpoint.metadata:
        if target in path.resolve().parents:
            raise OutputError(f"{path} is a link into {out}, which must not be overwritten while it is read")
    check_free(out, overwrite=overwrite)
    if not partial_of(out).exists():  # what a killed run left there goes before anything is written
        _check_space(plan, next(parent for parent in out.parents if parent.exists()), out)


def _check_space(plan: SurgeryPlan, where: Path, out: Path) -> None:
    needed, free = plan.num_bytes + MARGIN_BYTES, shutil.disk_usage(where).free
    if needed > free:
        raise OutputError(f"{out} needs {needed:,} bytes, and {free:,} are free there")


def _write_others(plan: SurgeryPlan, directory: Path, records: Mapping[str, Record]) -> None:
    for name, source in plan.copies.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, directory / name)
    for name, record in records.items():
        if name not in plan.others:
            write_record(record, directory / name)
    files = {**plan.others, "config.json": plan.config}
    if plan.index:
        weight_map = dict(sorted((tensor.name, shard.name) for shard in plan.shards for tensor in shard.tensors))
        files[plan.index] = {"metadata": {"total_size": plan.weight_bytes}, "weight_map": weight_map}
    for name, value in files.items():
        if value is not None:
            text = json.dumps(value, indent=2, ensure_ascii=False)
            (directory / name).write_text(f"{text}\n", encoding="utf-8")
