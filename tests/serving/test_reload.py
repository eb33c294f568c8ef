"""Weights that come later: streamed into a running model in pieces, read anew from a checkpoint, or after a sleep."""

from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers import utils

from tests.engines import engine, greedy
from tests.tiny import TINY_LLAMA, write_checkpoint

PROMPT = [*range(3, 103)]
MASK = {"drop_attn_list": [0, 2, 5], "drop_mlp_list": [2, 6]}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("full"), TINY_LLAMA)


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    config = TINY_LLAMA | MASK | {"architectures": ["DroppedLlamaForCausalLM"]}
    return write_checkpoint(tmp_path_factory.mktemp("dropped"), config, strip=True)


def answer(llm):
    return greedy(llm, PROMPT, tokens=8, prompt_logprobs=None)[0]


@pytest.fixture(scope="module")
def expected(dropped):
    with engine(dropped) as llm:
        return answer(llm)


@pytest.fixture
def plain_weights():
    """Weights stay as they were loaded, as on a GPU: for CPUs vLLM packs those of linear layers."""

    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    with patch.object(utils, "dispatch_cpu_unquantized_gemm", keep):
        yield


@pytest.mark.parametrize("names", ["full", "dropped"])
@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.usefixtures("plain_weights")
def test_weights_are_streamed_in_pieces_by_the_names_of_either_model(names, size, full, dropped, expected, request):
    """As trainers send them to an engine that began with none."""
    weights = [*load_file(request.getfixturevalue(names) / "model.safetensors").items()]
    with engine(full, hf_overrides=MASK, load_format="dummy", enable_prefix_caching=False) as llm:
        assert answer(llm) != expected
        for start in range(0, len(weights), size):
            llm.apply_model(lambda model, start=start: model.load_weights(weights[start : start + size]))
        assert answer(llm) == expected


@pytest.mark.usefixtures("plain_weights")
def test_a_reload_brings_back_all_that_a_deep_sleep_forgets(dropped, expected):
    """Level 2 keeps buffers alone; no platform that sleeps is here, so what it forgets is overwritten by hand."""

    def forget(model):
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)

    with engine(dropped, enable_prefix_caching=False) as llm:
        llm.apply_model(forget)
        llm.collective_rpc("reload_weights")
        assert answer(llm) == expected


def test_a_checkpoint_takes_the_place_of_another_under_the_same_mask(full, dropped, tmp_path, expected):
    other = write_checkpoint(tmp_path, TINY_LLAMA, seed=1)
    with engine(dropped, enable_prefix_caching=False) as llm:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert answer(llm) != expected
        for path in (full, dropped):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            assert answer(llm) == expected


@pytest.mark.parametrize("served", [{}, MASK])
def test_a_checkpoint_under_another_mask_is_refused_and_the_model_goes_on(served, full, tmp_path):
    """vLLM reads its weights and not its mask: what it lacks would stay that of the model before."""
    other = write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [0, 3]}, strip=True)
    with engine(full, hf_overrides=served, enable_prefix_caching=False) as llm:
        before = answer(llm)
        with pytest.raises(
            ValueError, match=r"has a mask \(.* \[0,3\].* the running model was built with (none|another)"
        ):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert answer(llm) == before
        llm.collective_rpc("reload_weights")
        assert answer(llm) == before


def test_a_checkpoint_that_lacks_kept_weights_is_refused_and_the_model_goes_on(dropped, tmp_path, expected):
    other = write_checkpoint(tmp_path, TINY_LLAMA, without=("model.layers.1.mlp.",))
    with engine(dropped, enable_prefix_caching=False) as llm:
        with pytest.raises(ValueError, match=r"that the mask keeps: model.layers.1.mlp.down_proj.weight"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert answer(llm) == expected
