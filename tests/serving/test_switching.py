"""Masks switched in a running engine: where they cannot be, and over several processes.

That each architecture then computes what it should stands in tests/architectures/test_serving.py.
"""

from types import SimpleNamespace

import pytest
from torch import nn
from vllm.config import CompilationMode, CUDAGraphMode

from llmdrop_vllm import DropMask
from llmdrop_vllm.evaluation.engine import SWITCHING
from llmdrop_vllm.serving.dropping import SubstitutionError
from llmdrop_vllm.serving.switching import MaskSwitch
from tests.architectures.cases import CASES, LAYERS
from tests.engines import engine, greedy
from tests.serving.engine_process import run_job
from tests.serving.test_parallel import TWO_WORKERS

PROMPT = [5, 9, 200, 31, 77, 8, 120, 64]
MASK = DropMask(LAYERS, attention=(3, 1), mlp=(2,))


def worker(mode=CompilationMode.NONE, graphs=CUDAGraphMode.NONE):
    """As vLLM has it, with a model that is none of ours."""
    found = MaskSwitch()
    found.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(mode=mode, cudagraph_mode=graphs))
    found.get_model = lambda: nn.Linear(1, 1)
    return found


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (worker(mode=CompilationMode.VLLM_COMPILE), "compiled"),
        (worker(graphs=CUDAGraphMode.PIECEWISE), "compiled"),
        (worker(), "Linear has no row in the family table"),
    ],
)
def test_where_a_mask_would_not_be_seen_it_is_refused(worker, message):
    assert message in worker.llmdrop_refuses()
    with pytest.raises(SubstitutionError, match=message):
        worker.llmdrop_put_on([1], [])


def test_what_the_checkpoint_lacks_stays_away(tmp_path):
    """A mask is put on beside the checkpoint's own."""
    path = CASES["LlamaForCausalLM"].write(tmp_path)
    own, more = DropMask(LAYERS, attention=(3,)), DropMask(LAYERS, attention=(3, 1), mlp=(2,))
    with engine(path, hf_overrides=more.to_config("runtime")) as llm:
        expected = greedy(llm, PROMPT)
    with engine(path, hf_overrides=own.to_config("runtime"), **SWITCHING) as llm:
        before = greedy(llm, PROMPT)
        llm.collective_rpc("llmdrop_put_on", args=([3, 1], [2]))
        llm.reset_prefix_cache()
        assert greedy(llm, PROMPT) == expected
        llm.collective_rpc("llmdrop_put_on", args=([3], []))
        llm.reset_prefix_cache()
        assert greedy(llm, PROMPT) == before


@pytest.mark.processes
@pytest.mark.parametrize("ranks", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_every_rank_switches(ranks, tmp_path):
    path = CASES["LlamaForCausalLM"].write(tmp_path)
    with engine(path, hf_overrides=MASK.to_config("runtime")) as llm:
        tokens, *_ = greedy(llm, PROMPT)
    with engine(path) as llm:
        full, *_ = greedy(llm, PROMPT)
    assert tokens != full
    result = run_job(
        TWO_WORKERS, model=path, prompt=PROMPT, put_on=[MASK.attention, MASK.mlp], **{ranks: 2}, **SWITCHING
    )
    assert (result["tokens"], result["switched"]) == (full, tokens)
