"""What the evaluation touches of vLLM and lm-eval, one test each: what fails here is what a new version changed."""

import inspect
from dataclasses import fields
from types import SimpleNamespace

import pytest
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.vllm_causallms import VLLM
from lm_eval.tasks import TaskManager
from vllm import LLM, SamplingParams
from vllm.config import ModelConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.engine.llm_engine import LLMEngine

from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.evaluation.engine import EngineSettings
from llmdrop_vllm.evaluation.harness import METRICS, OWN_TASKS


def test_the_engine_takes_the_arguments_that_it_is_started_with():
    arguments = EngineSettings(dtype="float32", max_model_len=64).arguments(Checkpoint.open(MODEL), DropMask(12, (3,)))
    assert arguments.keys() <= {each.name for each in fields(EngineArgs)}
    assert arguments["hf_overrides"] == {"drop_attn_list": [3], "drop_mlp_list": [], "llmdrop_windows": {}}


def test_the_users_own_overrides_leave_the_mask_in_place():
    settings = EngineSettings(dtype="float32", max_model_len=64, options={"hf_overrides": {"rope_theta": 1.0}})
    overrides = settings.arguments(Checkpoint.open(MODEL), DropMask(12, (3,)))["hf_overrides"]
    assert overrides == {"rope_theta": 1.0} | DropMask(12, (3,)).to_config("runtime")


def test_an_engine_in_this_process_can_be_shut_down_and_its_memory_freed():
    assert callable(InprocClient.shutdown)
    assert callable(cleanup_dist_env_and_memory)
    assert "self.llm_engine" in inspect.getsource(LLM.__init__)


def test_the_vocabulary_has_a_size():
    assert callable(ModelConfig.get_vocab_size)


@pytest.mark.parametrize(
    "name", ["max_tokens", "temperature", "seed", "prompt_logprobs", "ignore_eos", "detokenize", "output_kind"]
)
def test_requests_take_the_options_that_are_measured_with(name):
    assert name in inspect.signature(SamplingParams).parameters


def test_the_engine_can_be_stepped():
    assert list(inspect.signature(LLMEngine.add_request).parameters)[:4] == ["self", "request_id", "prompt", "params"]
    assert callable(LLMEngine.step)
    assert callable(LLMEngine.has_unfinished_requests)
    assert RequestOutputKind.FINAL_ONLY
    assert {"token_ids", "text", "finish_reason"} <= {each.name for each in fields(CompletionOutput)}


def test_lm_evals_model_makes_the_engine_with_what_it_is_given_and_keeps_it_as_model():
    source = inspect.getsource(VLLM.__init__)
    assert "self.model_args.update(kwargs)" in source
    assert "self.model = LLM(**self.model_args)" in source


def test_lm_evals_runner_takes_loaded_tasks():
    assert {"lm", "task_dict", "limit", "bootstrap_iters"} <= inspect.signature(evaluator.evaluate).parameters.keys()
    tasks = TaskManager(include_path=str(OWN_TASKS), include_defaults=False).load(["llmdrop_name"])["tasks"]
    assert {"get_config", "set_config", "set_fewshot_seed"} <= set(dir(tasks["llmdrop_name"]))


def test_lm_eval_knows_the_metrics_that_stand_for_a_task():
    from lm_eval.api import metrics
    from lm_eval.api.registry import METRIC_REGISTRY  # noqa: F401 - filled when the metrics are imported

    assert all(name in inspect.getsource(metrics) for name in METRICS[:4])


def test_lm_evals_cache_of_answers_tells_no_models_apart(tmp_path):
    """So no evaluation here goes through it, and the README says so of lm-eval's own command line."""
    request = Instance("loglikelihood", {}, ("a", "b"), 0)
    answers = []
    for value in (-1.0, -2.0):
        model = SimpleNamespace(
            loglikelihood=lambda requests, value=value: [(value, True) for _ in requests],
            set_cache_hook=lambda hook: None,
            cache_hook=SimpleNamespace(add_partial=lambda *args: None),
        )
        answers += CachingLM(model, str(tmp_path / "cache.db")).loglikelihood([request])
    assert answers == [(-1.0, True)] * 2
