"""Windows that the mask gives to layers, served: the engine's own groups, and what they hold of each request."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache
from vllm import SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.stretches import STRETCH
from llmdrop_vllm.serving.window_cache import WindowManager
from tests.engines import engine as any_engine
from tests.engines import greedy
from tests.serving.engine_process import run_job
from tests.serving.test_parallel import TRACED, TWO_WORKERS
from tests.tiny import TINY_LLAMA, write_checkpoint

WINDOW = 24
TINY = TINY_LLAMA | {"max_position_embeddings": 1024}
MASK = DropMask(8, attention=(2,), windows=((1, WINDOW), (3, WINDOW), (6, 140)))
LONG = np.random.default_rng(0).integers(3, 250, 600).tolist()
SEEN = 3 * STRETCH  # of the first tokens, by all others under the shorter window
SHORT = LONG[: SEEN - 20]


def engine(path, **options):
    return any_engine(path, **({"max_model_len": 700} | options))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("windowed"), TINY | MASK.to_config())


@pytest.fixture(scope="module")
def expected(checkpoint):
    """What Transformers goes on with."""
    model = hf.from_pretrained(checkpoint, dtype=torch.float32)
    made = model.generate(torch.tensor([LONG]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    return made[0, len(LONG) :].tolist()


def test_up_to_the_window_it_is_the_full_model(checkpoint, tmp_path):
    full = write_checkpoint(tmp_path / "full", TINY | DropMask(8, attention=(2,)).to_config())
    with engine(checkpoint) as llm:
        tokens, _, logprobs = greedy(llm, SHORT, tokens=SEEN - len(SHORT))
        _, _, beyond = greedy(llm, LONG, tokens=2)
    with engine(full) as llm:
        assert greedy(llm, SHORT, tokens=SEEN - len(SHORT))[0] == tokens
        assert greedy(llm, SHORT, tokens=2)[2] == pytest.approx(logprobs, abs=1e-5)
        unlike = np.abs(np.subtract(greedy(llm, LONG, tokens=2)[2], beyond))
        assert unlike[: SEEN - 1].max() < 1e-5
        assert unlike[SEEN:].max() > 1e-2


def sight(length, window):
    """[queries, keys]: as it is told to people, token by token."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for at in range(length):
        stretch = at // STRETCH * STRETCH
        begin = stretch
        while stretch - begin + 1 < window:  # until the first token of the stretch sees so many
            begin -= STRETCH
        seen[at, max(begin, 0) : at + 1] = True
        seen[at, : min(at + 1, STRETCH)] = True
    return seen


@pytest.mark.parametrize("window", [1, 2, WINDOW, STRETCH, STRETCH + 1, STRETCH + 2])
def test_what_a_token_sees(window, tmp_path):
    """Transformers is told by a mask of its own what each token sees in all layers."""
    masked = TINY | DropMask(8, windows=[(layer, window) for layer in range(8)]).to_config()
    ours = hf.from_pretrained(write_checkpoint(tmp_path / "ours", masked), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / "theirs", TINY), dtype=torch.float32)
    ids, seen = torch.tensor([LONG]), sight(len(LONG), window)
    assert not seen.tril().all(-1)[-1]
    told = theirs(ids, attention_mask=seen[None, None]).logits
    torch.testing.assert_close(ours(ids).logits, told, rtol=0, atol=1e-5)
    assert not torch.allclose(told, theirs(ids).logits, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 48},
        {"enable_prefix_caching": True, "max_num_batched_tokens": 96},
        {"enable_prefix_caching": True, "block_size": 32},
        {"enforce_eager": False},
    ],
)
def test_in_chunks_and_from_cached_prefixes_it_is_what_transformers_computes(options, checkpoint, expected):
    with engine(checkpoint, **options) as llm:
        for _ in range(2):
            assert greedy(llm, LONG, tokens=8)[0] == expected


