"""What ranks tell each other before they build a model with a mask, so that none serves it in full beside the others.

They do so in the store in which they met. A rank whose vLLM lacks this package would take a collective for its own next
one; what it never says in the store is noticed.
"""

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from vllm.config import VllmConfig

from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.errors import InputError, MaskError
from llmdrop_vllm.serving.peers import DOOR, go_in, open_door
from llmdrop_vllm.serving.stages import PARTITION, planned, set_stages, stage_memory_bytes, users_stages
from llmdrop_vllm.versions import __version__

# Ranks build their models as soon as they have met, so what takes longer than this is not slow but missing.
PATIENCE_S = 120
STAGES = "stages"
# A store may outlive an engine, and would give the next one's ranks what was said before it.
_engines = count()


@dataclass(frozen=True)
class Statement:
    """What a rank says of itself. `stages` are those that its user has set; the memory is a pipeline stage's there."""

    host: str
    version: str
    mask: str
    stages: str | None
    memory_bytes: float


def agree(decoder: Decoder | None, vllm_config: VllmConfig) -> None:
    """Decide the pipeline stages with all other ranks of the engine; raises MaskError where they differ or are silent.

    A rank without a mask says so and goes on, for it need not be one of ours that builds the full model beside it. What
    drafts is left out: some pipeline stages have none.
    """
    if vllm_config.model_config.runner == "draft" or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = dist.PrefixStore(f"llmdrop/{next(_engines)}", _get_default_store())
    mask = "no mask" if decoder is None else decoder.mask.summary()
    mine = Statement(socket.gethostname(), __version__, mask, users_stages(), stage_memory_bytes(vllm_config))
    store.set(str(dist.get_rank()), json.dumps(asdict(mine)))
    if decoder is None:
        return
    rank, parallel = dist.get_rank(), vllm_config.parallel_config
    patience_s = parallel.distributed_timeout_seconds or PATIENCE_S
    said = heard(store, dist.get_world_size(), patience_s)
    check(said)
    if mine.stages is None and parallel.pipeline_parallel_size > 1:
        if rank == 0:
            store.set(STAGES, planned(decoder, vllm_config, min(each.memory_bytes for each in said)))
        _wait(store, {STAGES: "rank 0 has not said which layers each pipeline stage has"}, patience_s)
        set_stages(store.get(STAGES).decode())
    hosts = [each.host for each in said]
    if parallel.nnodes > 1 and rank == 0:
        open_door(store, hosts)
    elif parallel.nnodes > 1 and parallel.node_rank > 0:
        _wait(store, {DOOR: "rank 0 has not said where other nodes find it"}, patience_s)
        go_in(store, parallel.master_addr, rank, hosts)


def heard(store: dist.Store, world_size: int, patience_s: float) -> list[Statement]:
    """What each rank says, in order; raises MaskError that names those that have not said anything by then."""
    silent = (
        "rank {} has not said which mask it has: its node needs llmdrop-vllm " + __version__ + ", and llmdrop in "
        "VLLM_PLUGINS where that is set; without it, that node would serve the full model"
    )
    _wait(store, {str(rank): silent.format(rank) for rank in range(world_size)}, patience_s)
    return [Statement(**json.loads(store.get(str(rank)))) for rank in range(world_size)]


def check(said: Sequence[Statement]) -> None:
    """Raise MaskError for the first rank that differs from rank 0 in its mask, this package or the stages set there."""
    first = said[0]
    for rank, its in enumerate(said):
        for what, found, expected in (
            ("llmdrop-vllm", its.version, first.version),
            ("the mask", its.mask, first.mask),
            (PARTITION, its.stages or "unset", first.stages or "unset"),
        ):
            if found != expected:
                raise MaskError(
                    f"ranks differ: {what} is {found} on rank {rank} ({its.host}), {expected} on rank 0 "
                    f"({first.host}); start all nodes with the same package, model and options"
                )


def _wait(store: dist.Store, complaints: Mapping[str, str], patience_s: float) -> None:
    """Until all keys are there; raises MaskError with the first missing key's complaint."""
    try:
        store.wait([*complaints], timedelta(seconds=patience_s))
    except RuntimeError as error:  # each kind of store has its own
        try:
            missing = [key for key in complaints if not store.check([key])]
        except RuntimeError:
            raise InputError("rank 0 has ended while ranks told each other their masks; its log says why") from error
        if missing:
            raise MaskError(f"after {patience_s:g} s, {complaints[missing[0]]}") from error
