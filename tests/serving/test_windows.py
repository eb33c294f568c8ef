"""Windows that the mask gives to layers, served: the engine's own groups, and what they hold of each request."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache
from vllm.model_executor.layers.attention import Attention

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import MaskError
from tests.engines import engine, greedy
from tests.serving.engine_process import run_job
from tests.serving.test_parallel import TWO_WORKERS
from tests.tiny import TINY_LLAMA, write_checkpoint

WINDOW = 24
MASK = DropMask(8, attention=(2,), windows=((1, WINDOW), (3, WINDOW), (6, 40)))
LONG = np.random.default_rng(0).integers(3, 250, 150).tolist()
SHORT = LONG[: WINDOW // 2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("windowed"), TINY_LLAMA | MASK.to_config())


@pytest.fixture(scope="module")
def expected(checkpoint):
    """What Transformers goes on with."""
    model = hf.from_pretrained(checkpoint, dtype=torch.float32)
    made = model.generate(torch.tensor([LONG]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    return made[0, len(LONG) :].tolist()


def test_up_to_the_window_it_is_the_full_model(checkpoint, tmp_path):
    full = write_checkpoint(tmp_path / "full", TINY_LLAMA | DropMask(8, attention=(2,)).to_config())
    with engine(checkpoint) as llm:
        tokens, _, logprobs = greedy(llm, SHORT, tokens=WINDOW - len(SHORT))
        _, _, beyond = greedy(llm, LONG, tokens=2)
    with engine(full) as llm:
        assert greedy(llm, SHORT, tokens=WINDOW - len(SHORT))[0] == tokens
        assert greedy(llm, SHORT, tokens=2)[2] == pytest.approx(logprobs, abs=1e-5)
        assert greedy(llm, LONG, tokens=2)[2] != pytest.approx(beyond, abs=1e-2)


@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 32}, {"enable_prefix_caching": True, "max_num_batched_tokens": 64}]
)
def test_in_chunks_and_from_cached_prefixes_it_is_what_transformers_computes(options, checkpoint, expected):
    with engine(checkpoint, **options) as llm:
        for _ in range(2):
            assert greedy(llm, LONG, tokens=8)[0] == expected


def test_the_whole_model_in_windows_is_one_that_has_them_by_itself(tmp_path):
    """Transformers' Mistral knows one window for all layers."""
    plain = TINY_LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    windows = DropMask(8, windows=[(layer, WINDOW) for layer in range(8)])
    ours = hf.from_pretrained(write_checkpoint(tmp_path / "ours", plain | windows.to_config()), dtype=torch.float32)
    theirs = write_checkpoint(tmp_path / "theirs", plain | {"sliding_window": WINDOW})
    theirs = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    ids = torch.tensor([LONG])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


def test_padding_at_the_left_changes_nothing(checkpoint):
    model = hf.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    padded = torch.tensor([[0] * 9 + LONG])
    seen = torch.tensor([[0] * 9 + [1] * len(LONG)])
    places = (seen.cumsum(-1) - 1).clamp(min=0)
    found = model(padded, attention_mask=seen, position_ids=places).logits[:, 9:]
    torch.testing.assert_close(found, model(torch.tensor([LONG])).logits, rtol=0, atol=1e-4)


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [{"tensor_parallel_size": 2, "enforce_eager": True}, {"pipeline_parallel_size": 2}])
def test_every_rank_has_its_windows(ranks, checkpoint, expected):
    result = run_job(TWO_WORKERS, model=checkpoint, prompt=LONG, **ranks)
    assert len(result["tokens"]) >= 4
    assert result["tokens"][:8] == expected[: len(result["tokens"])]
    assert "attention to the last 24 tokens in 2 [1,3], attention to the last 40 tokens in 1 [6]" in result["log"]


@pytest.mark.parametrize(
    ("config", "windows", "message"),
    [
        ({}, ((3, 512),), "a window of 512 tokens in layer 3 changes nothing: the model's context is 512 tokens"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
            ((3, 100),),
            "changes nothing: it sees 64 tokens",
        ),
    ],
)
def test_windows_that_nobody_would_notice_are_refused(config, windows, message, tmp_path):
    path = write_checkpoint(tmp_path, TINY_LLAMA | config | DropMask(8, windows=windows).to_config())
    checkpoint = Checkpoint.open(path)
    with pytest.raises(MaskError, match=message):
        checkpoint.under(checkpoint.mask)
    with pytest.raises(Exception, match=message), engine(path):
        pytest.fail("started")


def test_a_checkpoint_that_lacks_nothing_is_not_stripped(checkpoint, tmp_path):
    whole = DropMask(8, windows=((1, WINDOW),))
    assert not Checkpoint.open(write_checkpoint(tmp_path, TINY_LLAMA | whole.to_config())).is_stripped
    stripped = TINY_LLAMA | MASK.to_config()
    assert Checkpoint.open(write_checkpoint(tmp_path / "stripped", stripped, strip=True)).is_stripped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "need a cache that grows"),
        ({"past_key_values": "static"}, "found StaticCache"),
    ],
)
def test_caches_whose_keys_are_not_there_yet_are_refused(options, message, checkpoint):
    model = hf.from_pretrained(checkpoint, dtype=torch.float32)
    if "past_key_values" in options:
        options = {"past_key_values": StaticCache(model.config, max_cache_len=256)}
    with pytest.raises(MaskError, match=message):
        model.generate(torch.tensor([LONG]), max_new_tokens=4, do_sample=False, eos_token_id=None, **options)


def test_kernels_with_masks_of_their_own_are_refused(checkpoint):
    model = hf.from_pretrained(checkpoint, dtype=torch.float32)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(MaskError, match="'sdpa' or 'eager'"):
        model.model.layers[1].self_attn(torch.zeros(1, 40, 64), attention_mask=None, position_embeddings=None)


def test_windows_go_when_their_context_ends(tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY_LLAMA))
    model = hf.load(checkpoint.under(checkpoint.mask), dtype=torch.float32)
    ids = torch.tensor([LONG])
    before = model(ids).logits
    with hf.dropped(model, checkpoint.family, MASK):
        assert not torch.allclose(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules())


def test_scaled_positions_reach_further_than_their_number(tmp_path):
    scaled = TINY_LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, scaled | DropMask(8, windows=((1, 600),)).to_config()))
    assert checkpoint.decoder.kinds[1].span == 600


def test_attention_that_keeps_no_window_is_refused(monkeypatch, checkpoint):
    spec = Attention.get_kv_cache_spec

    def full(self, vllm_config):
        found = spec(self, vllm_config)
        return found if self.sliding_window is None else replace(spec(self, vllm_config), sliding_window=7)

    monkeypatch.setattr(Attention, "get_kv_cache_spec", full)
    with (
        pytest.raises(Exception, match="layer 1 was to have a window of 24 tokens; built was Attention"),
        engine(checkpoint),
    ):
        pytest.fail("started")


def test_windows_reach_an_engine_by_themselves(tmp_path):
    path = write_checkpoint(tmp_path, TINY_LLAMA)
    entries = {"llmdrop_windows": {"1": WINDOW}}
    with engine(path, hf_overrides=entries) as llm:
        found = greedy(llm, LONG, tokens=2)[2]
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | entries))
    model = hf.from_pretrained(tmp_path, dtype=torch.float32)
    logprobs = model(torch.tensor([LONG])).logits[0].log_softmax(-1)[range(len(LONG) - 1), LONG[1:]]
    assert found == pytest.approx(logprobs.tolist(), abs=1e-4)
