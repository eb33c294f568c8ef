"""Nemotron-NAS checkpoints are served by the plugin: without remote code, and with whatever sublayer missing first."""

import json

import pytest

from llmdrop_server.report import report
from llmdrop_vllm import DropMask
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.engines import engine, greedy, kv_tokens
from tests.tiny import TINY_LLAMA, write_checkpoint

PROMPT = [*range(3, 60)]
# A kept MLP before any attention crashes stock vLLM.
MASKS = (DropMask(8, (6, 0), (3,)), DropMask(8, (2, 1, 0), (0, 1)), DropMask(8, (5,), (0,)))


def outputs(path):
    with engine(path) as llm:
        return (
            greedy(llm, PROMPT),
            kv_tokens(llm),
            type(llm.llm_engine.model_executor.driver_worker.get_model()).__name__,
        )


@pytest.mark.parametrize("mask", MASKS, ids=DropMask.summary)
def test_block_configs_serve_the_same_model_as_a_masked_llama(mask, tmp_path):
    full = write_checkpoint(tmp_path / "full", TINY_LLAMA)
    write(plan_surgery(full, mask), tmp_path / "usual")
    write(plan_surgery(full, mask, dialect="nemotron-nas"), tmp_path / "nemotron")
    (found, tokens, name), (expected, expected_tokens, _) = (outputs(tmp_path / each) for each in ("nemotron", "usual"))
    assert name == "DeciLMForCausalLM"
    assert (found[0], tokens) == (expected[0], expected_tokens)
    assert found[1:] == (pytest.approx(expected[1], abs=1e-5), pytest.approx(expected[2], abs=1e-5))


def test_layers_may_differ_in_width(tmp_path):
    """An MLP of another width in layer 1 is the same model as one padded with zeros to the usual width."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    mask, wide = DropMask(8, (6, 0)), TINY_LLAMA["intermediate_size"]
    write(plan_surgery(write_checkpoint(tmp_path / "full", TINY_LLAMA), mask, dialect="nemotron-nas"), tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_bytes())
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    narrow = tensors | {name: np.split(tensors[name], 2, axis=name.endswith("down_proj.weight"))[0] for name in names}
    padded = tensors | {name: np.zeros_like(tensors[name]) for name in names}
    for name in names:
        rows, columns = narrow[name].shape
        padded[name][:rows, :columns] = narrow[name]
    narrow = {name: np.ascontiguousarray(tensor) for name, tensor in narrow.items()}
    logprobs = {}
    for kind, weights, width in (("narrow", narrow, wide // 2), ("padded", padded, wide)):
        config["block_configs"][1]["ffn"]["intermediate_size"] = width
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        logprobs[kind] = outputs(tmp_path / kind)[0][2]
    assert logprobs["narrow"] == pytest.approx(logprobs["padded"], abs=1e-5)


def test_published_checkpoints_with_null_for_what_differs_are_served_and_reported(tmp_path):
    """Their configs leave the heads of keys and values, and the FFN's width, to the block configs."""
    mask = DropMask(8, (6, 1))
    full = write_checkpoint(tmp_path / "full", TINY_LLAMA)
    write(plan_surgery(full, mask, dialect="nemotron-nas"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    published = config | {"num_key_value_heads": None, "intermediate_size": None}
    logprobs = {}
    for name, entries in {"said": config, "null": published}.items():
        (tmp_path / "out" / "config.json").write_text(json.dumps(entries))
        with engine(tmp_path / "out") as llm:
            logprobs[name] = greedy(llm, PROMPT)
            found = report(llm.llm_engine.vllm_config)
        assert (found.summary, found.full.attention_layers) == (mask.summary(), 8)
        # Keys and values of 2 heads of 32 numbers, in float32.
        assert (found.full.kv_bytes_per_token, found.served.kv_bytes_per_token) == (8 * 512, 6 * 512)
    assert logprobs["null"] == logprobs["said"]


def test_attention_that_a_linear_map_replaces_is_refused_by_its_place(tmp_path):
    full = write_checkpoint(tmp_path / "full", TINY_LLAMA)
    write(plan_surgery(full, DropMask(8, (6,)), dialect="nemotron-nas"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    config["block_configs"][3]["attention"]["replace_with_linear"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"block_configs\[3\]\.attention\.replace_with_linear is set; only kept"):
        outputs(tmp_path / "out")