def test_beside_others_and_where_only_a_part_of_the_prefix_is_there(checkpoint):
    model = hf.from_pretrained(checkpoint, dtype=torch.float32)
    prompts = [LONG[:-30], LONG[:200] + LONG[50:300], LONG[:5], LONG[9:300], LONG]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = [model.generate(torch.tensor([each]), **options)[0, len(each) :].tolist() for each in prompts]
    with engine(checkpoint, enable_prefix_caching=True, block_size=32, max_num_batched_tokens=200) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        for _ in range(2):
            requests = llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)
            assert [[*request.outputs[0].token_ids] for request in requests] == expected


def test_beside_an_8_bit_cache_that_leaves_layers_out_blocks_must_stay_small_enough(checkpoint):
    """vLLM makes blocks of 8 bits twice as long there, and a stretch that is half a block was read from nowhere."""
    mixed = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "1"]}
    with pytest.raises(MaskError, match="the engine's have 256, twice its --block-size"), engine(checkpoint, **mixed):
        pytest.fail("served")
    found = []
    for options in ({"dtype": "bfloat16"}, mixed | {"block_size": 64}):
        with engine(checkpoint, **options) as llm:
            found.append(np.array(greedy(llm, LONG)[2]))
    assert 0 < np.abs(found[0] - found[1]).mean() < 0.05


def test_what_is_out_of_sight_is_freed(checkpoint, monkeypatch):
    freed = set()
    stock = WindowManager.remove_skipped_blocks

    def remove(self, request_id, *args, **kwargs):
        stock(self, request_id, *args, **kwargs)
        blocks = self.req_to_blocks[request_id]
        freed.add((self.sliding_window, tuple(place for place, block in enumerate(blocks) if block.is_null)))

    monkeypatch.setattr(WindowManager, "remove_skipped_blocks", remove)
    with engine(checkpoint, block_size=32, max_num_batched_tokens=64) as llm:
        greedy(llm, LONG, tokens=8)
    # 600 tokens end in the fifth stretch, which sees itself, the one before (of 140 tokens: two) and the first.
    last = {span: max(places for its, places in freed if its == span) for span, _ in freed}
    assert last == {2 * STRETCH: tuple(range(4, 12)), 3 * STRETCH: tuple(range(4, 8))}


def test_a_layer_that_has_a_window_by_itself_gets_a_shorter_one(tmp_path):
    """Transformers' Mistral knows one window for all layers, and none of it are the first tokens."""
    plain = TINY | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 200}
    windows = DropMask(8, windows=[(layer, WINDOW) for layer in range(8)])
    ours = write_checkpoint(tmp_path / "ours", plain | windows.to_config())
    theirs = write_checkpoint(tmp_path / "theirs", plain | {"sliding_window": WINDOW})
    model = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    ids = torch.tensor([LONG])
    made = hf.from_pretrained(ours, dtype=torch.float32)
    torch.testing.assert_close(made(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(made.generate(ids, **options), expected := model.generate(ids, **options))
    with engine(ours) as llm:
        assert greedy(llm, LONG, tokens=8)[0] == expected[0, len(LONG) :].tolist()


def test_padding_at_the_left_changes_nothing(checkpoint):
    model = hf.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    padded = torch.tensor([[0] * 9 + LONG])
    seen = torch.tensor([[0] * 9 + [1] * len(LONG)])
    places = (seen.cumsum(-1) - 1).clamp(min=0)
    found = model(padded, attention_mask=seen, position_ids=places).logits[:, 9:]
    torch.testing.assert_close(found, model(torch.tensor([LONG])).logits, rtol=0, atol=1e-4)


@pytest.mark.processes
@pytest.mark.parametrize(
    "ranks", [{"tensor_parallel_size": 2, "enforce_eager": True}, {"pipeline_parallel_size": 2} | TRACED]
)
def test_every_rank_has_its_windows(ranks, checkpoint, expected):
    result = run_job(TWO_WORKERS, model=checkpoint, prompt=LONG, max_model_len=700, **ranks)
    assert len(result["tokens"]) >= 4
    assert result["tokens"][:8] == expected[: len(result["tokens"])]
    assert "windows of 24 tokens in 2 [1,3], windows of 140 tokens in 1 [6]" in result["log"]


@pytest.mark.parametrize(
    ("config", "windows", "message"),
    [
        ({}, ((3, 770),), "a window of 770 tokens in layer 3 changes nothing: the model's context is 1024 tokens"),
        ({"alibi": True}, ((3, 64),), "ALiBi weighs keys by where they stand"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
            ((3, 100),),
            "changes nothing: it sees 64 tokens",
        ),
    ],
)
def test_windows_that_nobody_would_notice_are_refused(config, windows, message, tmp_path):
    path = write_checkpoint(tmp_path, TINY | config | DropMask(8, windows=windows).to_config())
    checkpoint = Checkpoint.open(path)
    with pytest.raises(MaskError, match=message):
        checkpoint.under(checkpoint.mask)
    with pytest.raises(Exception, match=message), engine(path):
        pytest.fail("started")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disable_hybrid_kv_cache_manager": True}, "need vLLM's hybrid KV cache manager, which is off"),
        ({"block_size": 256}, "in blocks that 128 tokens are a multiple of; the engine's have 256"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"llmdrop_own_store": True},
                }
            },
            "the KV connector ExampleConnector knows no windows",
        ),
    ],
)
def test_engines_whose_cache_knows_no_windows_are_refused(options, message, checkpoint):
    with pytest.raises(Exception, match=message), engine(checkpoint, **options):
        pytest.fail("started")


