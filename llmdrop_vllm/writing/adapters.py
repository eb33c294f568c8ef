"""A LoRA that was trained on the full model, for the dropped one: what belongs to dropped sublayers goes."""

import json
import re
import shutil
from pathlib import Path

from llmdrop_vllm.checkpoints.checkpoint import MaskedCheckpoint
from llmdrop_vllm.checkpoints.shards import open_shard, stored_tensors
from llmdrop_vllm.errors import CheckpointError, InputError
from llmdrop_vllm.hf import names_pattern
from llmdrop_vllm.writing.plan import OutputShard
from llmdrop_vllm.writing.staging import staged
from llmdrop_vllm.writing.stream import write_shard

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BEFORE_MODEL = "base_model.model."  # PEFT's


def strip_adapter(masked: MaskedCheckpoint, adapter: Path, out: Path) -> tuple[int, int]:
    """Write an adapter in PEFT's form to the directory `out`, which appears whole, without the weights for sublayers
    that the mask drops; (how many tensors stay, how many go).

    Raises CheckpointError for what is no such adapter, InputError where nothing of it stays or fits the model's layers,
    OutputError for a place that cannot be written to.
    """
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise CheckpointError(f"{adapter} has no {name}; expected what PEFT's save_pretrained writes")
    sublayers = masked.checkpoint.family.sublayers(masked.mask)
    patterns = [names_pattern(sublayer, dropped) for sublayer, dropped in sublayers if dropped]
    gone = re.compile("|".join(patterns) or "(?!)")
    tensors = tuple(stored_tensors(adapter / WEIGHTS))
    kept = tuple(each for each in tensors if not gone.match(each.name.removeprefix(BEFORE_MODEL)))
    if not kept:
        raise InputError(f"every weight of {adapter} is for a sublayer that {masked.mask.summary()} leaves none of")
    try:
        config = json.loads((adapter / CONFIG).read_bytes())
        config["base_model_name_or_path"] = str(masked.checkpoint.directory)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{adapter / CONFIG} is not a JSON object: {error}") from None
    shard = OutputShard(WEIGHTS, kept, dict(open_shard(adapter / WEIGHTS).metadata() or {}))
    with staged(out, overwrite=False) as partial:
        write_shard(shard, partial / WEIGHTS, frozenset(), lambda _: None)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for path in adapter.iterdir():  # a tokenizer, a chat template
            if path.is_file() and path.name not in (CONFIG, WEIGHTS) and path.suffix not in (".bin", ".pt", ".pth"):
                shutil.copyfile(path, partial / path.name)
    return len(kept), len(tensors) - len(kept)
