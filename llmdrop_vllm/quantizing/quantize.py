"""A checkpoint, dropped or not, with quantized weights: same mask, same files beside it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from llmdrop_vllm.artifacts import DataIdentity, Provenance, Record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.directory import read_config
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.quantizing.environment import environment
from llmdrop_vllm.quantizing.schemes import SCHEMES, check_quantizable, group_size_of
from llmdrop_vllm.quantizing.worker import REPORT, Job
from llmdrop_vllm.writing.companions import companions
from llmdrop_vllm.writing.plan import SurgeryPlan, plan_surgery

QUANTIZE_FILE = "llmdrop_quantize.json"
KEY = "quantization_config"


class Quantized(Record):
    """llmdrop_quantize.json: how a checkpoint was quantized, and from what.

    `versions` are those of llm-compressor's environment; `data` is what GPTQ rounded for, none for rounding to the
    nearest.
    """

    scheme: str
    group_size: int | None
    modules: int
    bytes_before: int
    bytes_after: int
    versions: dict[str, str]
    data: DataIdentity | None
    provenance: Provenance

    def summary(self) -> str:
        """For people."""
        how = "rounded to the nearest" if self.data is None else f"GPTQ on {self.data.tokens:,} tokens"
        groups = f", groups of {self.group_size}" if self.group_size else ""
        sizes = f"{self.bytes_before:,} bytes of weights, now {self.bytes_after:,}"
        return f"{self.scheme}{groups} in {self.modules} linear layers, {how}; {sizes}"


@dataclass(frozen=True)
class QuantizePlan:
    """What is asked for, checked; `calibration` is what GPTQ rounds for, none for rounding to the nearest."""

    checkpoint: Checkpoint
    scheme: str
    group_size: int | None
    calibration: Calibration | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, scheme: str, group_size: int | None) -> Self:
        """Raises InputError for a model or a size of groups that the scheme does not fit, before anything slow."""
        check_quantizable(checkpoint)
        plan_surgery(checkpoint, dialect=None, keep_dropped=True)  # weights are all there, and of the config's shapes
        return cls(checkpoint, scheme, group_size_of(SCHEMES[scheme], checkpoint, group_size))


@contextmanager
def quantized(plan: QuantizePlan, work: Path) -> Iterator[tuple[SurgeryPlan, Quantized]]:
    """The plan of the quantized checkpoint, whose weights lie in the directory `work` until the context ends, and its
    record.

    Raises InputError where llm-compressor's environment cannot be made, or it fails.
    """
    python = environment()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield _planned(plan, work, _compress(plan, python, work))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compress(plan: QuantizePlan, python: Path, work: Path) -> dict[str, Any]:
    tokens = [] if plan.calibration is None else [each.tolist() for each in plan.calibration.sequences]
    source, made = str(plan.checkpoint.directory.resolve()), str(work / "model")
    job = Job(source, made, SCHEMES[plan.scheme].preset, plan.group_size, tokens)
    (work / "job.json").write_text(json.dumps(asdict(job)))
    settings = {"LLM_COMPRESSOR_LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-m", "llmdrop_vllm.quantizing.worker", str(work / "job.json")]
    # Its packages are its own: nothing of this process's path may come before them.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if status := subprocess.run(command, env=variables | settings).returncode:
        raise InputError(f"llm-compressor has ended with status {status}; what it said stands above")
    found: dict[str, Any] = json.loads((work / REPORT).read_text())
    return found


def _planned(plan: QuantizePlan, work: Path, report: dict[str, Any]) -> tuple[SurgeryPlan, Quantized]:
    """llm-compressor's weights under the config and beside the files of the checkpoint that they were made of."""
    source, made = plan.checkpoint, work / "model"
    (made / "config.json").write_text(json.dumps({**source.config, KEY: read_config(made)[KEY]}))
    copies, _ = companions(source, without=frozenset({"config.json"}))
    for name, path in copies.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).unlink(missing_ok=True)
        (made / name).symlink_to(path.absolute())
    surgery = plan_surgery(made, dialect=None, keep_dropped=True)
    assert surgery.mask.effect == source.mask.effect, "the config is the source's"
    return surgery, Quantized(
        scheme=plan.scheme,
        group_size=plan.group_size,
        bytes_before=source.under(source.mask).weight_bytes,
        bytes_after=surgery.weight_bytes,
        data=None if plan.calibration is None else plan.calibration.identity,
        provenance=Provenance.of(source),
        **report,
    )