def test_a_checkpoint_that_lacks_nothing_is_not_stripped(checkpoint, tmp_path):
    whole = DropMask(8, windows=((1, WINDOW),))
    assert not Checkpoint.open(write_checkpoint(tmp_path, TINY | whole.to_config())).is_stripped
    stripped = TINY | MASK.to_config()
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
        options = {"past_key_values": StaticCache(model.config, max_cache_len=700)}
    with pytest.raises(MaskError, match=message):
        model.generate(torch.tensor([LONG]), max_new_tokens=4, do_sample=False, eos_token_id=None, **options)


def test_kernels_with_masks_of_their_own_are_refused(checkpoint):
    model = hf.from_pretrained(checkpoint, dtype=torch.float32)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(MaskError, match="'sdpa' or 'eager'"):
        model.model.layers[1].self_attn(torch.zeros(1, 400, 64), attention_mask=None, position_embeddings=None)


def test_windows_go_when_their_context_ends(tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY))
    model = hf.load(checkpoint.under(checkpoint.mask), dtype=torch.float32)
    ids = torch.tensor([LONG])
    before = model(ids).logits
    with hf.dropped(model, checkpoint.family, MASK):
        assert not torch.allclose(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules())


def test_scaled_positions_reach_further_than_their_number(tmp_path):
    scaled = TINY | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, scaled | DropMask(8, windows=((1, 600),)).to_config()))
    assert checkpoint.decoder.kinds[1].span == 600


@pytest.mark.parametrize("found", [SlidingWindowSpec, ChunkedLocalAttentionSpec])
def test_attention_that_keeps_no_window_is_refused(found, monkeypatch, checkpoint):
    spec, sizes = Attention.get_kv_cache_spec, {SlidingWindowSpec: "sliding_window"}

    def other(self, vllm_config):
        full = spec(self, vllm_config)
        alike = {name: getattr(full, name) for name in ("block_size", "num_kv_heads", "head_size", "dtype")}
        return found(**alike, **{sizes.get(found, "attention_chunk_size"): 7})

    monkeypatch.setattr(Attention, "get_kv_cache_spec", other)
    with (
        pytest.raises(Exception, match="layer 1 was to have a window of 24 tokens; built was Attention"),
        engine(checkpoint),
    ):
        pytest.fail("started")


def test_windows_reach_an_engine_by_themselves(tmp_path):
    path = write_checkpoint(tmp_path, TINY)
    entries = {"llmdrop_windows": {"1": WINDOW}}
    with engine(path, hf_overrides=entries) as llm:
        found = greedy(llm, LONG, tokens=2)[2]
    (tmp_path / "config.json").write_text(json.dumps(TINY | entries))
    model = hf.from_pretrained(tmp_path, dtype=torch.float32)
    logprobs = model(torch.tensor([LONG])).logits[0].log_softmax(-1)[range(len(LONG) - 1), LONG[1:]]
    assert found == pytest.approx(logprobs.tolist(), abs=1e-4)
