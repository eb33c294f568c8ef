"""Tensor and pipeline parallel engines give the tokens of the single process."""

import pytest

from llmdrop_vllm import DropMask
from llmdrop_vllm.serving.pipeline import stage_attention
from tests.architectures.cases import CASES, LAYERS
from tests.architectures.kernels import kernels
from tests.architectures.wrapper_cases import WRAPPER_CASES
from tests.engines import engine, greedy
from tests.serving.engine_process import run_job
from tests.tiny import golden, write_checkpoint

TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "1"}
# In eager mode vLLM's CPU worker skips the warm-up that allocates the tensors between stages. Traced, and not compiled,
# a model is there in half the time.
TRACED = {"compilation_config": {"mode": 2, "backend": "eager"}}
GIB_TOKENS_PER_SUBLAYER = 2**30 // (2 * 2 * 32 * 4)  # two key/value heads of 32 float32 numbers


@pytest.fixture(scope="module")
def case():
    return golden("llama_attn_ints")  # 8 layers, attention kept in 0, 1, 2 and 4


@pytest.fixture(scope="module")
def checkpoint(case, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("dropped"), case["config"], seed=case["seed"], strip=True)


@pytest.mark.processes
def test_tensor_parallel(case, checkpoint):
    result = run_job(
        TWO_WORKERS, model=checkpoint, prompt=case["prompt_token_ids"], tensor_parallel_size=2, enforce_eager=True
    )
    assert result["tokens"] == case["greedy_token_ids"]
    # Each rank holds one of the two key/value heads.
    assert result["kv_tokens"] == 2 * GIB_TOKENS_PER_SUBLAYER // 4
    assert result["log"].count("attention dropped in 4 of 8 layers [3,5-7], MLP in 0; KV cache 1,024 bytes/token") == 1


@pytest.mark.processes
def test_pipeline_parallel(case, checkpoint):
    result = run_job(TWO_WORKERS, model=checkpoint, prompt=case["prompt_token_ids"], pipeline_parallel_size=2)
    assert result["tokens"] == case["greedy_token_ids"]
    # Two attention sublayers on either stage; vLLM's own split into halves would put three on the first.
    assert result["kv_tokens"] == GIB_TOKENS_PER_SUBLAYER // 2
    mask = DropMask.from_config(case["config"])
    assert stage_attention(mask, [4, 4]) == [3, 1]
    assert "in pipeline stage 0 (layers 0-1)" in result["log"]
    assert "in pipeline stage 1 (layers 2-7)" in result["log"]


PROMPT = [*range(3, 43)]
# Qwen3-VL without its vision tower, and a hybrid of which the second stage has attention only. The hybrid is compiled:
# its eleventh token is a tie, which other kernels decide otherwise.
TOWERS = {
    "Qwen3VLForConditionalGeneration": (WRAPPER_CASES, {"language_model_only": True}, TRACED),
    "Lfm2ForCausalLM": (CASES, {}, {}),
}


@pytest.mark.processes
@pytest.mark.parametrize("name", TOWERS)
def test_pipeline_parallel_wrappers_and_hybrids(name, tmp_path):
    cases, options, how = TOWERS[name]
    if options:
        pytest.importorskip("torchvision", reason="vLLM's multimodal models import it")
    directory = cases[name].write(tmp_path)
    options = options | {"hf_overrides": DropMask(LAYERS, attention=(0, 4), mlp=(1,)).to_config("runtime")}
    result = run_job(TWO_WORKERS, model=directory, prompt=PROMPT, pipeline_parallel_size=2, **how, **options)
    with kernels(), engine(directory, **options) as llm:
        assert result["tokens"] == greedy(llm, PROMPT)[0]
    assert "in pipeline stage 0 (layers 0-2)" in result["log"]
    assert "in pipeline stage 1 (layers 3-4)" in result["log"]
