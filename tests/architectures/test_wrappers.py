"""Every wrapper with a tiny model: a mask drops sublayers of its tower, and nothing else of it is touched."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH
from vllm.model_executor.models import registry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX
from llmdrop_vllm.architectures.names import layer_in
from llmdrop_vllm.architectures.wrappers import at
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.checkpoints.sublayer_tensors import in_dropped_sublayer
from llmdrop_vllm.serving.config_hook import ConfigHook
from llmdrop_vllm.serving.models import Droppable
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.validation import output_projections
from llmdrop_vllm.writing.write import write_checkpoint
from tests.architectures.bare_wrappers import BARE, last_projections, made_up_weights, write
from tests.architectures.cases import LAYERS
from tests.architectures.kernels import kernels
from tests.architectures.wrapper_cases import WANTS_IMAGES, WRAPPER_CASES
from tests.engines import KV_CACHE_BYTES, engine, greedy

pytest.importorskip("torchvision", reason="vLLM's multimodal models import it")
PROMPT = [*range(3, 43)]
MASK = DropMask(LAYERS, attention=(4, 0, 2), mlp=(4, 1))


@pytest.fixture(autouse=True)
def text_only(monkeypatch):
    """The towers are built, and no processor is asked for: these checkpoints have neither tokenizer nor processor."""
    monkeypatch.setattr(ModelConfig, "_supports_multimodal_inputs", lambda self: False)


def served(directory: Path, **options):
    """(greedy token ids, log-probabilities of them and of the prompt, blocks of KV cache and tokens in each)."""
    options = {"attention_backend": "CPU_MLA"} | options
    with kernels(), engine(directory, **options) as llm:
        tokens, logprobs, prompt = greedy(llm, PROMPT)
        cache = llm.llm_engine.vllm_config.cache_config
        return tokens, [*logprobs, *prompt], (cache.num_gpu_blocks, cache.block_size)


def rewritten(directory: Path, change) -> Path:
    weights = directory / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("wrapper", WRAPPER_CASES)
def test_dropping_is_zeroing_the_last_projections(wrapper, tmp_path):
    case = WRAPPER_CASES[wrapper]
    masked, zeroed = (case.write(tmp_path / name) for name in ("masked", "zeroed"))
    checkpoint = Checkpoint.open(zeroed)
    zeros = output_projections(checkpoint.under(MASK))
    rewritten(zeroed, lambda tensors: tensors | {name: torch.zeros_like(tensors[name]) for name in zeros})
    path = masked / "config.json"
    path.write_text(json.dumps(checkpoint.decoder.config_with(MASK.to_config())))
    family = checkpoint.family
    rewritten(masked, lambda tensors: {n: t for n, t in tensors.items() if not in_dropped_sublayer(n, family, MASK)})
    tokens, logprobs, (blocks, block_tokens) = served(masked)
    expected_tokens, expected, _ = served(zeroed)
    assert tokens == expected_tokens
    assert logprobs == pytest.approx(expected, abs=1e-4)
    layout = checkpoint.under(MASK).layout
    assert blocks == KV_CACHE_BYTES // (4 * block_tokens * layout.block_values)


@pytest.mark.parametrize("wrapper", WRAPPER_CASES)
def test_the_toolkit_drops_from_the_tower_and_leaves_the_rest_as_it_was(wrapper, tmp_path):
    case = WRAPPER_CASES[wrapper]
    full = case.write(tmp_path / "full")
    write_checkpoint(plan_surgery(full, MASK), tmp_path / "dropped")
    before = load_file(full / "model.safetensors")
    after = load_file(tmp_path / "dropped" / "model.dropped.safetensors")
    gone = before.keys() - after.keys()
    assert {layer_in(name) for name in gone} == {*MASK.attention, *MASK.mlp}
    assert after.keys() <= before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    dropped = Checkpoint.open(tmp_path / "dropped")
    assert (dropped.mask, dropped.is_stripped) == (MASK, True)
    assert dropped.config["architectures"] == [f"Dropped{case.architecture}"]
    assert at(dropped.config, dropped.decoder.place)["drop_attn_list"] == [*MASK.attention]


@pytest.mark.parametrize("wrapper", [name for name in WRAPPER_CASES if name not in WANTS_IMAGES])
def test_transformers_computes_what_it_does_with_the_projections_zeroed(wrapper, tmp_path):
    full = WRAPPER_CASES[wrapper].write(tmp_path / "full")
    for name, options in {"dropped": {}, "portable": {"portable": True}}.items():
        write_checkpoint(plan_surgery(full, MASK, **options), tmp_path / name)
    prompt = torch.tensor([PROMPT])
    ours = hf.from_pretrained(tmp_path / "dropped", attn_implementation="eager").eval()
    with torch.no_grad():
        found = ours(input_ids=prompt).logits
    portable = WRAPPER_CASES[wrapper].load(tmp_path / "portable")
    with torch.no_grad():
        torch.testing.assert_close(found, portable(input_ids=prompt).logits, rtol=0, atol=1e-4)
    cached, plain = (
        ours.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("wrapper", BARE)
def test_dropping_is_zeroing_in_a_wrapper_that_transformers_does_not_make(wrapper, tmp_path):
    decoder = Decoder.of(json.loads((write(wrapper, tmp_path) / "config.json").read_bytes()), wrapper)
    with made_up_weights():
        tokens, logprobs, (blocks, block_tokens) = served(
            tmp_path, load_format="dummy", hf_overrides=MASK.to_config("runtime")
        )
    with made_up_weights(last_projections(decoder.family, MASK)):
        expected_tokens, expected, _ = served(tmp_path, load_format="dummy")
    with made_up_weights():
        whole = served(tmp_path, load_format="dummy")[1]
    assert tokens == expected_tokens
    assert logprobs == pytest.approx(expected, abs=1e-4)
    assert whole != pytest.approx(expected, abs=1e-1)
    assert blocks == KV_CACHE_BYTES // (4 * block_tokens * decoder.layout(MASK).block_values)


@contextmanager
def without_the_plugin() -> Iterator[None]:
    """Within this context vLLM's registries are as they were before the plugin came."""
    models = {
        name: registry._LazyRegisteredModel(module_name=registry._resolve_module_name(module), class_name=class_name)
        for name, (module, class_name) in registry._VLLM_MODELS.items()
    }
    hooks = {name: hook.inner for name, hook in MODELS_CONFIG_MAP.items() if isinstance(hook, ConfigHook)}
    hooks = {name: hook for name, hook in hooks.items() if hook is not None and not name.startswith(EXPLICIT_PREFIX)}
    with (
        patch.dict(registry.ModelRegistry.models, models, clear=True),
        patch.dict(MODELS_CONFIG_MAP, hooks, clear=True),
        patch.dict(_MODEL_ARCH_BY_HASH, clear=True),
    ):
        yield


@pytest.mark.parametrize("wrapper", WRAPPER_CASES)
def test_a_wrapper_without_a_mask_is_served_as_without_the_plugin(wrapper, tmp_path):
    """Bit for bit."""
    WRAPPER_CASES[wrapper].write(tmp_path)
    ours = served(tmp_path)
    with without_the_plugin(), patch.object(Droppable, "__init__", forbidden):
        assert served(tmp_path) == ours


def forbidden(*args: object, **kwargs: object) -> None:
    raise AssertionError("the plugin's class was built")


def test_a_dropped_wrapper_is_served_by_its_name_and_refused_without_the_plugin(tmp_path):
    case = WRAPPER_CASES["Qwen3VLForConditionalGeneration"]
    write_checkpoint(plan_surgery(case.write(tmp_path / "full"), MASK), tmp_path / "dropped")
    ours = served(tmp_path / "dropped")
    assert ours == served(tmp_path / "full", hf_overrides=MASK.to_config("runtime"))
    with without_the_plugin(), pytest.raises(ValueError, match=r"DroppedQwen3VLFor.*not supported"):
        served(tmp_path / "dropped")
