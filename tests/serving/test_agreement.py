"""Ranks that meet: what they must agree on, the stages that they decide once, and that silence is noticed."""

import math
import multiprocessing
import os
import re
from unittest.mock import patch

import pytest
import torch.distributed as dist
from vllm.engine.arg_utils import EngineArgs

from llmdrop_vllm import DropMask, __version__
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.serving import agreement
from llmdrop_vllm.serving.stages import OUR_PARTITION, PARTITION
from tests.tiny import TINY_LLAMA, write_checkpoint

SUBLAYER_BYTES = 4 * 3 * 64 * 128  # attention and MLP alike
ROOMY, TIGHT = 100 * SUBLAYER_BYTES, 9 * SUBLAYER_BYTES  # on the tight one, six MLPs leave little for the cache
LATE, EARLY = DropMask(8, (4, 5, 6, 7)), DropMask(8, (0, 1))
NO_MASK = "the mask is no mask on rank 1"
SILENT = (
    rf"after 1 s, rank 1 has not said which mask it has: its node needs llmdrop-vllm {__version__}, and llmdrop in "
    "VLLM_PLUGINS where that is set"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of an engine with two pipeline stages, each on a node of its own."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("full"), TINY_LLAMA)
    with patch.dict(os.environ, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}):
        return EngineArgs(
            model=str(checkpoint),
            skip_tokenizer_init=True,
            max_model_len=256,
            dtype="float32",
            pipeline_parallel_size=2,
            distributed_timeout_seconds=1,
        ).create_engine_config()


def one_rank(rank, meeting, config, mask=LATE, memory=math.inf, users=None, version=__version__, absent=False):
    """The stages that a rank has after it has met the other one, or what it complains of."""
    for name in (PARTITION, OUR_PARTITION):
        os.environ.pop(name, None)
    if users:
        os.environ[PARTITION] = users
    decoder = Decoder.of_masked(TINY_LLAMA | mask.to_config("llm-drop"), "LlamaForCausalLM") if mask else None
    its = {"stage_memory_bytes": lambda _: memory, "__version__": version}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", world_size=2, rank=rank)
    with patch.multiple(agreement, **its):
        try:
            if not absent:
                agreement.agree(decoder, config)
        except ValueError as error:
            return str(error)
    return os.environ.get(PARTITION)


def child(rank, meeting, config, how, results):
    results.put((rank, one_rank(rank, meeting, config, **how)))


@pytest.fixture
def meet(config, tmp_path):
    """A function that gives what comes of two ranks, each a process that differs in the named ways."""

    def run(*ranks):
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        children = [
            context.Process(target=child, args=(rank, tmp_path / "meeting", config, how, results))
            for rank, how in enumerate(ranks)
        ]
        for each in children:
            each.start()
        found = dict(results.get(timeout=60) for _ in children)
        for each in children:
            each.join()
        return [found[rank] for rank in range(len(ranks))]

    return run


@pytest.mark.parametrize(
    ("memory", "stages"), [((ROOMY, ROOMY), "2,6"), ((ROOMY, TIGHT), "3,5"), ((TIGHT, ROOMY), "3,5")]
)
def test_the_stages_are_decided_once_by_the_smallest_memory(meet, memory, stages):
    assert meet(*({"memory": each} for each in memory)) == [stages, stages]


def test_the_users_stages_stand_where_all_have_them(meet):
    assert meet({"users": "1,7", "memory": TIGHT}, {"users": "1,7"}) == ["1,7", "1,7"]


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ({"mask": EARLY}, r"the mask is attention dropped in 2 of 8 layers \[0-1\], MLP in 0 on rank 1 .*\[4-7\]"),
        ({"mask": None}, NO_MASK),
        ({"version": "0.0.1"}, f"llmdrop-vllm is 0.0.1 on rank 1 .*, {__version__} on rank 0"),
        ({"users": "1,7"}, f"{PARTITION} is 1,7 on rank 1 .*, unset on rank 0"),
        ({"absent": True}, SILENT),
    ],
)
def test_ranks_that_differ_or_are_silent_are_refused(meet, how, found):
    ours, other = meet({}, how)
    assert re.search(found, ours or "served")
    # One without a mask builds the full model and says no more; it is alone.
    assert other == (None if found in (SILENT, NO_MASK) else ours)
