"""Scores agree with the reference and a naive computation, also when interrupted or measured on a dropped model."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.errors import OutputError
from llmdrop_vllm.scoring import scoring, scratch
from llmdrop_vllm.scoring.attention_probe import QUERIES_PER_SEQUENCE
from llmdrop_vllm.scoring.layers import LayerStream
from tests.checkpoints.files import token_file
from tests.tiny import TINY_LLAMA, golden, write_checkpoint

DEPTH = TINY_LLAMA["num_hidden_layers"]


@pytest.fixture(scope="module")
def scores(tiny):
    return scoring.score(*tiny)


@pytest.mark.parametrize("case", ["llama_scores", "mistral_scores"])
def test_similarities_are_the_references(case, tmp_path):
    expected = golden(case)
    model = write_checkpoint(tmp_path / "model", expected["config"], seed=expected["seed"])
    (tmp_path / "data.json").write_text(json.dumps(expected["calibration_token_ids"]))
    checkpoint = Checkpoint.open(model)
    found = scoring.score(checkpoint, load_calibration(checkpoint, str(tmp_path / "data.json")))
    for kind, key in (("attention", "attn"), ("mlp", "mlp"), ("block", "block")):
        assert getattr(found.similarity, kind) == pytest.approx(expected[f"{key}_similarity"], abs=1e-5)
    for row, reference in zip(found.block_similarity_by_gap, expected["block_similarity_consecutive"], strict=True):
        assert row == pytest.approx([value for value in reference if value is not None], abs=1e-5)


def naive_diagnostics(model, sequence):
    """Per layer: (output / stream per token, mean cosine of token pairs, concentration and first token per query)."""
    streams = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _m, args, i=index: streams.__setitem__((i, "x"), args[0][0]))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _m, args, i=index: streams.__setitem__((i, "y"), args[0][0])
        )
    with torch.no_grad():
        weights = model(torch.from_numpy(sequence)[None], output_attentions=True).attentions
    length = len(sequence)
    queries = min(QUERIES_PER_SEQUENCE, length - length // 2)
    rows = np.unique(np.linspace(length // 2, length - 1, queries).astype(int))
    for index in range(DEPTH):
        x, y = streams[index, "x"], streams[index, "y"]
        pairs = [torch.cosine_similarity(y[a], y[b], dim=0).item() for a in range(length) for b in range(a)]
        visible = [head[row, : row + 1] for head in weights[index][0] for row in rows]
        concentration = [1 + (w * w.log()).sum().item() / np.log(len(w)) for w in visible]
        yield (y - x).norm(dim=-1) / x.norm(dim=-1), np.mean(pairs), concentration, [w[0].item() for w in visible]


def test_diagnostics_are_those_of_a_naive_computation(tiny, scores):
    checkpoint, calibration = tiny
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, attn_implementation="eager").eval()
    by_sequence = [list(naive_diagnostics(model, sequence)) for sequence in calibration.sequences]
    attention = scores.diagnostics.attention
    for layer, results in enumerate(zip(*by_sequence, strict=True)):
        ratios, pairs, concentrations, firsts = zip(*results, strict=True)
        assert attention.magnitude_ratio[layer] == pytest.approx(torch.cat(ratios).mean().item(), abs=1e-5)
        assert attention.token_cosine_after[layer] == pytest.approx(np.mean(pairs), abs=1e-5)
        assert attention.concentration[layer] == pytest.approx(np.mean(np.concatenate(concentrations)), abs=1e-5)
        assert attention.first_token[layer] == pytest.approx(np.mean(np.concatenate(firsts)), abs=1e-5)
    assert scores.diagnostics.mlp.token_cosine_before == attention.token_cosine_after


def test_positions_are_those_of_the_model_in_the_checkpoints_dtype(tiny):
    """Rotary tables were once rounded to bfloat16 with the weights: wrong positions for every real checkpoint."""
    checkpoint, _ = tiny
    where = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    stream = LayerStream(checkpoint.under(DropMask(DEPTH)), **where, attention="sdpa")
    tokens = torch.arange(200)[None] % 256
    with stream.embedding() as begin, torch.inference_mode():
        found = begin(tokens)
    model = hf.from_pretrained(checkpoint.directory, dtype=torch.bfloat16).model
    assert torch.equal(found, model.embed_tokens(tokens))
    cos, sin = stream.calls[1, 200][0].kwargs["position_embeddings"]
    expected = model.rotary_emb(found, torch.arange(200)[None])
    assert torch.equal(cos, expected[0])
    assert torch.equal(sin, expected[1])


def test_chunk_size_changes_nothing(tiny, scores, monkeypatch):
    monkeypatch.setitem(scoring.TOKENS_PER_CHUNK, "cpu", 41)
    again = scoring.score(*tiny)
    assert again.similarity.attention == pytest.approx(scores.similarity.attention, abs=1e-6)
    assert again.similarity.block == pytest.approx(scores.similarity.block, abs=1e-6)


def test_gaps_are_measured_on_a_sample_of_limited_size(tiny, scores, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_GAP_TOKENS", 50)
    sampled = scoring.score(*tiny)
    assert (scores.gap_tokens, sampled.gap_tokens) == (100, 50)
    assert [row[0] for row in sampled.block_similarity_by_gap] == pytest.approx(scores.similarity.block, abs=1e-6)
    assert sampled.block_similarity_by_gap[0] == pytest.approx(scores.block_similarity_by_gap[0], abs=0.05)


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch, layer):
    """Stop a run when it asks for this layer; returns the layers that were asked for."""
    asked, original = [], LayerStream.layer

    def counting(self, index):
        asked.append(index)
        if index == layer:
            raise Interrupted
        return original(self, index)

    monkeypatch.setattr(LayerStream, "layer", counting)
    return asked


def test_an_interrupted_run_goes_on_at_the_layer_it_reached(tiny, scores, tmp_path, monkeypatch):
    directory = tmp_path / "scratch"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            scoring.score(*tiny, scratch=directory)
    with monkeypatch.context() as patch:
        asked = interrupt_at(patch, None)
        resumed = scoring.score(*tiny, scratch=directory)
    assert asked == [5, 6, 7]
    assert resumed.similarity == scores.similarity
    assert resumed.block_similarity_by_gap == scores.block_similarity_by_gap
    assert resumed.diagnostics == scores.diagnostics
    assert not directory.exists()


def test_a_run_interrupted_inside_a_layer_does_that_layer_again(tiny, scores, tmp_path, monkeypatch):
    calls, original = [], scratch.HiddenStates.write

    def failing(self, depth, chunk, hidden):
        calls.append(depth)
        if calls.count(4) == 2:
            raise Interrupted
        original(self, depth, chunk, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(scratch.HiddenStates, "write", failing)
        patch.setitem(scoring.TOKENS_PER_CHUNK, "cpu", 21)
        with pytest.raises(Interrupted):
            scoring.score(*tiny, scratch=tmp_path / "scratch")
        calls.clear()
        patch.setattr(scratch.HiddenStates, "write", original)
        asked = interrupt_at(patch, None)
        resumed = scoring.score(*tiny, scratch=tmp_path / "scratch")
    assert asked == [3, 4, 5, 6, 7]
    assert resumed.similarity.attention == pytest.approx(scores.similarity.attention, abs=1e-6)


def test_another_runs_hidden_states_are_never_taken_up(tiny, tmp_path, monkeypatch):
    checkpoint, calibration = tiny
    directory = tmp_path / "scratch"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            scoring.score(checkpoint, calibration, scratch=directory)
    other = load_calibration(checkpoint, token_file(tmp_path / "other.json", (20, 21)))
    asked = interrupt_at(monkeypatch, None)
    scoring.score(checkpoint, other, scratch=directory)
    assert asked == list(range(DEPTH))


def test_two_runs_do_not_share_a_scratch_directory(tiny, tmp_path, monkeypatch):
    original = LayerStream.layer

    def second_run(self, index):
        monkeypatch.setattr(LayerStream, "layer", original)
        with pytest.raises(OutputError, match="in use"):
            scoring.score(*tiny, scratch=tmp_path / "scratch")
        return original(self, index)

    monkeypatch.setattr(LayerStream, "layer", second_run)
    assert scoring.score(*tiny, scratch=tmp_path / "scratch").num_hidden_layers == DEPTH


def test_one_decoder_layer_is_in_memory_at_a_time(tiny, monkeypatch):
    checkpoint, calibration = tiny
    seen, original = [], LayerStream._load

    def watching(self, module, prefix, names):
        original(self, module, prefix, names)
        here = {
            name.split(".")[1] for name, p in self.decoder.named_parameters() if not p.is_meta and "layers." in name
        }
        seen.append(sorted(here))

    monkeypatch.setattr(LayerStream, "_load", watching)
    scoring.score(checkpoint, calibration)
    assert seen == [[], *([str(layer)] for layer in range(DEPTH))]


def test_a_layer_like_the_one_before_is_read_into_the_same_memory(tmp_path):
    """Memory was taken, and cleared, for every tensor before it was looked up whether there is some already."""
    config = TINY_LLAMA | {"num_hidden_layers": 2, "intermediate_size": 1 << 14}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, config))
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    stream = LayerStream(checkpoint.under(DropMask(2)), **where, attention="sdpa")
    with stream.layer(0):
        tracemalloc.start()
    with stream.layer(1):
        peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20  # each projection of the MLP has 4 MiB


@pytest.mark.parametrize("strip", [False, True], ids=["all weights in the files", "stripped"])
def test_a_dropped_model_is_scored_without_what_it_dropped(tiny, strip, tmp_path):
    _, calibration = tiny
    config = TINY_LLAMA | {"drop_attn_list": [6, 0], "drop_mlp_list": [6, 3]}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "dropped", config, strip=strip))
    found = scoring.score(checkpoint, calibration)
    assert [layer for layer, value in enumerate(found.similarity.attention) if value is None] == [0, 6]
    assert [layer for layer, value in enumerate(found.similarity.mlp) if value is None] == [3, 6]
    assert found.similarity.block[6] == pytest.approx(1)
    assert found.dropped == DropMask(DEPTH, (6, 0), (6, 3))
    model = hf.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    inputs = []
    model.model.layers[5].register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    model.model.layers[5].post_attention_layernorm.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    cosines = []
    for sequence in calibration.sequences:
        with torch.no_grad():
            model(torch.from_numpy(sequence)[None])
        cosines.append(torch.cosine_similarity(*inputs[-2:], dim=-1).flatten())
    assert found.similarity.attention[5] == pytest.approx(torch.cat(cosines).mean().item(), abs=1e-5)


def test_a_scratch_directory_keeps_what_others_have_put_there(tiny, tmp_path):
    (tmp_path / "precious.bin").write_text("mine")
    (tmp_path / "directory").mkdir()
    scoring.score(*tiny, scratch=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "precious.bin"]
